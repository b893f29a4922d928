"""The errors of the command line, which the library itself does not know."""

import contextlib
from collections.abc import Iterator


class CommandError(Exception):
    """A mistake of the user or of the machine. The command line prints it and exits with 2."""


@contextlib.contextmanager
def command_errors(*types: type[Exception]) -> Iterator[None]:
    """A context that turns errors of these types into a `CommandError` with the same text."""
    try:
        yield
    except types as error:
        raise CommandError(str(error)) from error
