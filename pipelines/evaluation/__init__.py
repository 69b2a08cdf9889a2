"""What evaluate.py judges a run by."""
