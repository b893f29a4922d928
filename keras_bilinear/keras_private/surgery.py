"""Layers that become others in place."""

from collections.abc import Iterable

import keras

from keras_bilinear.keras_private.graph import all_layers

# What ties a layer to the graphs and the layers that hold it.
_PLACE = ("_inbound_nodes", "_outbound_nodes", "_path", "_parent_path", "_called")


# Functions that Keras makes for each object.
_BOUND = ("build", "quantize")


def become(layer: keras.Layer, other: keras.Layer) -> None:
    """Makes a layer another one, which is used up, and keeps it where it is.

    Graphs, attributes, lists and wrappers hold the object, so nothing else
    has to change.
    """
    attributes = {name: value for name, value in vars(other).items() if name not in _BOUND}
    attributes |= {name: vars(layer)[name] for name in _PLACE if name in vars(layer)}
    restore([(layer, type(other), attributes)])


def snapshot(layers: Iterable[keras.Layer]) -> list[tuple]:
    """What layers are now, for `restore`. The values of their variables are not copied."""
    return [(layer, type(layer), dict(vars(layer))) for layer in layers]


def restore(states: Iterable[tuple]) -> None:
    """Makes layers what they were when `snapshot` saw them."""
    for layer, cls, attributes in states:
        set_class(layer, cls)
        vars(layer).clear()
        vars(layer).update(attributes)


def set_class(layer: keras.Layer, cls: type) -> None:
    """Changes the class of a layer, behind the back of its own `__setattr__`."""
    object.__setattr__(layer, "__class__", cls)


def refresh(model: keras.Model) -> None:
    """Makes a model notice that layers in it have become others."""
    if keras.config.backend() == "torch":
        layers = all_layers(model)
        # A Sequential model holds the graph of its layers, and that holds their variables.
        graphs = [one._functional for one in layers if isinstance(one, keras.Sequential)]
        for layer in (*layers, *filter(None, graphs)):
            layer._track_variables()
