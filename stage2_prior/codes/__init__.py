"""Codes on disk, and as sequences."""
