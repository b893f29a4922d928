"""The demo: a full and a bilinear network side by side; and what the tutorials share."""
