"""Speed of the bilinear layers beside the full ones, and beside what the hardware allows.

Each backend runs in a process of its own, one after the other. There every full
layer and its bilinear counterpart take turns, so that a machine whose speed
drifts slows both down; the figures are medians, to be read as ratios. The
floor is what no implementation of the same mathematics can beat on this
machine: the larger of the MACs over the measured matmul rate and the bytes that
must move over the measured copy rate.
"""

import json
import os
import pathlib
import platform
import subprocess
import sys

import rich.console
import rich.table
from absl import flags

from keras_bilinear.benchmark.cases import CASES
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.files import check_writable, staged
from keras_bilinear.messages import require

# Column: the Keras backend, whether it compiles with XLA, and more environment.
# TensorFlow takes Intel's oneDNN library by itself on some CPUs only; "tensorflow" is without it.
COLUMNS = {
    "tensorflow": ("tensorflow", False, {"TF_ENABLE_ONEDNN_OPTS": "0"}),
    "onednn": ("tensorflow", False, {"TF_ENABLE_ONEDNN_OPTS": "1"}),
    "xla": ("tensorflow", True, {}),
    "jax": ("jax", True, {}),
    "torch": ("torch", False, {}),
}

# Suites that measure memory, and those whose layers they take.
MEMORY = {f"{suite}_memory": suite for suite in ("conv", "recurrent")}


def _run(column, suite):
    """Records of one suite and column."""
    if suite not in MEMORY:
        return _run_worker(column, suite)
    records = []
    for index, case in enumerate(CASES[MEMORY[suite]]):
        # Each layer in a process of its own: memory that was freed may stay with its allocator.
        (full,), (bilinear,) = (
            _run_worker(column, MEMORY[suite], index, which) for which in (0, 1)
        )
        records.append({"case": str(case), "memory": [full, bilinear]})
    return records


def _run_worker(column, *arguments):
    """What a fresh process on the backend of a column prints."""
    backend, xla, environment = COLUMNS[column]
    quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    worker = [sys.executable, "-m", "keras_bilinear.benchmark.worker", "xla" if xla else "no_xla"]
    process = subprocess.run(
        [*worker, *map(str, arguments)],
        env={**os.environ, **quiet, **environment},
        stdout=subprocess.PIPE,
    )
    if process.returncode:
        raise CommandError(f"the benchmark of {column} failed, see above")
    return [json.loads(line) for line in process.stdout.splitlines()]


