"""The app: tabs over a run, and edits of codes."""
