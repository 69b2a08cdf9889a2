"""A run's recipe and paths, and every command line. The lowest layer; it never imports torch."""
