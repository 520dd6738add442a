"""Bodies of the ``ai.lamp`` functions in ONNX text, by what they compute. ``functions`` makes protos of them."""
