"""ONNX graphs: read with care, searched for attention, written. Imported on use only; needs the onnx package."""
