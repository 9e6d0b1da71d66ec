"""ONNX files from strangers: what they hold and what they would take."""
