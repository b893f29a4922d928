"""Batches of the inputs of a model."""

from collections.abc import Iterable, Mapping

import keras

from keras_bilinear.keras_private.graph import stateful_layers


def batches(data, name: str = "calibration_data", size: int = 128) -> Iterable:
    """Calibration data, one batch at a time.

    Args:
        data: an array, or an iterable of arrays.
        name: what errors call them.
        size: of the batches that an array is cut into.

    Raises:
        TypeError: if it is neither.
    """
    if hasattr(data, "shape"):
        return (data[start : start + size] for start in range(0, len(data), size))
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | dict):
        return data
    raise TypeError(
        f"`{name}` must be an array or an iterable of arrays. "
        f"Received: {name}={data!r} (of type {type(data).__name__})"
    )


def model_batches(data, model: keras.Model, name: str = "calibration_data") -> Iterable | None:
    """Calibration data of a model, as batches that can be read again and again.

    Args:
        data: an array, a dictionary of arrays, a list with an array for each of
            the model's several inputs, or an iterable of batches. Of a tuple, be
            it a batch or all of the data, only the first element, the inputs,
            counts. An iterator, which can be read only once, is kept in memory.
        model: the model.
        name: what errors call them.

    Raises:
        TypeError: if it is none of these.
        ValueError: if there is no batch, or if arrays of several inputs have different lengths.
    """
    if data is None:
        return None
    if isinstance(data, tuple):
        data, *_ = data
    size = batch_size(model)
    if isinstance(data, Mapping):
        data = [
            dict(zip(data, one, strict=True)) for one in _together([*data.values()], name, size)
        ]
    elif _is_one_for_each_input(data, model):
        # In a tuple, as Keras takes a batch that is a list for inputs and labels.
        data = [(one,) for one in _together(data, name, size)]
    data = batches(data, name, size)
    if iter(data) is data:
        data = list(data)
    if next(iter(data), None) is None:
        raise ValueError(f"`{name}` must have at least one batch. Received: none")
    return data


def batch_size(model: keras.Model, default: int = 128) -> int:
    """How many examples the states of a model are for; the default if it has no states."""
    states = (layer.states[0] for layer in stateful_layers(model) if layer.built)
    return next((state.shape[0] for state in states), default)


def _is_one_for_each_input(data, model):
    """Whether a list has the arrays of a model's inputs, and not batches."""
    inputs = getattr(model, "inputs", None) or ()  # a subclassed model has none
    several = isinstance(data, list) and len(data) == len(inputs) > 1
    return several and all(hasattr(values, "shape") for values in data)


def _together(arrays, name, size):
    """Batches of several arrays."""
    lengths = [len(values) for values in arrays]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The arrays of `{name}` must have as many examples each. Received: {lengths}"
        )
    return [[*one] for one in zip(*(batches(one, name, size) for one in arrays), strict=True)]
