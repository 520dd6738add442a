"""ONNX files that may be hostile.

``reading`` is the door; ``wire``, ``validate``, ``functions_called``, ``tensors``, ``operators`` and ``limits`` stand
behind it. ``writing`` puts a model in place, complete or not at all.
"""
