"""The paper's scale: hidden layers that have more units, and at first the same outputs.

Both output factors of a hidden layer are multiplied by the scale `s`, and each of
its units becomes `s**2` copies of it. The layers behind share what a unit gave
them among its copies, in parts that differ from copy to copy: these get
different gradients, and go different ways when the network is trained.
"""

import collections
import dataclasses
import math

import keras
import numpy as np
from keras import layers, ops

from keras_bilinear.keras_private.cloning import carry_attributes
from keras_bilinear.keras_private.graph import nodes, output_operations
from keras_bilinear.kronecker.initializers import is_matrix, to_be_overwritten
from keras_bilinear.layers.converter import converter_of, full_converter

# Layers that do the same to each channel, and put out as many.
_TRANSPARENT = (
    layers.ActivityRegularization,
    layers.Dropout,
    layers.ELU,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.LeakyReLU,
    layers.Masking,
    layers.ReLU,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    *(
        getattr(layers, f"{name}{dimensions}D")
        for name in (
            "AveragePooling",
            "Cropping",
            "GlobalAveragePooling",
            "GlobalMaxPooling",
            "MaxPooling",
            "UpSampling",
            "ZeroPadding",
        )
        for dimensions in (1, 2, 3)
    ),
)


@dataclasses.dataclass
class Hidden:
    """A hidden layer of a graph.

    Attributes:
        consumers: names of the layers that get the outputs, and how many positions a
            `Flatten` layer before each makes to one.
        normalizations: names of the layers with a weight for each unit of the layer.
        visible: whether anything else gets the outputs as well.
    """

    consumers: dict[str, int] = dataclasses.field(default_factory=dict)
    normalizations: list[str] = dataclasses.field(default_factory=list)
    visible: bool = False


def hidden_layers(model: keras.Model) -> dict[str, Hidden]:
    """The layers of a model whose outputs only layers with projections get.

    Args:
        model: a built Sequential or Functional model.

    Returns:
        The layers by their names, in the order of the model.

    Raises:
        ValueError: if the model is of another kind.
    """
    found, source = {}, {}
    graph = [*nodes(model)]
    calls = collections.Counter(id(operation) for operation, _ in graph)
    for operation, inputs in graph:
        origins = [source[id(parent)] for parent, _ in inputs if id(parent) in source]
        once = calls[id(operation)] == 1 and len(inputs) == 1
        # Here the last axis has the channels.
        once = once and getattr(operation, "data_format", None) != "channels_first"
        if once and _can_be_wider(operation) and getattr(operation, "groups", 1) == 1:
            for name, positions in origins:
                found[name].consumers[operation.name] = positions
            if _has_copies(operation):
                found[operation.name] = Hidden()
                source[id(operation)] = operation.name, 1
        elif once and origins and (positions := _positions(operation, inputs[0][1])):
            ((name, before),) = origins
            if operation.weights:
                found[name].normalizations.append(operation.name)
            source[id(operation)] = name, before * positions
        else:
            for name, _ in origins:
                found[name].visible = True
    for operation in output_operations(model):
        if id(operation) in source:
            found[source[id(operation)][0]].visible = True
    return {
        name: hidden for name, hidden in found.items() if hidden.consumers and not hidden.visible
    }


def _can_be_wider(operation):
    """Whether an operation is a layer of exactly a class that a plan may widen."""
    converter = full_converter(type(operation))
    return (
        converter is not None
        and converter.full_class is type(operation)
        and converter.width is not None
    )


def _has_copies(layer):
    """Whether copies of the units of a layer put out copies, and nothing else sees its states."""
    names = ("activation", "recurrent_activation")
    functions = (getattr(layer, name, None) for name in names)
    return not getattr(layer, "return_state", False) and all(map(_is_elementwise, functions))


def _is_elementwise(function):
    """Whether a function of many numbers treats each number alone."""
    if function is None:
        return True
    x = np.array([[0.3, -1.2, 2.0], [1.1, 0.0, -0.4]], "float32")
    try:
        y, copies = (
            ops.convert_to_numpy(function(ops.convert_to_tensor(values)))
            for values in (x, np.repeat(x, 2, axis=1))
        )
    except Exception:  # whatever a function says of inputs that it was not made for
        return False
    return y.shape == x.shape and np.allclose(np.repeat(y, 2, axis=1), copies)


