"""Stage 1: images to grids of codes and back."""
