"""What the package says when it cannot go on."""

import importlib.util
import re


def reason(error: BaseException | str) -> str:
    """What an error says, in one line, without what Keras puts before it."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))  # colours
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith("Exception encountered when calling")]
    return (own or lines or [type(error).__name__])[0]


def require(*modules: str, extra: str = "demo") -> None:
    """Checks that optional packages are installed, before any work is done.

    Args:
        modules: their modules.
        extra: the extra of this package that brings them.

    Raises:
        ImportError: if one of the modules cannot be found.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        command = f'pip install "keras-bilinear[{extra}]"'
        raise ImportError(f"needs {', '.join(missing)}: run `{command}`")
