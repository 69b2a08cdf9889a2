"""Validation, codebook health and logs of stage 1."""
