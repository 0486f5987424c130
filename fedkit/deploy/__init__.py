"""The way to deployment: ONNX files that take raw inputs, measured, checked and signed before they are handed over."""
