"""Tests of ONNX files need packages that are extras."""

from importlib.util import find_spec

if any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript", "transformers")):
    collect_ignore_glob = ["test_*.py"]
