"""What is in a LiteRT file, and what it takes to run it."""

import collections
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import rich.table

from keras_bilinear.tables import Tabular, bytes_text, right

_RUNNER = pathlib.Path(__file__).with_name("runner.py")


@dataclasses.dataclass(frozen=True)
class LiteRTReport(Tabular):
    """What a LiteRT file holds and takes. Made by `export_litert`.

    Attributes:
        path: the file.
        bytes: its size.
        ops: how many operations of each kind it has, in all its subgraphs.
        tensors: number of its tensors, constants included.
        arena_bytes: the most that intermediate values take at once, those of a
            loop's body added to those around it. What a delegate, such as
            XNNPACK, keeps for itself is not in it.
        memory_bytes: resident memory of a process that only loads and runs the
            file, at its peak; `None` where the system does not tell.
        latency_us: median microseconds of a run on one thread.
        difference: root mean square difference from the model's outputs,
            relative to their root mean square.
        tolerance: the largest difference that was allowed.
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

    def table(self) -> rich.table.Table:
        """A row for each property."""
        table = rich.table.Table("", *right("value"), title=os.path.basename(self.path))
        ops = ", ".join(f"{count} {name}" for name, count in self.ops.items())
        memory = "unknown" if self.memory_bytes is None else bytes_text(self.memory_bytes)
        for name, text in (
            ("size", bytes_text(self.bytes)),
            ("latency, one thread", f"{self.latency_us:,.0f} us"),
            ("memory of the process", memory),
            ("arena", bytes_text(self.arena_bytes)),
            ("tensors", f"{self.tensors:,}"),
            ("operations", ops),
            ("difference", f"{self.difference:.1e} (allowed: {self.tolerance:.1e})"),
        ):
            table.add_row(name, text)
        return table

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)


@dataclasses.dataclass(frozen=True)
class LiteRTRun:
    """What `run_litert` finds.

    Attributes:
        outputs: for each output its values, runs first.
        latency_us: median microseconds of a run.
        memory_bytes: resident memory of the process at its peak, and
        memory_before_bytes: before it read the file; `None` where the system
            does not tell.
    """

    outputs: dict[str, np.ndarray]
    latency_us: float
    memory_bytes: int | None
    memory_before_bytes: int | None


def run_litert(
    path: str | os.PathLike, inputs: dict[str, np.ndarray], threads: int = 1, seconds: float = 0.5
) -> LiteRTRun:
    """Runs a LiteRT file in a process of its own.

    Args:
        path: the file.
        inputs: for each of its inputs the values of some runs, an array whose
            first axis is that of the runs. Quantized inputs are given, and
            quantized outputs returned, as the numbers they stand for.
        threads: number of threads.
        seconds: for how long the run is repeated to find its latency.

    Raises:
        RuntimeError: if the file cannot be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, found = pathlib.Path(folder, "inputs.npz"), pathlib.Path(folder, "outputs.npz")
        # Any name, `file` as well, can be that of an input.
        np.savez(given, **{f"input:{name}": values for name, values in inputs.items()})
        command = [sys.executable, str(_RUNNER), *map(str, (path, given, found, threads, seconds))]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise RuntimeError(f"LiteRT cannot run {os.path.basename(path)!r}: {reason}")
        with np.load(found) as arrays:
            results = dict(arrays)
    prefix = "output:"
    return LiteRTRun(
        outputs={
            name.removeprefix(prefix): values
            for name, values in results.items()
            if name.startswith(prefix)
        },
        latency_us=1e6 * float(results["latency"]),
        memory_bytes=int(results["memory"]) or None,
        memory_before_bytes=int(results["memory_before"]) or None,
    )


def inspect_litert(path: str | os.PathLike) -> dict:
    """`bytes`, `ops`, `tensors` and `arena_bytes` of a LiteRT file, see `LiteRTReport`."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(pathlib.Path(path).read_bytes(), 0)
    ops, tensors, arena = collections.Counter(), 0, 0
    for graph, operators in subgraphs(model):
        ops.update(kind for kind, _ in operators)
        tensors += graph.TensorsLength()
        arena += _peak_bytes(model, graph, schema.TensorType)
    return {
        "bytes": os.path.getsize(path),
        "ops": dict(ops.most_common()),
        "tensors": tensors,
        "arena_bytes": arena,
    }


def subgraphs(model) -> Iterator[tuple]:
    """The subgraphs of a LiteRT model, each with its operators, `(kind, operator)`.

    Args:
        model: a `Model` of LiteRT's schema.
    """
    from ai_edge_litert import schema_py_generated as schema

    names = {
        code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)
    }
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    # Codes beyond 127 stand in a newer field.
    kinds = [names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())] for code in codes]
    for index in range(model.SubgraphsLength()):
        graph = model.Subgraphs(index)
        operators = [graph.Operators(i) for i in range(graph.OperatorsLength())]
        yield graph, [(kinds[one.OpcodeIndex()], one) for one in operators]


def _peak_bytes(model, graph, types):
    """The most bytes of a graph's values that are needed at the same time."""
    size_of = {types.INT8: 1, types.UINT8: 1, types.BOOL: 1, types.FLOAT16: 2, types.INT16: 2}
    size_of |= {types.INT64: 8, types.FLOAT64: 8, types.COMPLEX64: 8}

    def size(number):
        tensor = graph.Tensors(number)
        if model.Buffers(tensor.Buffer()).DataLength():  # a constant
            return 0
        shape = tensor.ShapeAsNumpy() if tensor.ShapeLength() else ()
        return int(math.prod(map(int, shape))) * size_of.get(tensor.Type(), 4)

    count = graph.OperatorsLength()
    begin, end = {}, {}
    for number in map(int, _numbers(graph, "Inputs")):
        begin[number] = end[number] = -1
    for step in range(count):
        operator = graph.Operators(step)
        for number in map(int, _numbers(operator, "Outputs")):
            begin[number] = end[number] = step
        for number in map(int, _numbers(operator, "Inputs")):
            if number in begin:
                end[number] = step
    end |= {int(number): count for number in _numbers(graph, "Outputs") if int(number) in begin}
    changes = collections.Counter()
    for number, first in begin.items():
        changes[first] += size(number)
        changes[end[number] + 1] -= size(number)
    peak = now = 0
    for step in sorted(changes):
        now += changes[step]
        peak = max(peak, now)
    return peak


def _numbers(table, name):
    return getattr(table, f"{name}AsNumpy")() if getattr(table, f"{name}Length")() else ()
