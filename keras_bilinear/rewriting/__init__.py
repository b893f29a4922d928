"""Whole models: from full layers to bilinear ones and back."""
