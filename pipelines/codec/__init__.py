"""What compress.py and decompress.py are made of."""
