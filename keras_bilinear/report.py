"""What a model costs, layer by layer."""

import dataclasses
import math

import keras

from keras_bilinear import cost
from keras_bilinear.keras_private import calls
from keras_bilinear.layers import (
    BilinearConv1D,
    BilinearConv2D,
    BilinearConv3D,
    BilinearDense,
    BilinearEmbedding,
    BilinearGRU,
    BilinearLSTM,
    BilinearSimpleRNN,
)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The cost of one layer.

    Attributes:
        name: the layer's name; in a nested model, behind that model's name.
        type: name of its class.
        parameters: numbers stored in its weights.
        macs: multiply-accumulate operations of its projections for one example,
            over all calls of the layer in the model.
    """

    name: str
    type: str
    parameters: int
    macs: int


def report_layers(model: keras.Model) -> list[LayerReport]:
    """The cost of each layer of a model, in the order of the model.

    Raises:
        ValueError: if the model is subclassed or not built, if it has a layer
            with weights whose operations cannot be counted, or if a size that
            the count depends on is not known.
    """
    reports = {}
    for layer, macs, prefix in _costs(model, ""):
        name = f"{prefix}{layer.name}"
        if name in reports:
            macs += reports[name].macs
        reports[name] = LayerReport(name, type(layer).__name__, layer.count_params(), macs)
    return list(reports.values())


def count_macs(model: keras.Model) -> int:
    """Multiply-accumulate operations of a model's projections for one example.

    Raises:
        ValueError: see `report_layers`.
    """
    return sum(layer.macs for layer in report_layers(model))


def _costs(model, prefix):
    for layer, shapes in calls(model):
        if isinstance(layer, keras.Model):
            yield from _costs(layer, f"{prefix}{layer.name}/")
        else:
            yield layer, _macs(layer, shapes), prefix


def _macs(layer, shapes):
    count = _COUNTERS.get(type(layer))
    if count is not None:
        return count(layer, *shapes)
    if layer.weights:
        raise ValueError(
            "The operations of this type of layer cannot be counted. "
            f"Received: layer={layer!r} (of type {type(layer).__name__})"
        )
    return 0


def _dense(layer, shape):
    return _positions(layer, shape[1:-1]) * shape[-1] * layer.units


def _bilinear_dense(layer, shape):
    factorization = layer.factorization
    macs = factorization.full_macs if layer._kernel.materialized else factorization.macs
    return _positions(layer, shape[1:-1]) * macs


def _bilinear_embedding(layer, shape):
    factorization = layer.factorization
    return _positions(layer, shape[1:]) * factorization.rank * factorization.padded_output_dim


def _conv(layer, shape):
    return _output_positions(layer, shape) * math.prod(layer.kernel.shape)


def _bilinear_conv(layer, shape):
    kernel = layer._kernel
    macs = cost.count_macs(kernel.factorization, kernel.order, layer.strides)
    return _output_positions(layer, shape) * macs


def _recurrent(layer, shape, *states):
    cell = layer.cell
    kernels = cell.kernel.shape, cell.recurrent_kernel.shape
    return _positions(layer, shape[1:2]) * sum(map(math.prod, kernels))


def _bilinear_recurrent(layer, shape, *states):
    cell = layer.cell
    plans = cell.factorization, cell.recurrent_factorization
    macs = sum(
        plan.full_macs if kernel.materialized else plan.macs
        for plan, kernel in zip(plans, (cell._kernel, cell._recurrent_kernel), strict=True)
    )
    return _positions(layer, shape[1:2]) * macs


def _output_positions(layer, shape):
    _, *sizes = layer.compute_output_shape(shape)
    del sizes[-1 if layer.data_format == "channels_last" else 0]
    return _positions(layer, sizes)


def _positions(layer, sizes):
    if None in sizes:
        raise ValueError(
            "The operations for one example can only be counted if its shape is known. "
            f"Received: layer={layer!r} called on an example of shape {tuple(sizes)}"
        )
    return math.prod(sizes)


_COUNTERS = {
    keras.layers.Dense: _dense,
    keras.layers.Embedding: lambda layer, shape: 0,
    keras.layers.Conv1D: _conv,
    keras.layers.Conv2D: _conv,
    keras.layers.Conv3D: _conv,
    keras.layers.GRU: _recurrent,
    keras.layers.LSTM: _recurrent,
    keras.layers.SimpleRNN: _recurrent,
    BilinearDense: _bilinear_dense,
    BilinearEmbedding: _bilinear_embedding,
    BilinearConv1D: _bilinear_conv,
    BilinearConv2D: _bilinear_conv,
    BilinearConv3D: _bilinear_conv,
    BilinearGRU: _bilinear_recurrent,
    BilinearLSTM: _bilinear_recurrent,
    BilinearSimpleRNN: _bilinear_recurrent,
}
