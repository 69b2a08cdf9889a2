"""Figures of evaluate.py: distances, references, tables."""
