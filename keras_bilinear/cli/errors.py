"""The errors of the command line, which the library itself does not know."""

import contextlib
from collections.abc import Iterator


class CommandError(Exception):
    """A mistake of the user or of the machine, said in one line; the command exits with 2."""


@contextlib.contextmanager
def command_errors(*types: type) -> Iterator[None]:
    """Turns errors of these types into errors of the command."""
    try:
        yield
    except types as error:
        raise CommandError(str(error)) from error
