"""Autoregressive models of codes. They see integers only, never images or files."""
