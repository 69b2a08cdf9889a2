"""What a reconstruction is judged by in training."""
