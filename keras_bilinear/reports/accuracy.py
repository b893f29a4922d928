"""Reads examples of a model and finds the share that the model answers right."""

import collections
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from keras_bilinear.data import describe, model_batches
from keras_bilinear.keras_private.graph import output_operations
from keras_bilinear.progress import track


def read_examples(model: keras.Model, data: Any) -> Iterable[Any]:
    """Batches of the examples that `summarize` takes as `data`.

    Args:
        model: the model.
        data: a tuple of inputs and labels, inputs alone, or an iterable of batches. Labels of
            several outputs are a dictionary or a list of arrays.

    Returns:
        Batches of inputs, or of tuples of inputs and labels.

    Raises:
        TypeError: if `data` is neither an array nor an iterable of arrays.
        ValueError: if there is no batch, or if labels are no numbers or differ in
            number from the inputs.
    """
    if not isinstance(data, tuple):
        return model_batches(data, model)
    if not 1 <= len(data) <= 3:
        raise ValueError(
            "`data` must be inputs, or a tuple of inputs and labels. "
            f"Received: a tuple of {len(data)} elements"
        )
    inputs, labels, _ = keras.utils.unpack_x_y_sample_weight(data)
    if labels is None:
        return model_batches(inputs, model)
    inputs = [
        keras.utils.unpack_x_y_sample_weight(batch)[0] for batch in model_batches(inputs, model)
    ]
    ends = [*itertools.accumulate(len(keras.tree.flatten(batch)[0]) for batch in inputs)]
    labels = _arrays(labels, ends[-1])
    for array in _each(labels).values():
        if array is not None and (array.ndim == 0 or len(array) != ends[-1]):
            raise ValueError(
                "`data` must have as many labels as examples. "
                f"Received: labels of shape {array.shape} for {ends[-1]} examples"
            )
    return [
        (batch, _part(labels, start, end))
        for batch, start, end in zip(inputs, [0, *ends], ends, strict=False)
    ]


def _arrays(labels, examples):
    """Labels as an array or, for several outputs, as a dictionary or a list of arrays."""
    if isinstance(labels, Mapping):
        return {name: _array(values) for name, values in labels.items()}
    # A list may also have a label for each example.
    several = isinstance(labels, list | tuple) and any(
        len(getattr(values, "shape", ())) > 0 and (len(labels) != examples == len(values))
        for values in labels
    )
    return [_array(values) for values in labels] if several else _array(labels)


def _array(labels: Any) -> Any:
    if labels is None:
        return None
    try:
        array = keras.ops.convert_to_numpy(labels) if hasattr(labels, "shape") else labels
        array = np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_labels(labels) from error
    if array.dtype.kind not in "biuf" and "float" not in array.dtype.name:
        raise _no_labels(labels)
    return array


def _no_labels(labels):
    return ValueError(
        "The labels in `data` must be numbers: an array, or a dictionary or list of arrays for "
        f"several outputs. Received: {describe(labels)}"
    )


def _each(labels) -> dict[Any, Any]:
    """Labels by their names or positions; those of a single output by `None`."""
    if isinstance(labels, Mapping):
        return dict(labels)
    return dict(enumerate(labels)) if isinstance(labels, list) else {None: labels}


def _part(labels, start, end):
    """Some of the labels, in the same structure."""
    parts = {
        key: None if array is None else array[start:end] for key, array in _each(labels).items()
    }
    if isinstance(labels, Mapping):
        return parts
    return [*parts.values()] if isinstance(labels, list) else parts[None]


def accuracy(model: keras.Model, examples: Iterable[Any]) -> float | dict[str, float] | None:
    """The share of the examples that a model answers right.

    Args:
        model: the model.
        examples: batches, as `read_examples` gives them.

    Returns:
        A number from 0 to 1; for a model with several outputs a dictionary with a number for each
        output that has labels. `None` if the batches have no labels.

    Raises:
        ValueError: if the labels do not fit the outputs.
    """
    right, total, several = collections.Counter(), collections.Counter(), False
    for batch in track(examples, f"measuring the accuracy of {model.name}"):
        inputs, labels, _ = keras.utils.unpack_x_y_sample_weight(batch)
        if labels is None:
            return None
        # The arrays of a batch may be of another library than the backend.
        inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, inputs)
        outputs = _outputs_by_name(model, model.predict_on_batch(inputs))
        several = len(outputs) > 1
        for name, values in _labels_by_name(labels, [*outputs]).items():
            found = right_answers(values, outputs[name], takes_logits(model, name, [*outputs]))
            right[name] += int(found.sum())
            total[name] += found.size
    shares = {name: right[name] / count for name, count in total.items() if count}
    if several:
        return shares or None
    return next(iter(shares.values()), None)


