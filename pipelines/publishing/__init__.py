"""The published bundle of a run, and its model card."""
