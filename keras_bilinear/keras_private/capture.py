"""Watches the calls of the layers of a model.

Below Keras' public interface: `Layer.__call__` looks up `call`, or `quantized_call` for a quantized
layer, on the layer object at each call. An attribute of the object can therefore wrap the method.
Keras 3.13 to 3.15.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import keras
from keras import ops

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
    try:
        for key, layer in layers.items():
            name = _call_name(layer)
            setattr(layer, name, _noting(getattr(layer, name), notes[key], note))
        with states_kept(model):
            model(keras.tree.map_structure(ops.convert_to_tensor, inputs), training=False)
    finally:
        for layer in layers.values():
            layer.__dict__.pop(_call_name(layer), None)
    return notes


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
