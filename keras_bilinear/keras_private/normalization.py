"""Lets batch normalization learn its statistics in a model that else runs as in inference.

Below Keras' public interface: `Layer.__call__` looks up `call` on the layer object at each call, so
an attribute of the object can wrap the method. Keras 3.13 to 3.15.
"""

import contextlib
import functools
from collections.abc import Iterator

import keras

from keras_bilinear.keras_private.graph import all_layers


@contextlib.contextmanager
def batch_statistics(model: keras.Model, momentum: float) -> Iterator[None]:
    """A context in which `BatchNormalization` layers that are not frozen run as in training.

    They normalize by the statistics of the batch, and update their moving ones. No other layer
    runs as in training because of that.

    Args:
        model: the model.
        momentum: the largest momentum of the moving statistics, in place of that of a layer.
    """
    layers = [
        layer
        for layer in all_layers(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    before = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = min(layer.momentum, momentum)
            layer.call = _in_training(layer.call)
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.momentum = value
            layer.__dict__.pop("call", None)


def _in_training(call):
    @functools.wraps(call)
    def in_training(inputs, training=None, **kwargs):
        del training
        return call(inputs, training=True, **kwargs)

    return in_training
