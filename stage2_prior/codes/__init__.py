"""Codes on disk, as batches and as sequences."""
