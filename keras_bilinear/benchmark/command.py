"""`keras-bilinear benchmark`: times each layer in processes of its own, and writes tables."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import rich.table
from absl import flags

from keras_bilinear.benchmark.cases import CASES
from keras_bilinear.benchmark.choices import COLUMNS, MEMORY
from keras_bilinear.benchmark.report import Records, machine, markdown, tables
from keras_bilinear.cli.console import print_table, stdout
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.files import check_writable, staged
from keras_bilinear.messages import require


def main(argv: list[str]) -> None:
    """Runs the benchmark as the flags say.

    Args:
        argv: the name of the command; there are no positional arguments.

    Raises:
        CommandError: if there are positional arguments, if a backend is not installed, if a
            process fails, or if the output cannot be written.
    """
    if len(argv) > 1:
        raise CommandError(f"benchmark takes flags only, not {argv[1]!r}")
    suites, columns = flags.FLAGS.suite, flags.FLAGS.backend
    output = pathlib.Path(flags.FLAGS.output) if flags.FLAGS.output else None
    with command_errors(ImportError, OSError):
        require(*{COLUMNS[column][0] for column in columns})
        if output:
            check_writable(output.parent)
    console = stdout()
    records = {}
    for column in columns:
        with console.status(f"timing {', '.join(suites)} on {column}"):
            records[column] = [record for suite in suites for record in _run(column, suite)]
        if output:  # after each column, as a column takes long
            _write(output, suites, records)
    for explanation, rows in tables(records):
        if rows:
            table = rich.table.Table("layer", "call", *columns, caption=explanation)
            for row in rows:
                table.add_row(*row)
            print_table(table)


def _run(column: str, suite: str) -> list[dict[str, Any]]:
    """The records of one suite in one column."""
    if suite not in MEMORY:
        return _run_worker(column, suite)
    records = []
    for index, case in enumerate(CASES[MEMORY[suite]]):
        # Each layer in a process of its own, as freed memory may stay with its allocator.
        (full,), (bilinear,) = (
            _run_worker(column, MEMORY[suite], index, which) for which in (0, 1)
        )
        records.append({"case": str(case), "memory": [full, bilinear]})
    return records


def _run_worker(column: str, *arguments: str | int) -> list[Any]:
    """What a new worker process on the backend of a column prints.

    Raises:
        CommandError: if the process fails.
    """
    backend, xla, environment = COLUMNS[column]
    quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    worker = [sys.executable, "-m", "keras_bilinear.benchmark.worker", "xla" if xla else "no_xla"]
    process = subprocess.run(
        [*worker, *map(str, arguments)],
        env={**os.environ, **quiet, **environment},
        capture_output=True,
        text=True,
        process_group=0,  # Ctrl-C reaches this process only, which then ends the worker.
    )
    if process.returncode:
        print(process.stderr, file=sys.stderr)
        raise CommandError(f"the benchmark of {column} failed, see above")
    return [json.loads(line) for line in process.stdout.splitlines()]


def _write(output: pathlib.Path, suites: list[str], records: Records) -> None:
    """Writes the records as JSON and the tables as Markdown."""
    arguments = [f"--suite={suite}" for suite in suites]
    arguments += [f"--backend={column}" for column in records]
    command = " ".join(["keras-bilinear benchmark", *arguments])
    results = {"command": command, **machine(), "records": records}
    with command_errors(OSError), staged(output.parent) as folder:
        (folder / f"{output.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / f"{output.name}.md").write_text(markdown(records, command))
