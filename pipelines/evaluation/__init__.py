"""Metrics of evaluate.py: distances, references, tables."""
