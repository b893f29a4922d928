"""Reads examples of a model and finds the share that the model answers right."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_bilinear.data import batch_size, batches, model_batches


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


def read_examples(model: keras.Model, data: Any) -> Iterable[Any]:
    """Batches of the examples that `summarize` takes as `data`.

    Args:
        model: the model.
        data: a tuple of inputs and labels, inputs alone, or an iterable of batches.

    Returns:
        Batches of inputs, or of tuples of inputs and labels.

    Raises:
        TypeError: if `data` is neither an array nor an iterable of arrays.
        ValueError: if there is no batch, or if inputs and labels differ in number.
    """
    if not isinstance(data, tuple):
        return model_batches(data, model)
    inputs, labels = data
    inputs = [
        keras.utils.unpack_x_y_sample_weight(batch)[0] for batch in model_batches(inputs, model)
    ]
    labels = np.asarray(labels)
    label_batches = [*batches(labels, size=batch_size(model))]
    if len(inputs) != len(label_batches):
        raise ValueError(
            f"`data` must have as many labels as examples. Received: labels of shape {labels.shape}"
        )
    return [*zip(inputs, label_batches, strict=True)]


def first_example(model: keras.Model, examples: Iterable[Any]) -> Any:
    """The inputs of the first example, or of as many as the states of the model are for.

    Args:
        model: the model.
        examples: batches, as `read_examples` gives them.
    """
    inputs, *_ = keras.utils.unpack_x_y_sample_weight(next(iter(examples)))
    least = slice(batch_size(model, 1))
    return keras.tree.map_structure(
        lambda x: np.asarray(keras.ops.convert_to_numpy(x))[least], inputs
    )


def accuracy(model: keras.Model, examples: Iterable[Any]) -> float | None:
    """The share of the examples that a model answers right.

    Args:
        model: the model.
        examples: batches, as `read_examples` gives them.

    Returns:
        A number from 0 to 1; `None` if the batches have no labels.

    Raises:
        ValueError: if the model has several outputs, or if the labels do not fit its outputs.
    """
    right = total = 0
    for batch in examples:
        inputs, labels, _ = keras.utils.unpack_x_y_sample_weight(batch)
        if labels is None:
            return None
        # The arrays of a batch may be of another library than the backend.
        inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, inputs)
        outputs = model.predict_on_batch(inputs)
        if keras.tree.is_nested(outputs):
            raise ValueError(
                "Accuracy is that of a model with one output: give `data` without labels. "
                f"Received: model={model.name!r} with {len(outputs)} outputs"
            )
        outputs = np.asarray(outputs)
        answers = _answers(model, outputs)
        labels = _integer_labels(np.asarray(keras.ops.convert_to_numpy(labels)), outputs)
        if labels.shape != answers.shape:
            raise ValueError(
                "`data` must have a label, an integer or a one-hot vector, for each output. "
                f"Received: labels of shape {labels.shape} for outputs of shape {outputs.shape}"
            )
        right += (answers == labels).sum()
        total += labels.size
    return float(right / total) if total else None


def _answers(model, outputs):
    """The class that each output stands for."""
    if outputs.shape[-1] > 1:
        return outputs.argmax(-1)
    # A single output is a logit if the loss takes logits, and else a probability.
    logits = getattr(getattr(model, "loss", None), "from_logits", False)
    return outputs[..., 0] > (0.0 if logits else 0.5)


def _integer_labels(labels, outputs):
    """Labels without an axis of size 1, and one-hot vectors as integers."""
    if labels.ndim == outputs.ndim and labels.shape[-1] == 1:
        return labels[..., 0]
    return labels.argmax(-1) if labels.shape == outputs.shape else labels
