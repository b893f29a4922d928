"""The command line: finds the command, parses its flags and turns errors into one line."""

import contextlib
import importlib
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

from absl import flags

from keras_bilinear.cli.errors import CommandError

# For each command, its module and a summary. The module has a docstring for --help, a
# `define_flags()`, and a `main(argv)` that reads `absl.flags.FLAGS`.
COMMANDS = {
    "demo": ("demo.command", "train a full and a bilinear network the same way and compare them"),
    "inspect": ("cli.inspect", "show what a saved model costs, or two side by side"),
    "plan": ("cli.plan", "show which layers of a saved model would become bilinear"),
    "rewrite": ("cli.rewrite", "make a smaller model from a saved model"),
    "expand": ("cli.expand", "make a model of stock layers from a rewritten model"),
    "export": ("cli.export", "write a saved model as a LiteRT file for phones"),
    "benchmark": ("benchmark.command", "time bilinear layers beside the full layers"),
}

_PAUSE = 0.05  # Seconds after which a dropped interrupt is raised again.


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command in `argv[1]` and exits.

    Args:
        argv: program name, command and its arguments; `None` takes `sys.argv`.

    Raises:
        SystemExit: always: with status 0 after success, with 2 after a `CommandError`, which
            becomes one line on stderr, and with 130 after Ctrl-C.
    """
    arguments = list(sys.argv if argv is None else argv)[1:]
    try:
        with _interruptible():
            run(arguments)
    except CommandError as error:
        _fail(" ".join(str(error).split()), status=2)
    except KeyboardInterrupt:
        _fail("interrupted", status=130)
    sys.exit(0)


def run(arguments: Sequence[str]) -> None:
    """Runs one command, or prints help.

    Args:
        arguments: the command and its arguments.

    Raises:
        CommandError: if the command or a flag is unknown, or if the command fails.
    """
    if not arguments:
        raise CommandError(f"no command given, choose one of: {', '.join(COMMANDS)}")
    command, *rest = arguments
    if command in ("-h", "--help", "help"):
        print(usage())
        return
    if command not in COMMANDS:
        raise CommandError(f"unknown command {command!r}, choose one of: {', '.join(COMMANDS)}")
    name, _ = COMMANDS[command]
    module = importlib.import_module(f"keras_bilinear.{name}")
    module.define_flags()
    if {"-h", "--help"} & set(rest):
        print(f"usage: keras-bilinear {command} [--flag=value ...]\n\n{module.__doc__}")
        # Flags that several commands have are defined in another module than the command's.
        for name in flags.FLAGS.flags_by_module_dict():
            if name.startswith("keras_bilinear."):
                print(flags.FLAGS.module_help(name))
        return
    try:
        positional = flags.FLAGS([command, *rest])
    except flags.Error as error:
        raise CommandError(f"{error} (see keras-bilinear {command} --help)") from error
    module.main(positional)


def usage() -> str:
    """The help of the program: one line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: keras-bilinear COMMAND [--flag=value ...]",
            "",
            *lines,
            "",
            "keras-bilinear COMMAND --help lists the flags of a command.",
        ]
    )


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A context in which Ctrl-C always ends in a `KeyboardInterrupt`.

    A `KeyboardInterrupt` can get lost. Python drops exceptions in finalizers, of which TensorFlow
    has many. Keras drops some exceptions while it builds layers. Compiled code may turn an
    exception into another. So a thread raises the interrupt again and again until it leaves this
    context. It is not raised while an exception is handled, as something may clean up there.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # Ctrl-C is ignored, as in the background of a shell.
        return
    interrupted = False
    interrupts = queue.SimpleQueue()  # A signal may interrupt its `put` without harm.

    def interrupt(signum, frame):
        nonlocal interrupted
        cleans_up = interrupted and sys.exc_info()[0] is not None
        interrupted = True
        interrupts.put(signum)
        if not cleans_up and not _in_finalizer(frame):
            raise KeyboardInterrupt

    def again():
        while signum := interrupts.get():
            time.sleep(_PAUSE)
            _press(signum)

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
        if interrupted:
            raise KeyboardInterrupt
    except Exception as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        interrupts.put(None)
        thread.join()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_finalizer(frame):
    """Whether a frame belongs to a `__del__` or to a function that it called."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def _press(signum):
    """Sends a signal to the main thread, and wakes it if it waits."""
    main_thread = threading.main_thread().ident
    if main_thread is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main_thread, signum)
    else:
        signal.raise_signal(signum)


def _fail(message, status) -> NoReturn:
    """Prints one line on stderr and exits."""
    print(f"keras-bilinear: {message}", file=sys.stderr)
    sys.exit(status)
