"""Measures how long the notebooks of `tutorials/` take in full mode, or stores their outputs.

    python benchmarks/tutorials.py --data_dir=DIR
    python benchmarks/tutorials.py --data_dir=DIR --store

Executes each notebook from top to bottom, on data sets that TensorFlow Datasets has prepared in the
folder. The seconds of a notebook become a row of `benchmarks/results/tutorials.md`, which replaces
an older row. With `--store` the outputs are stored in the notebook instead, without what libraries
write to the standard error, which names folders of the machine.
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
STORE = flags.DEFINE_bool("store", False, "store the outputs in the notebooks, and no seconds")
TUTORIALS = flags.DEFINE_multi_enum("tutorial", NAMES, NAMES, "notebooks to execute")


def execute(name):
    """Executes a notebook: the notebook with its outputs, and the seconds that it took.

    The seconds include the start of the kernel.
    """
    import jupytext
    import nbclient

    notebook = jupytext.read(FOLDER / f"{name}.ipynb")
    with tempfile.TemporaryDirectory() as scratch:
        client = nbclient.NotebookClient(
            notebook,
            kernel_name="python3",
            resources={"metadata": {"path": scratch}},
            coalesce_streams=True,  # of a progress bar, the last state
            record_timing=False,
        )
        start = time.perf_counter()
        client.execute()
        return notebook, time.perf_counter() - start


def store(name, notebook):
    """Writes a notebook with its outputs."""
    import nbformat

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")


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
        notebook, seconds = execute(name)
        print(name, round(seconds), flush=True)
        if STORE.value:
            store(name, notebook)
            continue
        rows[name] = {"tutorial": name, "seconds": round(seconds)}
        finished = [rows[name] for name in NAMES if name in rows]
        tables.write_rows(path, finished)
        tables.write_lines("tutorials.md", table(finished))


if __name__ == "__main__":
    app.run(main)
