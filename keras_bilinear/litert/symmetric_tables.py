"""Makes the 8-bit tables in a LiteRT file symmetric, so that their zero point is 0."""

import collections
from typing import Any

import numpy as np

from keras_bilinear.litert.contents import subgraphs

# Operations that hand on the numbers of a table.
_HAND_ON = ("GATHER", "RESHAPE")


def centre_tables(content: bytearray) -> None:
    """Makes the tables symmetric that are right operands of matrix products, in place.

    LiteRT's fast 8-bit matrix product needs a right operand whose zero point is 0. With any other
    zero point it takes five times as long. The converter gives the result of a look-up the range
    that the examples show. Here the table gets a symmetric range, at most twice as wide, and its
    numbers are rounded to the new steps. A table that another operation reads as well stays.

    Args:
        content: an all-integer LiteRT file.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(content, 0)
    for graph, operators in subgraphs(model):
        readers = collections.Counter(
            operator.Inputs(i) for _, operator in operators for i in range(operator.InputsLength())
        )
        holders = collections.Counter(
            graph.Tensors(i).Buffer() for i in range(graph.TensorsLength())
        )
        for chain in _right_operands(operators):
            tensors = [graph.Tensors(number) for number in chain]
            table = tensors[-1]
            alone = holders[table.Buffer()] == 1 and all(readers[number] == 1 for number in chain)
            buffer: Any = model.Buffers(table.Buffer())
            numbers = buffer.DataAsNumpy()  # 0 for a tensor that is no constant
            if alone and table.Type() == schema.TensorType.INT8 and np.size(numbers) > 1:
                _centre(numbers.view("int8"), tensors)


def _right_operands(operators):
    """For each matrix product, its right operand and the tensors that it comes from.

    Yields:
        Numbers of tensors, from the operand back to the tensor that no operation hands on.
    """
    makers = {
        operator.Outputs(i): (kind, operator)
        for kind, operator in operators
        for i in range(operator.OutputsLength())
    }
    for kind, operator in operators:
        if kind == "BATCH_MATMUL":
            chain = [operator.Inputs(1)]
            while chain[-1] in makers and makers[chain[-1]][0] in _HAND_ON:
                chain.append(makers[chain[-1]][1].Inputs(0))
            yield chain


def _centre(numbers, tensors):
    """Rounds the numbers of a table to a symmetric range, and gives `tensors` that range."""
    scale = tensors[-1].Quantization().ScaleAsNumpy()[0]
    zero = tensors[-1].Quantization().ZeroPointAsNumpy()[0]
    if not zero:
        return
    wider = scale * max(127 - zero, zero + 128) / 127
    numbers[:] = np.clip(np.round((numbers.astype("float64") - zero) * (scale / wider)), -127, 127)
    for tensor in tensors:
        tensor.Quantization().ScaleAsNumpy()[:] = wider
        tensor.Quantization().ZeroPointAsNumpy()[:] = 0
