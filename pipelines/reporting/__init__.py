"""Content and layout of the HTML report."""
