"""LAMP artifacts on ONNX Runtime: providers, native operators, sessions whose planes stay in place, generation.

Nothing here imports torch: whoever runs an artifact needs numpy and onnxruntime. Shape letters as in
``runtime/ops.py``.
"""
