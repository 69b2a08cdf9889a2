"""What is published of a run: a bundle, and its model card."""
