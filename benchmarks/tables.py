"""Results as rows and tables: their folder, their files, and the machine behind them."""

import csv
import pathlib
import platform

from keras_bilinear.files import staged

RESULTS = pathlib.Path(__file__).parent / "results"


def machine(backend=None):
    """The kind of this machine and the versions; `None` as backend stands for that of Keras."""
    import keras

    versions = f"Python {platform.python_version()}, Keras {keras.__version__}"
    return f"{versions}, {backend or keras.config.backend()} backend, {platform.machine()} CPU"


def milliseconds(seconds):
    """A cell of several times, in milliseconds."""
    return " / ".join(f"{1e3 * value:.1f}" for value in seconds)


def write_lines(name, lines):
    """Writes a text into a file in the folder of results."""
    with staged(RESULTS) as folder:
        (folder / name).write_text("\n".join(lines) + "\n")


def read_rows(path):
    """The rows of a file, as dictionaries of texts; empty if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def write_rows(path, rows):
    with staged(path.parent) as folder, (folder / path.name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1])
        writer.writeheader()
        writer.writerows(rows)
