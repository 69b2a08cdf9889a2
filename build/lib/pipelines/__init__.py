"""What people came for, over both stages: scripts, imported by nobody but tests."""
