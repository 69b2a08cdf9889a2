"""Boxes of an image, a kind per file."""
