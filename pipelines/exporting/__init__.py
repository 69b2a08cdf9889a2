"""A run for those who have no torch: ONNX graphs, and what draws with them."""
