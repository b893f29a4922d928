"""Watches the calls of the layers of a model.

Below Keras' public interface: `Layer.__call__` looks up `call`, or `quantized_call` for a quantized
layer, on the layer object at each call. An attribute of the object can therefore wrap the method.
Keras 3.13 to 3.15.
"""

import contextlib
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import keras
import numpy as np
from keras import ops, tree

from keras_bilinear.keras_private.gradients import gradients
from keras_bilinear.keras_private.graph import states_kept

Key = TypeVar("Key", bound=Hashable)
Note = TypeVar("Note")


def record(
    model: keras.Model,
    layers: Mapping[Key, keras.Layer],
    inputs: Any,
    note: Callable[[Any, dict[str, Any], Any], Note],
) -> dict[Key, list[Note]]:
    """Runs a model for inference and takes a note of each call of some of its layers.

    The run leaves the states of stateful layers unchanged.

    Args:
        model: a built model.
        layers: the layers of the model to watch, by any key.
        inputs: one batch of inputs of the model: an array, or nested arrays.
        note: called after each call of a layer as `note(inputs, arguments, outputs)`, where
            `arguments` are the keyword arguments of the call. Returns what to keep.

    Returns:
        For each key, the notes in the order of the calls.
    """
    notes: dict[Key, list[Note]] = {key: [] for key in layers}
    with (
        _calls_wrapped(layers, lambda key, call: _noting(call, notes[key], note)),
        states_kept(model),
    ):
        model(tree.map_structure(ops.convert_to_tensor, inputs), training=False)
    return notes


def record_gradients(
    model: keras.Model,
    layers: Mapping[Key, keras.Layer],
    inputs: Any,
    outputs: Mapping[Key, list],
    weigh: Callable[[list], list],
) -> dict[Key, list]:
    """Takes the gradients of a sum of a model's outputs at the outputs of some of its layers.

    Args:
        model: a built model. It runs for inference, and its states stay unchanged.
        layers: the layers of the model, by any key.
        inputs: one batch of inputs of the model: an array, or nested arrays.
        outputs: for each key what the layer returns in each of its calls: an array, or nested
            arrays.
        weigh: from the outputs of the model, as a list of arrays, to the weights of their numbers
            in the sum: a list of arrays of the same shapes.

    Returns:
        For each key, and each call, the gradients at the outputs, of the same structure.
    """
    # Zeros that are added to the outputs have the gradients of the outputs.
    zeros = tree.map_structure(np.zeros_like, dict(outputs))
    inputs = tree.map_structure(ops.convert_to_tensor, inputs)

    def run(added):
        added = tree.pack_sequence_as(zeros, added)
        with _calls_wrapped(layers, lambda key, call: _adding(call, iter(added[key]))):
            return tree.flatten(model(inputs, training=False))

    with states_kept(model):
        found = gradients(run, tree.flatten(zeros), weigh)
    return tree.pack_sequence_as(zeros, found)


@contextlib.contextmanager
def _calls_wrapped(layers, wrap):
    """A context in which `wrap(key, call)` stands for the `call` of each layer."""
    try:
        for key, layer in layers.items():
            name = _call_name(layer)
            setattr(layer, name, wrap(key, getattr(layer, name)))
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop(_call_name(layer), None)


def _call_name(layer):
    """Name of the method that `Layer.__call__` runs."""
    return "call" if layer.dtype_policy.quantization_mode is None else "quantized_call"


def _noting(call, notes, note):
    """`call`, which also appends a note of the call to `notes`."""

    @functools.wraps(call)
    def noting(*args, **kwargs):
        outputs = call(*args, **kwargs)
        inputs, *_ = args or kwargs.values()
        notes.append(note(inputs, kwargs, outputs))
        return outputs

    return noting


def _adding(call, added):
    """`call`, whose outputs get the next item of `added` added to them."""

    @functools.wraps(call)
    def adding(*args, **kwargs):
        return tree.map_structure(ops.add, call(*args, **kwargs), next(added))

    return adding
