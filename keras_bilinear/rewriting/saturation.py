"""Activations that inputs drive to where they are flat, which no training does."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bilinear.keras_private.capture import record
from keras_bilinear.keras_private.graph import output_operations
from keras_bilinear.rewriting.sites import walk

# An activation is flat where its input, or for a softmax the lead of the largest input, is larger
# than this. Gradients there are zero in float32, so training does not get as far.
FLAT = {"tanh": 25.0, "sigmoid": 50.0, "softmax": 50.0}
# A layer is saturated or dead if more than this share of its values is flat. In networks that were
# trained on the digits of scikit-learn from 0 to 1, no value is, even after 170 epochs; of digits
# from 0 to 255, a third (LSTM) and more are. A ReLU is flat where it is zero, as most of a trained
# layer may be.
MOST = {"tanh": 0.2, "sigmoid": 0.2, "softmax": 0.2, "relu": 0.999}
# A ReLU that is zero for fewer examples says little.
_FEW = 30


def flat_layers(model: keras.Model, inputs: Any) -> Iterator[tuple[str, str, float]]:
    """The layers of a model that are saturated, or dead, on a batch of inputs.

    Looked at are tanh, sigmoid, softmax and ReLU where a layer applies them as its `activation`
    or is one of them, and outputs that the loss of the model takes as logits. Gates of recurrent
    layers do not count, nor what a backend traces instead of computing it.

    Args:
        model: the built model.
        inputs: the batch.

    Yields:
        In the order of the model, the path of a layer, the name of its activation and the share
        of its values that are flat.
    """
    sites = {site.path: site.layer for site in walk(model, weightless=True)}
    logits = _layer_of_logits(model)
    names = {path: name for path, layer in sites.items() if (name := _activation(layer, logits))}
    shares: dict[str, list[float]] = {path: [] for path in names}
    whole = {path: sites[path] for path in names if isinstance(sites[path], _LAYERS)}
    with contextlib.ExitStack() as stack:
        for path in shares.keys() - whole.keys():
            stack.enter_context(_watched(sites[path], names[path], shares[path]))
        notes = record(model, whole, inputs, _flat_shares)
    for path, calls in notes.items():
        shares[path] += [call[names[path]] for call in calls if names[path] in call]
    examples = len(keras.tree.flatten(inputs)[0])
    for path, found in shares.items():
        share = float(np.mean(found)) if found else 0.0
        if share > MOST[names[path]] and (names[path] != "relu" or examples >= _FEW):
            yield path, names[path], share


_LAYERS = (keras.layers.ReLU, keras.layers.Softmax)


def _activation(layer, logits):
    """The name of the activation of a layer that is looked at; `None` for another one."""
    if isinstance(layer, _LAYERS):
        plain = not getattr(layer, "threshold", 0) and not getattr(layer, "negative_slope", 0)
        return type(layer).__name__.lower() if plain and type(layer) in _LAYERS else None
    function = getattr(_holder(layer), "activation", None)
    if layer is logits and function is keras.activations.linear:
        return "softmax"
    return next((name for name in MOST if function is getattr(keras.activations, name)), None)


def _holder(layer):
    """The layer that has the activation of a layer: of a recurrent layer, its cell."""
    return layer.cell if isinstance(layer, keras.layers.RNN) else layer


def _layer_of_logits(model):
    """The layer whose outputs a cross-entropy takes as logits, if the model has one output."""
    try:
        (operation,) = output_operations(model)
    except ValueError:  # a subclassed model, or several outputs
        return None
    return operation if getattr(getattr(model, "loss", None), "from_logits", False) else None


@contextlib.contextmanager
def _watched(layer, name, shares: list[float]) -> Iterator[None]:
    """A context in which the activation of a layer notes the share of flat values of each call."""
    layer = _holder(layer)
    activation: Callable = layer.activation

    @functools.wraps(activation)
    def noting(x, *args, **kwargs):
        found = _flat_shares(x)
        shares.extend([found[name]] if found else [])
        return activation(x, *args, **kwargs)

    layer.activation = noting
    try:
        yield
    finally:
        layer.activation = activation


def _flat_shares(inputs, arguments=None, outputs=None) -> dict[str, float]:
    """For each activation the share of inputs at which it is flat.

    There are none of a call that a backend traces.
    """
    del arguments, outputs
    try:
        x = np.asarray(ops.convert_to_numpy(inputs), "float64")
    except Exception:  # each backend has its own error for tensors without values
        return {}
    size = lead = np.abs(x)
    if x.shape[-1] > 1:
        lead = np.diff(np.partition(x, -2)[..., -2:])
    return {
        "tanh": float(np.mean(size > FLAT["tanh"])),
        "sigmoid": float(np.mean(size > FLAT["sigmoid"])),
        "softmax": float(np.mean(lead > FLAT["softmax"])),
        "relu": float(np.mean(x <= 0)),
    }
