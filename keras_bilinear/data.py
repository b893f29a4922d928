"""Batches of the inputs of a model."""

from collections.abc import Iterable, Mapping
from typing import Any, overload

import keras

from keras_bilinear.keras_private.graph import stateful_layers


def batches(data: Any, name: str = "calibration_data", size: int = 128) -> Iterable[Any]:
    """Cuts an array into batches. An iterable of batches is returned as it is.

    Args:
        data: an array whose first axis is that of the examples, or an iterable of arrays.
        name: name of the argument that holds `data`, for error texts.
        size: number of examples in a batch of an array; the last batch may be smaller.

    Raises:
        TypeError: if `data` is neither an array nor an iterable of arrays.
    """
    if hasattr(data, "shape"):
        return (data[start : start + size] for start in range(0, len(data), size))
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | dict):
        return data
    raise TypeError(
        f"`{name}` must be an array or an iterable of arrays. "
        f"Received: {name}={data!r} (of type {type(data).__name__})"
    )


@overload
def model_batches(  # pyright: ignore[reportOverlappingOverload]  # `Any` includes `None`
    data: None, model: keras.Model, name: str = ...
) -> None: ...


@overload
def model_batches(data: Any, model: keras.Model, name: str = ...) -> Iterable[Any]: ...


def model_batches(
    data: Any, model: keras.Model, name: str = "calibration_data"
) -> Iterable[Any] | None:
    """Makes batches of a model's inputs, which can be read again and again.

    Args:
        data: an array, a dictionary of arrays, a list with an array for each of several inputs
            of the model, or an iterable of batches. Of a tuple, be it a batch or all of the
            data, only the first element counts: the inputs. An iterator, which can be read
            only once, is kept in memory. `None` gives `None`.
        model: the model.
        name: name of the argument that holds `data`, for error texts.

    Raises:
        TypeError: if `data` is of another type.
        ValueError: if there is no batch, or if the arrays of several inputs differ in length.
    """
    if data is None:
        return None
    if isinstance(data, tuple):
        data, *_ = data
    size = batch_size(model)
    if isinstance(data, Mapping):
        inputs = _batches_together([*data.values()], name, size)
        data = [dict(zip(data, batch, strict=True)) for batch in inputs]
    elif _is_one_for_each_input(data, model):
        # In a tuple, as Keras takes a batch that is a list for inputs and labels.
        data = [(batch,) for batch in _batches_together(data, name, size)]
    data = batches(data, name, size)
    if iter(data) is data:
        data = list(data)
    if next(iter(data), None) is None:
        raise ValueError(f"`{name}` must have at least one batch. Received: none")
    return data


def batch_size(model: keras.Model, default: int = 128) -> int:
    """The number of examples whose states a stateful model keeps.

    Args:
        model: the model.
        default: the result for a model without states.
    """
    layers: list[Any] = [layer for layer in stateful_layers(model) if layer.built]
    return layers[0].states[0].shape[0] if layers else default


def _is_one_for_each_input(data, model):
    """Whether a list holds an array for each input of a model, and not batches."""
    inputs = getattr(model, "inputs", None) or ()  # a subclassed model has none
    several = isinstance(data, list) and len(data) == len(inputs) > 1
    return several and all(hasattr(values, "shape") for values in data)


def _batches_together(arrays, name, size):
    """Batches of several arrays: for each batch, a list with a part of each array."""
    lengths = [len(values) for values in arrays]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The arrays of `{name}` must have as many examples each. Received: {lengths}"
        )
    parts = (batches(values, name, size) for values in arrays)
    return [[*batch] for batch in zip(*parts, strict=True)]
