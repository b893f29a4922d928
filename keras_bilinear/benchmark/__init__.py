"""The layers timed against the full ones."""
