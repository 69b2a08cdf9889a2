"""Images and masks that users hand in: files, a split of the run's data, Python objects."""
