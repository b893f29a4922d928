"""Starts the command line without Keras, whose import takes seconds."""

import os
import signal
import sys

# While this is true, `import keras_bilinear` leaves out the public names, which need Keras.
starting = False


def main():
    """Runs the command in `sys.argv` and exits.

    Ctrl-C never ends in a traceback: before and after a command it ends the process at once,
    with status 130; during a command the command line cleans up first.

    Raises:
        SystemExit: with the status, see `keras_bilinear.cli.main.main`.
    """
    global starting
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # in the background of a shell
    if not ignored:
        signal.signal(signal.SIGINT, _stop)
    starting = True
    from keras_bilinear.cli.main import INTERRUPTED, main

    starting = False
    try:
        try:
            main()
        finally:
            if not ignored:
                signal.signal(signal.SIGINT, _stop)
    except KeyboardInterrupt:  # a second one, while the first one was reported
        _stop()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # threads of TensorFlow may be at work, and crash Python's end
            sys.stdout.flush()
            os._exit(INTERRUPTED)
        raise


def _stop(*_):
    """Ends the process at once."""
    os.write(2, b"keras-bilinear: interrupted\n")
    os._exit(130)
