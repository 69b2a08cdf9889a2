"""What report.py shows, and how."""
