"""What models cost: summaries, operations, timing and plots."""
