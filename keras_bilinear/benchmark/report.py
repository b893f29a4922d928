"""The results of the benchmark as tables and as Markdown."""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

# What one column of the tables shows: the records of its worker process, in order.
Records = Mapping[str, Sequence[dict[str, Any]]]


def machine() -> dict[str, str]:
    """The kind of this machine and the versions of the packages that were measured."""
    versions = {}
    for package in ("keras", "tensorflow", "jax", "torch", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def tables(records: Records) -> list[tuple[str, list[list[str]]]]:
    """The results as tables.

    Args:
        records: for each column its records, as the functions of `worker` return them.

    Returns:
        For each table, an explanation and its rows. The cells of a row are the layer, the call,
        and one cell for each column. A table without rows shows something that was not measured.
    """
    return [
        (
            "Each cell: how many times as fast as the full layer (milliseconds of the full layer / "
            "of the bilinear layer / floor of the hardware for the bilinear layer). float32, "
            "medians; read the ratios, as the machine is shared.",
            list(_speed_rows(records)),
        ),
        (
            "How many times as fast as the algorithm that extracts patches (its milliseconds).",
            list(_patches_rows(records)),
        ),
        (
            "Memory of a training step beyond weights, optimizer and data: megabytes of the full "
            "layer / of the bilinear layer.",
            list(_memory_rows(records)),
        ),
    ]


def _speed_rows(records) -> Iterator[list[str]]:
    for case, by_column in _by_case(records, "forward").items():
        for call, label in _CALLS:
            cells = [case, label]
            for record in by_column.values():
                full, bilinear, *_ = record[call]
                floor = record[f"{call}_floor"][1]
                cells.append(
                    f"{full / bilinear:.2f}x ({full * 1e3:.2f} / {bilinear * 1e3:.2f} / "
                    f"{floor * 1e3:.3f})"
                )
            yield cells


def _patches_rows(records) -> Iterator[list[str]]:
    for case, by_column in _by_case(records, "forward").items():
        for call, label in _CALLS:
            times = [record[call] for record in by_column.values()]
            if len(times[0]) > 2:
                cells = (
                    f"{patches / bilinear:.1f}x ({patches * 1e3:.2f})"
                    for _, bilinear, patches in times
                )
                yield [case, label, *cells]


def _memory_rows(records) -> Iterator[list[str]]:
    for case, by_column in _by_case(records, "memory").items():
        cells = (
            f"{full / 1e6:.0f} / {bilinear / 1e6:.0f}"
            for full, bilinear in (record["memory"] for record in by_column.values())
        )
        yield [case, "training step", *cells]


# For each call, its name in a record and in a table.
_CALLS = (("forward", "forward"), ("step", "training step"))


def _by_case(records, measured):
    """`{case: {column: record}}` of the records that have the key `measured`."""
    cases = {}
    for column, of_column in records.items():
        for record in of_column:
            if measured in record:
                cases.setdefault(record["case"], {})[column] = record
    return cases


def markdown(records: Records, command: str) -> str:
    """The results as a page of Markdown.

    Args:
        records: for each column its records, as the functions of `worker` return them.
        command: the command that gave the records.
    """
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    lines = ["# Speed of bilinear layers", "", f"`{command}`; {facts}.", ""]
    for explanation, rows in tables(records):
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
