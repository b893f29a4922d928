"""What the layers of a model are called with."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from keras_bilinear.keras_private.graph import states_kept


def record(
    model: keras.Model, layers: Mapping[Any, keras.Layer], inputs, note: Callable
) -> dict[Any, list]:
    """Runs a model on inputs and takes a note of each call of some of its layers.

    The states of stateful layers are afterwards what they were.

    Args:
        model: the model.
        layers: layers of the model, by any key.
        inputs: inputs of the model, as arrays.
        note: what to keep of a call, from its inputs, its other arguments as a
            dictionary, and its outputs.

    Returns:
        For each key the notes, in the order of the calls.
    """
    notes = {key: [] for key in layers}
    try:
        for key, layer in layers.items():
            name = _call_name(layer)
            setattr(layer, name, _noting(getattr(layer, name), notes[key], note))
        with states_kept(model):
            model(keras.tree.map_structure(ops.convert_to_tensor, inputs), training=False)
    finally:
        for layer in layers.values():
            vars(layer).pop(_call_name(layer), None)
    return notes


def _call_name(layer):
    """The method that Keras calls."""
    return "call" if layer.dtype_policy.quantization_mode is None else "quantized_call"


def _noting(call, notes, note):
    @functools.wraps(call)
    def noting(*args, **kwargs):
        outputs = call(*args, **kwargs)
        inputs, *_ = args or kwargs.values()
        notes.append(note(inputs, kwargs, outputs))
        return outputs

    return noting
