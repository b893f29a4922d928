"""Writes files so that no reader ever sees an unfinished file."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator


def check_writable(folder: pathlib.Path) -> None:
    """Checks that files can be written into a folder, without making the folder.

    Args:
        folder: the folder, which need not exist.

    Raises:
        OSError: if `folder` cannot be written into. If it does not exist, the nearest
            existing path above it counts.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"cannot write into {str(folder)!r}: {existing} is no writable folder")


@contextlib.contextmanager
def staged(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A context with a temporary folder, whose files move into `folder` at its end.

    Each file moves in one step and replaces an older file of the same name. After an error
    or Ctrl-C no file moves. The temporary folder is removed in any case.

    Args:
        folder: where the files end up; it is made if it does not exist.

    Yields:
        The temporary folder.

    Raises:
        OSError: if `folder` or a file in it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as temporary:
            yield pathlib.Path(temporary)
            for file in sorted(pathlib.Path(temporary).iterdir()):
                os.replace(file, folder / file.name)
    except OSError as error:
        raise OSError(f"cannot write into {str(folder)!r}: {error}") from error
