"""Mechanisms that both training loops call, one a file."""
