"""Feature networks that compare images, in evaluation and in loss terms."""
