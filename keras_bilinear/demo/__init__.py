"""A full and a bilinear network side by side: the command, its results, the tutorials' helpers."""
