"""LiteRT files: writing, running and describing them."""
