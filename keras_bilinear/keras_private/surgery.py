"""Replaces layers in place: the object stays, its class and attributes change.

Below Keras' public interface: a layer's `_inbound_nodes`, `_outbound_nodes`, `_path`,
`_parent_path`, `_called` and `_trainable_variables`; `Layer.__new__`, which wraps `build` and
`quantize` on each object; `Sequential._functional`; and `_track_variables` of layers on PyTorch.
Keras 3.13 to 3.15.
"""

from collections.abc import Iterable
from typing import Any

import keras

from keras_bilinear.keras_private.graph import all_layers

# Attributes that tie a layer to the graphs and the layers that hold it.
_PLACE = ("_inbound_nodes", "_outbound_nodes", "_path", "_parent_path", "_called")
# Methods that Keras wraps for each object.
_BOUND = ("build", "quantize")


def replace_in_place(layer: keras.Layer, other: keras.Layer) -> None:
    """Turns a layer into another layer and keeps it where it is.

    Graphs, attributes, lists and wrappers hold the object, so nothing else has to change.

    Args:
        layer: the object that stays.
        other: the layer that it becomes. It must not be used afterwards.
    """
    attributes = {name: value for name, value in vars(other).items() if name not in _BOUND}
    attributes |= {name: vars(layer)[name] for name in _PLACE if name in vars(layer)}
    restore([(layer, type(other), attributes)])


# A layer, its class and its attributes.
State = tuple[keras.Layer, type, dict[str, Any]]


def snapshot(layers: Iterable[keras.Layer]) -> list[State]:
    """The class and the attributes of each layer, for `restore`.

    The variables are not copied: `restore` does not bring back their values.
    """
    return [(layer, type(layer), dict(vars(layer))) for layer in layers]


def restore(states: Iterable[State]) -> None:
    """Gives layers the classes and attributes that `snapshot` saw."""
    for layer, cls, attributes in states:
        set_class(layer, cls)
        layer.__dict__.clear()
        layer.__dict__.update(attributes)


def replaced_since(states: Iterable[State]) -> list[keras.Layer]:
    """The layers that have other variables than when `snapshot` saw them."""
    return [
        layer
        for layer, _, attributes in states
        if vars(layer)["_trainable_variables"] is not attributes["_trainable_variables"]
    ]


def set_class(layer: keras.Layer, cls: type) -> None:
    """Changes the class of a layer without calling the layer's own `__setattr__`."""
    object.__setattr__(layer, "__class__", cls)


def refresh(model: keras.Model) -> None:
    """Makes a model track the variables of the layers that were replaced in it.

    Only PyTorch needs this: there every layer is a `torch.nn.Module` with a list of parameters.
    """
    if keras.config.backend() == "torch":
        layers = all_layers(model)
        # A Sequential model holds the graph of its layers, which has a list of its own.
        graphs = [layer._functional for layer in layers if isinstance(layer, keras.Sequential)]
        for layer in (*layers, *filter(None, graphs)):
            layer._track_variables()
