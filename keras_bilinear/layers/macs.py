"""How many operations the call of a layer takes, and how many numbers lie between its factors."""

import math

import keras

from keras_bilinear.layers.converter import counting_converter, look_up

_DEPTHWISE = dict.fromkeys((keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D), True)


def count_call(layer: keras.Layer, inputs: tuple, outputs: tuple) -> int | None:
    """Multiply-accumulate operations of the projections of a layer.

    Args:
        layer: a built layer.
        inputs: shape of the inputs of the call.
        outputs: shape of its outputs.

    Returns:
        Their number; `None` if it is not known how to count them.
    """
    converter = counting_converter(layer)
    if converter is not None:
        return converter.macs(layer, inputs, outputs)
    if look_up(type(layer), _DEPTHWISE):
        axis = -1 if layer.data_format == "channels_last" else 1
        return math.prod(outputs) // outputs[axis] * math.prod(layer.kernel.shape)
    # Weights without a second axis scale and shift, and project nothing.
    projects = any(len(variable.shape) > 1 for variable in layer.weights)
    return None if projects else 0


def count_workspace(layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
    """Numbers that a call holds between its inputs and outputs: those between both factors.

    Weights and kernels do not count. A layer that no converter knows holds nothing that is counted.

    Args:
        layer: a built layer.
        inputs: shape of the inputs of the call.
        outputs: shape of its outputs.
    """
    converter = counting_converter(layer)
    return 0 if converter is None else converter.workspace(layer, inputs, outputs)
