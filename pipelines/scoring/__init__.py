"""Bits of images under a prior and a likelihood, as numbers, heat maps and panels."""