def _outputs_by_name(model, outputs) -> dict[str, np.ndarray]:
    """The outputs of a model for a batch, by the names of the outputs.

    Raises:
        ValueError: if the outputs are nested deeper than in a dictionary or a list.
    """
    if not keras.tree.is_nested(outputs):
        outputs = [outputs]
    if not isinstance(outputs, Mapping):
        names = _output_names(model)
        if len(set(names)) != len(outputs):  # some layer makes several of the outputs
            names = [f"output_{index}" for index in range(len(outputs))]
        outputs = dict(zip(names, outputs, strict=True))
    if any(map(keras.tree.is_nested, outputs.values())):
        raise ValueError(
            "Accuracy is that of outputs in a dictionary or a list: give `data` without labels. "
            f"Received: model={model.name!r} with nested outputs {', '.join(map(str, outputs))}"
        )
    return {name: np.asarray(values) for name, values in outputs.items()}


def _output_names(model):
    """The names of the layers that make the outputs of a model; none of a subclassed model."""
    try:
        return [operation.name for operation in output_operations(model)]
    except ValueError:
        return []


def _labels_by_name(labels, names) -> dict[str, np.ndarray]:
    """The labels of a batch, by the names of the outputs. An output may have none.

    Raises:
        ValueError: if the labels do not fit the names.
    """
    given = f"{len(names)} output{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
    if isinstance(labels, Mapping):
        if not labels or not labels.keys() <= {*names}:
            raise ValueError(
                "`data` must have labels by the names of outputs. Received: labels for "
                f"{', '.join(map(repr, labels)) or 'none'} and a model with {given}"
            )
        found = labels
    elif len(names) == 1:
        alone = isinstance(labels, list | tuple) and len(labels) == 1
        found = {names[0]: labels[0] if alone and hasattr(labels[0], "shape") else labels}
    elif isinstance(labels, list | tuple) and len(labels) == len(names):
        found = dict(zip(names, labels, strict=True))
    else:
        raise ValueError(
            "`data` must have labels for each output: a dictionary by their names, or a list. "
            f"Received: {describe(labels)} and a model with {given}"
        )
    return {name: _array(values) for name, values in found.items() if values is not None}


def right_answers(labels: np.ndarray, outputs: np.ndarray, logits: bool) -> np.ndarray:
    """For each example whether an output answers it right.

    Args:
        labels: integers or one-hot vectors.
        outputs: the output for all examples.
        logits: whether an output of size 1 answers 1 above 0, instead of above 0.5.

    Raises:
        ValueError: if the labels do not fit the output.
    """
    shape = outputs.shape
    if outputs.ndim < 2:
        outputs = outputs.reshape(-1, 1)
    if outputs.shape[-1] > 1:
        answers = outputs.argmax(-1)
    else:
        answers = outputs[..., 0] > (0.0 if logits else 0.5)
    labels = _integer_labels(labels, outputs)
    if labels.shape != answers.shape:
        raise ValueError(
            "`data` must have a label, an integer or a one-hot vector, for each output. "
            f"Received: labels of shape {labels.shape} for outputs of shape {shape}"
        )
    return answers == labels


def takes_logits(model: keras.Model, name: str, names: list[str]) -> bool:
    """Whether the loss of an output takes logits: a single output is else a probability."""
    loss = getattr(model, "loss", None)
    if isinstance(loss, Mapping):
        loss = loss.get(name)
    elif isinstance(loss, list | tuple):
        loss = loss[names.index(name)] if len(loss) == len(names) else None
    return getattr(loss, "from_logits", False)


def _integer_labels(labels, outputs):
    """Labels without an axis of size 1, and one-hot vectors as integers."""
    if labels.ndim == outputs.ndim and labels.shape[-1] == 1:
        return labels[..., 0]
    return labels.argmax(-1) if labels.shape == outputs.shape else labels
