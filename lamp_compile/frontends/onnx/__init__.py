"""ONNX: LAMP written as model-local functions that stock ONNX Runtime runs.

- The functions: ``functions`` (signatures), ``form`` (their variants), ``bodies/``.
- ``files/``: reading files that may be hostile, and writing.
- ``graphs/``: a graph with its index, values, new nodes: what the next two work with.
- ``patterns/``: spellings of attention; ``rewriting/``: ONNX in, ONNX out.
- ``exporting/``: torch to ONNX, with the targets' lint and the verification.
"""
