"""ONNX: LAMP written as model-local functions that stock ONNX Runtime runs."""
