"""Batches of the inputs of a model."""

import itertools
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, overload

import keras
import numpy as np

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
        f"`{name}` must be an array or an iterable of arrays. Received: {describe(data)}"
    )


def describe(value: Any) -> str:
    """A value in a few words, for error texts: arrays by their shapes, never by their numbers.

    >>> describe(np.ones((3, 4))), describe({"a": np.ones(5)}), describe(0.5)
    ('an array of shape (3, 4)', 'a dict of a: (5,)', '0.5 of type float')
    """
    kind = type(value).__name__
    if hasattr(value, "shape"):
        return f"an array of shape {shape_of(value)}"
    items = value.items() if isinstance(value, Mapping) else None
    if items and all(hasattr(array, "shape") for _, array in items):
        return f"a {kind} of {', '.join(f'{key}: {shape_of(array)}' for key, array in items)}"
    if isinstance(value, list | tuple) and any(hasattr(array, "shape") for array in value):
        return f"a {kind} of {_shapes_text(map(shape_of, value))}"
    return f"{reprlib.repr(value)} of type {kind}"


def shape_of(value: Any) -> tuple:
    """The shape of an array or tensor; `()` for a number or a text."""
    return tuple(getattr(value, "shape", ()))


def _shapes_text(shapes: Iterable[tuple], most: int = 8) -> str:
    """Shapes, separated by commas; not more than a few of them."""
    shapes = iter(shapes)
    shown = [*map(str, itertools.islice(shapes, most))]
    return ", ".join([*shown, "..."] if next(shapes, None) is not None else shown)


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
        ValueError: if there is no batch, if the arrays of several inputs differ in length, or
            if shapes do not fit the model.
    """
    if data is None:
        return None
    if isinstance(data, tuple):
        data, *_ = data
    size = batch_size(model)
    if isinstance(data, Mapping):
        inputs = _batches_together([*data.values()], name, size)
        data = [dict(zip(data, batch, strict=True)) for batch in inputs]
    elif is_one_for_each_input(data, model):
        # In a tuple, as Keras takes a batch that is a list for inputs and labels.
        data = [(batch,) for batch in _batches_together(data, name, size)]
    data = batches(data, name, size)
    if iter(data) is data:
        data = list(data)
    first = next(iter(data), None)
    if first is None:
        raise ValueError(f"`{name}` must have at least one batch. Received: none")
    # Other batches than those of a list are read only when they are needed.
    for batch in data if isinstance(data, list) else [first]:
        _check_shapes(batch, model, name)
    return data


def count_examples(batch: Any) -> int:
    """The number of examples in a batch of inputs, or of a tuple of inputs and something else."""
    inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
    return len(keras.tree.flatten(inputs)[0])


def batch_size(model: keras.Model, default: int = 128) -> int:
    """The number of examples whose states a stateful model keeps.

    Args:
        model: the model.
        default: the result for a model without states.
    """
    layers: list[Any] = [layer for layer in stateful_layers(model) if layer.built]
    return layers[0].states[0].shape[0] if layers else default


def zeros(model: keras.Model) -> Any:
    """One example of zeros, or as many as the states of a stateful model are for.

    Returns:
        An array, or nested arrays as the model takes them. `None` if the model does not tell the
        shape of an example: if it is subclassed, has a size that is not fixed, or takes strings.
    """
    if not hasattr(model, "inputs"):  # a subclassed model
        return None
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    if any(None in tensor.shape[1:] or tensor.dtype == "string" for tensor in model.inputs):
        return None
    return keras.tree.map_structure(
        lambda tensor: np.zeros((tensor.shape[0] or 1, *tensor.shape[1:]), tensor.dtype), inputs
    )


def first_example(model: keras.Model, examples: Iterable[Any]) -> Any:
    """The inputs of the first example, or of as many as the states of the model are for.

    Args:
        model: the model.
        examples: batches of inputs, or of tuples of inputs and labels.
    """
    inputs, *_ = keras.utils.unpack_x_y_sample_weight(next(iter(examples)))
    least = slice(batch_size(model, 1))
    return keras.tree.map_structure(
        lambda x: np.asarray(keras.ops.convert_to_numpy(x))[least], inputs
    )


def _check_shapes(batch: Any, model: keras.Model, name: str) -> None:
    """Checks that a batch fits the inputs of a model, as far as the model tells their shapes.

    Raises:
        ValueError: if it does not, with the shapes.
    """
    if isinstance(batch, list | tuple) and not 1 <= len(batch) <= 3:
        raise ValueError(
            f"A batch of `{name}` must be inputs of the model, or a tuple of inputs and labels. "
            f"Received: {describe(batch)}"
        )
    inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
    expected = [*_expected_inputs(model, inputs)]
    if not expected or any(values is None for _, _, values in expected):
        return
    if isinstance(inputs, Mapping):
        given = [values for _, _, values in expected]
    else:
        given = keras.tree.flatten(inputs)
    fits = len(given) == len(expected) and all(
        _fits(shape_of(values), shape)
        for values, (_, shape, _) in zip(given, expected, strict=True)
    )
    if not fits:
        what = ", ".join(f"{key!r} of shape {shape}" for key, shape, _ in expected)
        shapes = _shapes_text(map(shape_of, given))
        raise ValueError(
            f"`{name}` must fit the input{'s' if len(expected) > 1 else ''} {what} of the model "
            f"{model.name!r}. Received: a batch of shape {shapes}"
        )


def _expected_inputs(model: keras.Model, inputs: Any) -> Iterator[tuple[str, tuple, Any]]:
    """For each input of a model its name, its shape, and the values that a batch has for it.

    The values are those of a dictionary; `None` if it does not have them, or if the model takes
    more than shapes tell. A subclassed model has no such inputs.
    """
    tensors: Any = getattr(model, "inputs", None) or ()
    if not tensors:
        return
    by_name = isinstance(inputs, Mapping)
    structure = None if isinstance(model, keras.Sequential) else model.input
    keys = sorted(structure) if isinstance(structure, Mapping) else [x.name for x in tensors]
    if len(keys) != len(tensors):  # dictionaries in dictionaries
        return
    for key, tensor in zip(keys, tensors, strict=True):
        yield key, tuple(tensor.shape), inputs.get(key) if by_name else ()


def _fits(shape: tuple, expected: tuple) -> bool:
    """Whether an input of a model takes an array. Keras adds and drops a last axis of size 1."""
    if len(shape) == len(expected) - 1 and expected[-1] == 1:
        shape = *shape, 1
    elif len(shape) == len(expected) + 1 and shape[-1] == 1:
        shape = shape[:-1]
    return len(shape) == len(expected) and all(
        None in (size, wanted) or size == wanted
        for size, wanted in zip(shape[1:], expected[1:], strict=True)
    )


def is_one_for_each_input(data: Any, model: keras.Model) -> bool:
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
