"""Codec of compress.py and decompress.py: entropy coders and the file format."""
