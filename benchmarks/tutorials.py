"""Measures how long the notebooks of `tutorials/` take in full mode.

    python benchmarks/tutorials.py --data_dir=DIR

Executes each notebook from top to bottom, except for the cell that installs packages, on data sets
that TensorFlow Datasets has prepared in the folder. The seconds of a notebook become a row of
`benchmarks/results/tutorials.md`, which replaces an older row.
"""

import os
import pathlib
import tempfile
import time

import tables
from absl import app, flags

FOLDER = pathlib.Path(__file__).parents[1] / "tutorials"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))

DATA_DIR = flags.DEFINE_string("data_dir", None, "folder of TensorFlow Datasets", required=True)
TUTORIALS = flags.DEFINE_multi_enum("tutorial", NAMES, NAMES, "notebooks to execute")


def seconds(name):
    """The seconds that a notebook takes, with the start of its kernel."""
    import jupytext
    import nbclient

    notebook = jupytext.read(FOLDER / f"{name}.ipynb")
    with tempfile.TemporaryDirectory() as scratch:
        client = nbclient.NotebookClient(
            notebook, kernel_name="python3", resources={"metadata": {"path": scratch}}
        )
        start = time.perf_counter()
        client.execute()
        return time.perf_counter() - start


def table(rows):
    return [
        "# Tutorials",
        "",
        f"`python benchmarks/tutorials.py --data_dir=DIR`; {tables.machine()}, "
        f"{os.cpu_count()} cores, no GPU. Full mode, the data sets prepared before.",
        "",
        "| notebook | seconds |",
        "|---|---|",
        *("| {tutorial} | {seconds} |".format_map(row) for row in rows),
    ]


def main(argv):
    del argv
    os.environ["TFDS_DATA_DIR"] = str(pathlib.Path(DATA_DIR.value).resolve())
    path = tables.RESULTS / "tutorials.csv"
    rows = {row["tutorial"]: row for row in tables.read_rows(path)}
    for name in TUTORIALS.value:
        rows[name] = {"tutorial": name, "seconds": round(seconds(name))}
        print(rows[name], flush=True)
        finished = [rows[name] for name in NAMES if name in rows]
        tables.write_rows(path, finished)
        tables.write_lines("tutorials.md", table(finished))


if __name__ == "__main__":
    app.run(main)
