"""The report on a LiteRT file."""

import dataclasses
import json
import os

import rich.table

from keras_bilinear.tables import Tabular, bytes_text, right


@dataclasses.dataclass(frozen=True)
class LiteRTReport(Tabular):
    """What a LiteRT file holds and what it takes to run it. Made by `export_litert`.

    `print` shows it as a table, as does the last line of a notebook's cell.

    Attributes:
        path: path of the file.
        bytes: size of the file in bytes.
        ops: how many operations of each kind all subgraphs of the file have, the most frequent
            kind first, such as `{"FULLY_CONNECTED": 2}`.
        tensors: number of tensors in the file, constants included.
        arena_bytes: the most bytes that inputs, outputs and intermediate values take at the same
            time. The values in the body of a loop are added to those around the loop. The memory
            that a delegate, such as XNNPACK, keeps for itself is not included.
        memory_bytes: the most bytes of resident memory of a process that only loads and runs the
            file. `None` where the system does not tell.
        latency_us: median microseconds of a run on one thread.
        difference: how far the outputs of the file are from the outputs of the model, over all
            examples: the root mean square of the norm of an output's difference, divided by the
            root mean square of the output's norm, or by 0.01 if that is larger. The largest of
            all outputs.
        tolerance: the largest difference that `export_litert` allowed.
        agreement: share of the answers, from 0 to 1, in which the largest number along the last
            axis of an output is at the same place as in the model's: the predicted class of a
            classifier. The least of all outputs. `None` if each output has a single number.
    """

    path: str
    bytes: int
    ops: dict[str, int]
    tensors: int
    arena_bytes: int
    memory_bytes: int | None
    latency_us: float
    difference: float
    tolerance: float
    agreement: float | None = None

    def table(self) -> rich.table.Table:
        """A `rich.table.Table` with a row for each property."""
        table = rich.table.Table("", *right("value"), title=os.path.basename(self.path))
        ops = ", ".join(f"{count} {name}" for name, count in self.ops.items())
        agreement = "" if self.agreement is None else f"{self.agreement:.2%}"
        memory = "unknown" if self.memory_bytes is None else bytes_text(self.memory_bytes)
        for name, text in (
            ("size", bytes_text(self.bytes)),
            ("latency, one thread", f"{self.latency_us:,.0f} µs"),
            ("memory of the process", memory),
            ("arena", bytes_text(self.arena_bytes)),
            ("tensors", f"{self.tensors:,}"),
            ("operations", ops),
            ("difference", f"{self.difference:.1e} (allowed: {self.tolerance:.1e})"),
            ("same largest output", agreement),
        ):
            if text:
                table.add_row(name, text)
        return table

    def to_json(self) -> str:
        """All attributes as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)
