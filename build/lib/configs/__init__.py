"""What a run is: its recipe and its paths. The lowest layer; it never imports torch."""
