"""The command line. Only `cli/`, `demo/` and `benchmark/` know `CommandError`."""