def machine():
    """The kind of this machine and the versions that were measured."""
    from importlib import metadata

    packages = ("keras", "tensorflow", "jax", "torch", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def _tables(records):
    """Pairs of an explanation and the rows of its table, from `{column: records}`."""
    return (
        (
            "Each cell: how many times as fast as the full layer (milliseconds of the full layer / "
            "of the bilinear one / floor of the hardware for the bilinear one). float32, medians; "
            "read the ratios, as the machine is shared.",
            list(_speed_rows(records)),
        ),
        (
            "How many times as fast as the algorithm that extracts patches (its milliseconds).",
            list(_patches_rows(records)),
        ),
        (
            "Memory of a training step beyond weights, optimizer and data: megabytes of the full "
            "layer / of the bilinear one.",
            list(_memory_rows(records)),
        ),
    )


def _speed_rows(records):
    for case, by_column in _by_case(records, "forward").items():
        for call, label in (("forward", "forward"), ("step", "training step")):
            cells = [case, label]
            for record in by_column.values():
                full, bilinear, *_ = record[call]
                floor = record[f"{call}_floor"][1]
                cells.append(
                    f"{full / bilinear:.2f}x ({full * 1e3:.2f} / {bilinear * 1e3:.2f} / "
                    f"{floor * 1e3:.3f})"
                )
            yield cells


def _patches_rows(records):
    for case, by_column in _by_case(records, "forward").items():
        for call, label in (("forward", "forward"), ("step", "training step")):
            times = [record[call] for record in by_column.values()]
            if len(times[0]) > 2:
                cells = (
                    f"{patches / ours:.1f}x ({patches * 1e3:.2f})" for _, ours, patches in times
                )
                yield [case, label, *cells]


def _memory_rows(records):
    for case, by_column in _by_case(records, "memory").items():
        cells = (
            f"{full / 1e6:.0f} / {bilinear / 1e6:.0f}"
            for full, bilinear in (record["memory"] for record in by_column.values())
        )
        yield [case, "training step", *cells]


def _by_case(records, measured):
    """`{case: {column: record}}` of the records where something was measured."""
    cases = {}
    for column, of_column in records.items():
        for record in of_column:
            if measured in record:
                cases.setdefault(record["case"], {})[column] = record
    return cases


def _markdown(records, command):
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    lines = ["# Speed of bilinear layers", "", f"`{command}`; {facts}.", ""]
    for explanation, rows in _tables(records):
        if rows:
            header = ["layer", "call", *records]
            lines += [explanation, ""]
            lines += [
                "| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)
            ]
            lines.append("")
    for column, of_column in records.items():
        for record in of_column:
            if "rates" in record:
                matmul, copy = record["rates"]["macs"] / 1e9, record["rates"]["bytes"] / 1e9
                lines.append(f"- {column}: {matmul:.1f} GMAC/s matmul, {copy:.1f} GB/s copy.")
            if "peak" in record:
                lines.append(
                    f"- {column}: {record['case']} ({record['parameters']:,} parameters): training "
                    f"step {record['step'] * 1e3:.1f} ms, peak memory of the process "
                    f"{record['peak'] / 1e6:,.0f} MB."
                )
    return "\n".join(lines) + "\n"


def define_flags() -> None:
    """Defines the flags of `keras-bilinear benchmark`."""
    suites = [*CASES, "huge", *MEMORY]
    flags.DEFINE_multi_enum(
        "suite",
        suites,
        suites,
        "Layers to time; may be repeated. huge: the peak memory of a vocabulary of 10^9; "
        "those of memory: what a training step of each layer takes.",
    )
    flags.DEFINE_multi_enum(
        "backend",
        ["tensorflow"],
        list(COLUMNS),
        "Backends to time, each in a process of its own; may be repeated.",
    )
    flags.DEFINE_string("output", None, "Write PATH.json and PATH.md as well.")


def main(argv: list[str]) -> None:
    """Runs the benchmark with the flags as they are.

    Raises:
        CommandError: if there are arguments that are no flags, a backend is not
            installed or the output cannot be written.
    """
    if len(argv) > 1:
        raise CommandError(f"benchmark takes flags only, not {argv[1]!r}")
    suites, columns = flags.FLAGS.suite, flags.FLAGS.backend
    output = pathlib.Path(flags.FLAGS.output) if flags.FLAGS.output else None
    with command_errors(ImportError, OSError):
        require(*{COLUMNS[column][0] for column in columns})
        if output:
            check_writable(output.parent)
    console = rich.console.Console()
    records = {}
    for column in columns:
        with console.status(f"timing {', '.join(suites)} on {column}"):
            records[column] = [record for suite in suites for record in _run(column, suite)]
        if output:  # after each column, as they take long
            _write(output, suites, records)
    for explanation, rows in _tables(records):
        if rows:
            table = rich.table.Table("layer", "call", *columns, caption=explanation)
            for row in rows:
                table.add_row(*row)
            console.print(table)


def _write(output, suites, records):
    arguments = [f"--suite={suite}" for suite in suites]
    arguments += [f"--backend={column}" for column in records]
    command = " ".join(["keras-bilinear benchmark", *arguments])
    results = {"command": command, **machine(), "records": records}
    with command_errors(OSError), staged(output.parent) as folder:
        (folder / f"{output.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / f"{output.name}.md").write_text(_markdown(records, command))
