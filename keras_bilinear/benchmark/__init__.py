"""The benchmark: bilinear layers timed beside the full layers."""
