"""What models cost: summaries, operations, timing, plots."""
