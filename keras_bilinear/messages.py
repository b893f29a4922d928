"""Texts of errors, and checks that raise errors: of missing packages and of choices."""

import importlib.util
import re


def reason(error: BaseException | str) -> str:
    """The text of an error in one line, without colours and without Keras' headings."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))  # colours
    # Each part of a model that cannot be loaded adds a heading, and its configuration.
    text = text.rpartition("\nException encountered: ")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    heading = "Exception encountered when calling"
    without_heading = [line for line in lines if not line.startswith(heading)]
    return (without_heading or lines or [type(error).__name__])[0]


def require(*modules: str, extra: str = "demo") -> None:
    """Checks that optional packages are installed, without importing them.

    Args:
        modules: names of the modules that the packages provide.
        extra: the extra of `keras-bilinear` that installs the packages.

    Raises:
        ImportError: if a module cannot be found.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        command = f'pip install "keras-bilinear[{extra}]"'
        raise ImportError(f"needs {', '.join(missing)}: run `{command}`")


def check_choice(name: str, value, choices: tuple) -> None:
    """Checks that an argument is one of a few values.

    Raises:
        ValueError: if it is not.
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}. Received: {name}={value!r}")
