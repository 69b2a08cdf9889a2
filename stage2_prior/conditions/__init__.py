"""Conditions of codes, one kind per file."""
