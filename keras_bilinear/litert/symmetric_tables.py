"""Eight-bit tables whose zero is a zero, in a LiteRT file that is written already."""

import collections

import numpy as np

from keras_bilinear.litert.report import subgraphs

_PASSED_ON = ("GATHER", "RESHAPE")


def centre_tables(content: bytearray) -> None:
    """Centres the tables that are right operands of products of matrices, in place.

    LiteRT's fast product of matrices in eight bits takes a right operand whose zero
    point is 0, and any other one goes a way that is five times as slow. The
    converter gives a look-up in a table what range the examples show. Here the
    table gets a symmetric one, of at most twice the width, and its numbers are
    rounded to it. One that something else reads as well stays as it is.

    Args:
        content: an all-integer LiteRT file.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(content, 0)
    for graph, operators in subgraphs(model):
        makers = {
            one.Outputs(i): (kind, one)
            for kind, one in operators
            for i in range(one.OutputsLength())
        }
        readers = collections.Counter(
            one.Inputs(i) for _, one in operators for i in range(one.InputsLength())
        )
        holders = collections.Counter(
            graph.Tensors(i).Buffer() for i in range(graph.TensorsLength())
        )
        for kind, operator in operators:
            if kind != "BATCH_MATMUL":
                continue
            chain = [operator.Inputs(1)]
            while chain[-1] in makers and makers[chain[-1]][0] in _PASSED_ON:
                chain.append(makers[chain[-1]][1].Inputs(0))
            tensors = [graph.Tensors(number) for number in chain]
            table = tensors[-1]
            alone = holders[table.Buffer()] == 1 and all(readers[number] == 1 for number in chain)
            numbers = model.Buffers(table.Buffer()).DataAsNumpy()
            if alone and table.Type() == schema.TensorType.INT8 and np.size(numbers) > 1:
                _centre(numbers.view("int8"), tensors)


def _centre(numbers, tensors):
    """Rounds the numbers of a table to a symmetric range, which those that hand them on get too."""
    scale = tensors[-1].Quantization().ScaleAsNumpy()[0]
    zero = tensors[-1].Quantization().ZeroPointAsNumpy()[0]
    if not zero:
        return
    wider = scale * max(127 - zero, zero + 128) / 127
    numbers[:] = np.clip(np.round((numbers.astype("float64") - zero) * (scale / wider)), -127, 127)
    for tensor in tensors:
        tensor.Quantization().ScaleAsNumpy()[:] = wider
        tensor.Quantization().ZeroPointAsNumpy()[:] = 0
