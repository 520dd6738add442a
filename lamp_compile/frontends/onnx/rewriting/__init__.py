"""ONNX in, ONNX out: ``rewrite`` is the main path; ``find`` with the patterns, then ``replace``."""
