"""What codes are conditioned on, one kind per file."""
