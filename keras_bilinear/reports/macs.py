"""How many operations the call of a layer takes, and how many numbers lie between its factors."""

import math
from collections.abc import Callable

import keras

from keras_bilinear import layers
from keras_bilinear.kronecker import cost
from keras_bilinear.rewriting.sites import look_up


def count_call(layer: keras.Layer, inputs: tuple, outputs: tuple) -> int | None:
    """Multiply-accumulate operations of the projections of a layer.

    Args:
        layer: a built layer.
        inputs: shape of the inputs of the call.
        outputs: shape of its outputs.

    Returns:
        Their number; `None` if it is not known how to count them.
    """
    count = _counter(layer)
    if count is not None:
        return count(layer, inputs, outputs)
    # Weights without a second axis scale and shift, and project nothing.
    projects = any(len(variable.shape) > 1 for variable in layer.weights)
    return None if projects else 0


def count_workspace(layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
    """Numbers between the inputs and the outputs of a call: those between both factors.

    Those of a materialized kernel are its own. Inside a recurrent layer, whose
    time steps need little one after the other, only these count.
    """
    if isinstance(layer, _RECURRENT):
        kernels = layer.cell._kernel, layer.cell._recurrent_kernel
        return sum(one.factorization.full_parameters for one in kernels if one.materialized)
    if not isinstance(layer, (*_CONVOLUTIONS, layers.BilinearDense, layers.BilinearEinsumDense)):
        return 0
    kernel = layer._kernel
    if kernel.materialized:
        return kernel.factorization.full_parameters
    if isinstance(layer, _CONVOLUTIONS):
        between = cost.count_between(kernel.factorization, kernel.order, layer.strides)
        return _positions(layer, outputs) * between
    rows = math.prod(inputs) // kernel.factorization.input_dim
    return rows * kernel.factorization.between(kernel.order)


_RECURRENT = (layers.BilinearSimpleRNN, layers.BilinearGRU, layers.BilinearLSTM)
_CELLS = (layers.BilinearSimpleRNNCell, layers.BilinearGRUCell, layers.BilinearLSTMCell)
_CONVOLUTIONS = (layers.BilinearConv1D, layers.BilinearConv2D, layers.BilinearConv3D)


def _counter(layer) -> Callable | None:
    # A subclass may do something else.
    return look_up(type(layer), _COUNTERS)


def _positions(layer, shape):
    """Examples times positions of the images of a convolution."""
    axis = -1 if layer.data_format == "channels_last" else 1
    return math.prod(shape) // shape[axis]


def _dense(layer, inputs, outputs):
    return math.prod(inputs) * layer.units


def _projection(layer, inputs, outputs):
    factorization = layer.factorization
    macs = factorization.full_macs if layer._kernel.materialized else factorization.macs
    return math.prod(inputs) // factorization.input_dim * macs


def _einsum(layer, inputs, outputs):
    _, kernel = layer.equation.split("->")[0].split(",")
    result = layer.equation.split("->")[1]
    pairs = zip(kernel, layer.kernel.shape, strict=True)
    return math.prod(outputs) * math.prod(size for label, size in pairs if label not in result)


def _bilinear_einsum(layer, inputs, outputs):
    factorization = layer.factorization
    macs = factorization.full_macs if layer._kernel.materialized else factorization.macs
    return math.prod(outputs) // factorization.output_dim * macs


def _embedding(layer, inputs, outputs):
    in_reverse = len(inputs) == len(outputs)
    return math.prod(inputs) * layer.input_dim if in_reverse else 0


def _bilinear_embedding(layer, inputs, outputs):
    factorization = layer.factorization
    if len(inputs) == len(outputs):  # in reverse
        return math.prod(inputs) // factorization.output_dim * factorization.transposed.macs
    return math.prod(inputs) * factorization.rank * factorization.padded_output_dim


def _conv(layer, inputs, outputs):
    return _positions(layer, outputs) * math.prod(layer.kernel.shape)


def _transposed_conv(layer, inputs, outputs):
    return _positions(layer, inputs) * math.prod(layer.kernel.shape)


def _separable_conv(layer, inputs, outputs):
    kernels = layer.depthwise_kernel, layer.pointwise_kernel
    return _positions(layer, outputs) * sum(math.prod(kernel.shape) for kernel in kernels)


def _bilinear_conv(layer, inputs, outputs):
    kernel = layer._kernel
    macs = cost.count_macs(kernel.factorization, kernel.order, layer.strides)
    return _positions(layer, outputs) * macs


def _cell(cell, inputs, outputs):
    kernels = cell.kernel.shape, cell.recurrent_kernel.shape
    return inputs[0] * sum(map(math.prod, kernels))


def _bilinear_cell(cell, inputs, outputs):
    plans = cell.factorization, cell.recurrent_factorization
    return inputs[0] * sum(
        plan.full_macs if kernel.materialized else plan.macs
        for plan, kernel in zip(plans, (cell._kernel, cell._recurrent_kernel), strict=True)
    )


def _recurrent(layer, inputs, outputs):
    return inputs[1] * _counter(layer.cell)(layer.cell, inputs, outputs)


_COUNTERS = {
    keras.layers.Dense: _dense,
    keras.layers.EinsumDense: _einsum,
    keras.layers.Embedding: _embedding,
    keras.layers.ReversibleEmbedding: _embedding,
    layers.BilinearDense: _projection,
    layers.BilinearEinsumDense: _bilinear_einsum,
    layers.BilinearEmbedding: _bilinear_embedding,
    layers.BilinearReversibleEmbedding: _bilinear_embedding,
    **{
        getattr(keras.layers, f"{kind}{dimensions}D{suffix}"): count
        for kind, suffix, count, most in (
            ("Conv", "", _conv, 3),
            ("DepthwiseConv", "", _conv, 2),
            ("SeparableConv", "", _separable_conv, 2),
            ("Conv", "Transpose", _transposed_conv, 3),
        )
        for dimensions in range(1, most + 1)
    },
    **dict.fromkeys(_CONVOLUTIONS, _bilinear_conv),
    **dict.fromkeys((keras.layers.SimpleRNN, keras.layers.GRU, keras.layers.LSTM), _recurrent),
    **dict.fromkeys(
        (keras.layers.SimpleRNNCell, keras.layers.GRUCell, keras.layers.LSTMCell), _cell
    ),
    **dict.fromkeys(_RECURRENT, _recurrent),
    **dict.fromkeys(_CELLS, _bilinear_cell),
}
