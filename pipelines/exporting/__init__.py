"""Export of a run to ONNX graphs, and samplers without torch."""
