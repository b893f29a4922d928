"""Runs the command line inside the test process."""

import pytest
from absl import flags

from keras_bilinear.cli import main


def run_command(*arguments):
    """Returns the exit status; the flags that the command defined are gone afterwards."""
    before = set(flags.FLAGS)
    try:
        with pytest.raises(SystemExit) as exit:
            main.main(["keras-bilinear", *map(str, arguments)])
        return exit.value.code
    finally:
        flags.FLAGS.remove_flag_values(set(flags.FLAGS) - before)
