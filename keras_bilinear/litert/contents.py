"""What is in a LiteRT file: operations, tensors, and the memory that they need."""

import collections
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any


def inspect_litert(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what a LiteRT file holds, without running it.

    Args:
        path: the file.

    Returns:
        The attributes `bytes`, `ops`, `tensors` and `arena_bytes` of a `LiteRTReport`.
    """
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


def subgraphs(model: Any) -> Iterator[tuple[Any, list[tuple[str, Any]]]]:
    """The subgraphs of a LiteRT model, each with its operators.

    Args:
        model: a `Model` of LiteRT's schema.

    Yields:
        `(subgraph, operators)`. `operators` is a list of `(kind, operator)`, where `kind` is a
        name such as `"FULLY_CONNECTED"`.
    """
    from ai_edge_litert import schema_py_generated as schema

    names = {
        code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)
    }
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    # Codes above 127 are in a newer field.
    kinds = [names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())] for code in codes]
    for index in range(model.SubgraphsLength()):
        graph = model.Subgraphs(index)
        operators = [graph.Operators(i) for i in range(graph.OperatorsLength())]
        yield graph, [(kinds[operator.OpcodeIndex()], operator) for operator in operators]


def _peak_bytes(model, graph, types):
    """The most bytes of a subgraph's values that are needed at the same time."""
    count = graph.OperatorsLength()
    # The first and the last step at which each value, by its number, is needed.
    begin, end = {}, {}
    for number in _numbers(graph, "Inputs"):
        begin[number] = end[number] = -1
    for step in range(count):
        operator = graph.Operators(step)
        for number in _numbers(operator, "Outputs"):
            begin[number] = end[number] = step
        for number in _numbers(operator, "Inputs"):
            if number in begin:
                end[number] = step
    end |= {number: count for number in _numbers(graph, "Outputs") if number in begin}
    changes = collections.Counter()
    for number, first in begin.items():
        size = _value_bytes(model, graph.Tensors(number), types)
        changes[first] += size
        changes[end[number] + 1] -= size
    peak = now = 0
    for step in sorted(changes):
        now += changes[step]
        peak = max(peak, now)
    return peak


def _value_bytes(model, tensor, types):
    """Bytes of a tensor; 0 for a constant, which the file holds."""
    if model.Buffers(tensor.Buffer()).DataLength():
        return 0
    size_of = {types.INT8: 1, types.UINT8: 1, types.BOOL: 1, types.FLOAT16: 2, types.INT16: 2}
    size_of |= {types.INT64: 8, types.FLOAT64: 8, types.COMPLEX64: 8}
    shape = tensor.ShapeAsNumpy() if tensor.ShapeLength() else ()
    return int(math.prod(map(int, shape))) * size_of.get(tensor.Type(), 4)


def _numbers(table, name) -> list[int]:
    """The numbers of the tensors in a field of a subgraph or an operator."""
    if not getattr(table, f"{name}Length")():
        return []
    return [int(number) for number in getattr(table, f"{name}AsNumpy")()]
