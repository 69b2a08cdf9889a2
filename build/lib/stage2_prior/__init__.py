"""Stage 2: codes on disk, and the prior over them."""
