"""The commands that work on saved models."""
