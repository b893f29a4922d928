"""What a command says when it cannot go on."""

import importlib.util


class CommandError(Exception):
    """A mistake of the user or of the machine, said in one line; the command exits with 2."""


def require(*modules: str) -> None:
    """Checks that optional packages are installed, before any work is done.

    Raises:
        CommandError: if one of the modules cannot be found.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f'needs {", ".join(missing)}: run `pip install "keras-bilinear[demo]"`')
