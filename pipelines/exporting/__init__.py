"""Export of a run to ONNX graphs, and samplers that need no torch."""
