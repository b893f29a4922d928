"""The command line: finds the command, parses its flags and turns errors into one line.

Keras, whose import takes seconds, is imported when a command runs. Help, and what is wrong with a
flag, are there at once.
"""

import contextlib
import importlib
import inspect
import logging as python_logging
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn

from absl import flags, logging

import keras_bilinear
from keras_bilinear.cli import command_flags
from keras_bilinear.cli.errors import CommandError
from keras_bilinear.version import __version__


class Command(NamedTuple):
    """A command.

    Attributes:
        define_flags: defines the flags; its docstring is the help of the command.
        module: the module, below this package, whose `main(argv)` reads `absl.flags.FLAGS`.
        summary: what the command does, in a line.
    """

    define_flags: Callable[[], None]
    module: str
    summary: str


COMMANDS = {
    "demo": Command(
        command_flags.demo,
        "demo.command",
        "train a full and a bilinear network the same way and compare them",
    ),
    "inspect": Command(
        command_flags.inspect, "cli.inspect", "show what a saved model costs, or two side by side"
    ),
    "plan": Command(
        command_flags.plan, "cli.plan", "show which layers of a saved model would become bilinear"
    ),
    "rewrite": Command(
        command_flags.rewrite, "cli.rewrite", "make a smaller model from a saved model"
    ),
    "expand": Command(
        command_flags.expand, "cli.expand", "make a model of stock layers from a rewritten model"
    ),
    "export": Command(
        command_flags.export, "cli.export", "write a saved model as a LiteRT file for phones"
    ),
    "tradeoff": Command(
        command_flags.tradeoff, "cli.tradeoff", "measure which LiteRT file of a model to ship"
    ),
    "benchmark": Command(
        command_flags.benchmark,
        "benchmark.command",
        "time bilinear layers beside the full layers",
    ),
}

INTERRUPTED = 130  # The exit status after Ctrl-C.
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
            sys.stdout.flush()
    except CommandError as error:
        _fail(" ".join(str(error).split()), status=2)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
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
    name, *rest = arguments
    if name in ("-h", "--help", "help"):
        print(usage())
        return
    if name == "--version":
        print(f"keras-bilinear {__version__}")
        return
    if name not in COMMANDS:
        raise CommandError(f"unknown command {name!r}, choose one of: {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    command.define_flags()
    if {"-h", "--help"} & set(rest):
        print(command_usage(name))
        return
    try:
        positional = flags.FLAGS([name, *rest])
    except flags.Error as error:
        raise CommandError(f"{error} (see keras-bilinear {name} --help)") from error
    chatty = logging.get_verbosity() > logging.WARNING or sys.stderr is None
    with contextlib.nullcontext() if chatty else _without_tensorflow_logs():
        importlib.reload(keras_bilinear)  # now with its public names, for modules of the user
        importlib.import_module(f"keras_bilinear.{command.module}").main(positional)


def usage() -> str:
    """The help of the program: one line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: keras-bilinear COMMAND [--flag=value ...]",
            "",
            *lines,
            "",
            "keras-bilinear COMMAND --help lists the flags of a command.",
            "keras-bilinear --version prints the version of the package.",
        ]
    )


def command_usage(name: str) -> str:
    """The help of a command: what it does, and its flags."""
    listed = flags.FLAGS.module_help(command_flags.__name__).partition(":\n")[2]
    return "\n".join(
        [
            f"usage: keras-bilinear {name} [--flag=value ...]",
            "",
            inspect.getdoc(COMMANDS[name].define_flags) or "",
            "",
            listed,
            "  --verbosity: 0 shows what TensorFlow logs as well, 1 shows more.",
            "    (default: '-1')",
        ]
    )


@contextlib.contextmanager
def _without_tensorflow_logs() -> Iterator[None]:
    """A context in which nothing but Python code writes to stderr.

    TensorFlow's C++ code writes lines that no setting keeps away. So what it takes for stderr,
    file descriptor 2, leads nowhere, and `sys.stderr` gets another descriptor.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # for other processes as well
    python_logging.getLogger("tensorflow").setLevel(python_logging.ERROR)
    before, descriptor = sys.stderr, os.dup(2)
    if before is sys.__stderr__:
        # It stays open, as a handler of log records may keep it.
        sys.stderr = os.fdopen(os.dup(2), "w", 1, encoding=before.encoding, errors="replace")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="tensorflow")
            yield
    finally:
        os.dup2(descriptor, 2)
        os.close(descriptor)
        sys.stderr = before


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A context in which Ctrl-C always ends in a `KeyboardInterrupt`.

    A `KeyboardInterrupt` can get lost. Python drops exceptions in finalizers, of which TensorFlow
    has many. Keras drops some exceptions while it builds layers. Compiled code may turn an
    exception into another. So a thread raises the interrupt again and again until it leaves this
    context. It is not raised while an exception is handled, as something may clean up there.
    """
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None):
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
        signal.signal(signal.SIGINT, before)


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
