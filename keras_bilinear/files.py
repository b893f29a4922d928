"""Writing files so that nobody ever sees half of one."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator


def check_writable(folder: pathlib.Path) -> None:
    """Checks that files can be written into a folder, without making it yet.

    Raises:
        OSError: if it, or the nearest folder above it that exists, is no
            folder or not writable.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"cannot write into {str(folder)!r}: {existing} is no writable folder")


@contextlib.contextmanager
def staged(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary folder; its files move into `folder` if all goes well.

    Each file is moved in one step and takes the place of an older one of its
    name. After an error or Ctrl-C, nothing is left of the temporary folder.

    Raises:
        OSError: if the folder or a file in it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as temporary:
            yield pathlib.Path(temporary)
            for file in sorted(pathlib.Path(temporary).iterdir()):
                os.replace(file, folder / file.name)
    except OSError as error:
        raise OSError(f"cannot write into {str(folder)!r}: {error}") from error
