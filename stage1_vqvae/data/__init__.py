"""Images: where they come from, decoding and sizes, splits, variants and the pixel range."""
