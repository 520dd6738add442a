"""ONNX: LAMP written as model-local functions that stock ONNX Runtime runs.

- *The functions*: ``functions`` (signatures), ``form`` (their variants), ``bodies/``.
- *Reading files that may be hostile*: ``reading`` is the door; ``wire``, ``validate``, ``functions_called``,
  ``tensors``, ``operators``, ``limits`` stand behind it.
- *ONNX in, ONNX out*: ``rewrite`` is the main path; ``find`` with ``patterns/`` and ``walk``, ``replace``, ``writing``;
  ``graph``, ``values``, ``emit``, ``sites`` are what they work with.
- *torch to ONNX*: ``export`` is the main path; ``decoder`` and ``build_decoder``, or ``modules`` and ``build_module``;
  ``trace``, ``translate``, ``torch_ops``; ``targets`` (lint), ``verify``, ``describe``, ``report``, ``finish``.
"""
