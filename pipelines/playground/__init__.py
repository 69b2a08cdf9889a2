"""What can be done with a run by hand: its app, and what that does to codes."""