def _positions(layer, shape):
    """How many positions a layer makes to one; 0 if it does more than that to the channels."""
    last = (-1, len(shape) - 1)
    if type(layer) is layers.Activation:
        return int(_is_elementwise(layer.activation))
    if type(layer) is layers.BatchNormalization:
        return int(layer.axis in last)
    if type(layer) is layers.LayerNormalization:
        return int(layer.axis in (*last, [-1], (-1,)))
    if type(layer) is layers.Flatten:
        return 0 if None in shape[1:] else math.prod(shape[1:-1])
    return int(type(layer) in _TRANSPARENT)


def widen(
    model: keras.Model, scales: dict[str, tuple[int, int]], hidden: dict[str, Hidden]
) -> keras.Model:
    """A model with more units in some bilinear layers, and the same outputs.

    Args:
        model: a Sequential or Functional model. It is left untouched.
        scales: `(input scale, output scale)` by the names of layers: both input factors
            are multiplied by the first, both output factors by the second.
        hidden: `hidden_layers` of the full model.

    Returns:
        The new model, not compiled.
    """
    producers = {
        follower: name
        for name, layer in hidden.items()
        if scales.get(name, (1, 1))[1] > 1
        for follower in layer.normalizations
    }

    def clone(layer):
        if not isinstance(layer, keras.Layer):  # an operation, such as `keras.ops.relu`
            return layer
        config = keras.layers.serialize(layer)
        if layer.name in scales:
            width = converter_of(layer).width
            config["config"] |= _wide_arguments(config["config"], width, *scales[layer.name])
        if layer.name in scales or layer.name in producers:
            config.pop("build_config", None)
            config["config"] = _without_matrices(config["config"])
        return keras.layers.deserialize(config)

    with to_be_overwritten():
        wide = keras.models.clone_model(model, clone_function=clone)
    rng = np.random.default_rng(0)
    carry_attributes(model, wide, missing=True)
    for narrow, layer in zip(model.layers, wide.layers, strict=True):
        carry_attributes(narrow, layer, missing=True)
        if narrow.name in scales:
            _widen_layer(narrow, layer, *scales[narrow.name], rng)
        elif narrow.name in producers:
            producer = producers[narrow.name]
            factors = _cell(model.get_layer(producer)).output_factors
            _, scale = scales[producer]
            give_weights(layer, [_copies(v, factors, scale) for v in narrow.get_weights()])
        else:
            give_weights(layer, narrow.get_weights())
    return wide


def give_weights(layer: keras.Layer, weights: list) -> None:
    """Sets all weights of a layer, and what an adapted layer derives from its weights."""
    layer.set_weights(weights)
    if hasattr(layer, "finalize_state"):
        layer.finalize_state()


def _without_matrices(config):
    """A configuration without initializers that are matrices, whose shape does not fit any more."""
    return {
        name: value
        for name, value in config.items()
        if not (name.endswith("_initializer") and is_matrix(keras.initializers.get(value)))
    }


def _wide_arguments(config, width, input_scale, output_scale):
    return {
        width: config[width] * output_scale**2,
        "input_factors": [input_scale * size for size in config["input_factors"]],
        "output_factors": [output_scale * size for size in config["output_factors"]],
    }


def _cell(layer):
    """The layer or cell that has the factors and the bias."""
    return converter_of(layer).holder(layer)


def _widen_layer(narrow, wide, input_scale, output_scale, rng):
    kernels = zip(narrow.kernels.values(), wide.kernels.values(), strict=True)
    for index, (kernel, wide_kernel) in enumerate(kernels):
        # The recurrent kernel gets the layer's own outputs.
        parts = output_scale if index else input_scale
        factors = (_shares(factor, parts, rng) for factor in kernel.read_factors())
        wide_kernel.assign_factors(
            *(np.repeat(factor, output_scale, axis=-1) for factor in factors)
        )
    narrow, wide = _cell(narrow), _cell(wide)
    if getattr(narrow, "bias", None) is not None:
        bias = ops.convert_to_numpy(narrow.bias)
        wide.bias.assign(_copies(bias, narrow.output_factors, output_scale))


def _shares(factor, parts, rng):
    """A factor whose rows are split into parts, at random, that add up to them."""
    if parts == 1:
        return factor
    weights = rng.uniform(0.5, 1.5, (factor.shape[-2], parts))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.repeat(factor, parts, axis=-2) * weights.reshape(-1, 1)


def _copies(values, factors, scale):
    """Numbers of each unit, or of each unit of each gate, for all its copies."""
    leading, (first, second) = values.shape[:-1], factors
    values = values.reshape(*leading, -1, first, 1, second, 1)
    values = np.tile(values, (scale, 1, scale))
    return values.reshape(*leading, -1)
