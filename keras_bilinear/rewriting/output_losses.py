"""How far outputs of a model are from the same outputs of another model: a loss for each output."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bilinear.data import describe
from keras_bilinear.keras_private.graph import output_operations

# Numbers that sum to 1 up to such an error are probabilities, in half precision as well.
_SUM_ERROR = 0.01
_TINY = 1e-7


class OutputLoss(keras.losses.Loss):
    """A loss that is a function of an output of the full model and of the same output of another.

    Keras leaves out what the mask of an output leaves out.
    """

    def __init__(self, function: Callable[[Any, Any], Any], name: str, scale: float = 1.0):
        super().__init__(name=name)
        self.call = function
        self.scale = scale


def output_losses(
    loss: Any, full: keras.Model, small: keras.Model, outputs: Any
) -> list[keras.losses.Loss]:
    """A loss for each output of a model.

    Args:
        loss: `"auto"`, a loss, or a mapping or list of losses, see `recover`.
        full: the model whose outputs are learned.
        small: the model that learns them.
        outputs: the outputs of `full` for some examples, as arrays.

    Returns:
        A loss for each array in the outputs, in the order of `keras.tree.flatten`.

    Raises:
        ValueError: if `loss` does not fit the outputs.
    """
    arrays = keras.tree.flatten(outputs)
    names = _output_names(full, outputs)
    given = _for_each_output(loss, names, "auto")
    if given is None or any(value is None for value in given):
        raise ValueError(
            "`loss` must be one loss, or a loss for each of the outputs "
            f"{', '.join(map(repr, names))}. Received: loss={loss!r}"
        )
    compiled = _compiled_losses(full, small, names)
    activations = _last_activations(full, len(arrays))
    return [
        _auto(*found) if isinstance(value, str) and value == "auto" else _own(value)
        for value, *found in zip(given, compiled, activations, arrays, strict=True)
    ]


def _own(loss: Any) -> keras.losses.Loss:
    """A loss that the user gives: one of Keras, of `keras.distillation`, or a function."""
    if hasattr(loss, "compute_loss"):
        return OutputLoss(loss.compute_loss, "distillation")
    try:
        found = keras.losses.get(loss)
    except (TypeError, ValueError):
        found = None
    if isinstance(found, keras.losses.Loss):
        return found
    if not callable(found):
        raise ValueError(
            '`loss` must be "auto", or a loss that Keras knows, or a function. '
            f"Received: {describe(loss)}"
        )
    return OutputLoss(found, getattr(found, "__name__", "loss"))


def _auto(compiled: Any, activation: str, outputs: Any) -> OutputLoss:
    """The loss that fits what an output is: probabilities, logits, or other numbers.

    Args:
        compiled: the loss that the model is compiled with; `None` if it has none.
        activation: name of the function that makes the output; empty if it is not known.
        outputs: the output for some examples, an array.
    """
    outputs = np.asarray(outputs, "float32")
    from_logits = bool(getattr(compiled, "from_logits", False))
    between = bool(np.all((outputs >= 0) & (outputs <= 1)))
    if outputs.ndim > 1 and outputs.shape[-1] > 1:
        if between and np.all(np.abs(outputs.sum(-1) - 1) < _SUM_ERROR):
            return OutputLoss(divergence, "divergence")
        if from_logits and _is_crossentropy(compiled, "categorical"):
            return OutputLoss(_divergence_of_logits, "divergence_of_logits")
    binary = _is_crossentropy(compiled, "binary")
    if from_logits and binary:
        return OutputLoss(_binary_divergence_of_logits, "binary_divergence_of_logits")
    if between and (binary or activation == "sigmoid"):
        return OutputLoss(_binary_divergence, "binary_divergence")
    scale = _inverse_variance(outputs)
    return OutputLoss(
        lambda full, small: scale * ops.mean(ops.square(full - small), axis=-1),
        "relative_squared_error",
        scale,
    )


def divergence(full, small):
    """The Kullback-Leibler divergence of probabilities along the last axis, in nats."""
    # The added number, in place of a limit, leaves a gradient to outputs that are almost 0.
    return ops.sum(full * (ops.log(full + _TINY) - ops.log(small + _TINY)), axis=-1)


def _divergence_of_logits(full, small):
    full, small = ops.log_softmax(full), ops.log_softmax(small)
    return ops.sum(ops.exp(full) * (full - small), axis=-1)


def _binary_divergence(full, small):
    both = [ops.stack([values, 1 - values], axis=-1) for values in (full, small)]
    return ops.mean(divergence(*both), axis=-1)


def _binary_divergence_of_logits(full, small):
    both = [ops.stack([values, ops.zeros_like(values)], axis=-1) for values in (full, small)]
    return ops.mean(_divergence_of_logits(*both), axis=-1)


def _inverse_variance(outputs: np.ndarray) -> float:
    """One over the variance of an output, so that squared errors of any unit count alike."""
    positions = outputs.reshape(-1, outputs.shape[-1] if outputs.ndim > 1 else 1)
    variance = float(positions.var(0).mean())
    if variance <= _TINY * float(np.square(positions).mean()):  # a constant output
        variance = 1.0
    return 1 / variance


def _is_crossentropy(loss: Any, kind: str) -> bool:
    """Whether a loss is a cross-entropy: an object of Keras or of a subclass, its name, or none."""
    if isinstance(loss, str):
        names = [loss]
    elif isinstance(loss, keras.losses.Loss):
        names = [base.__name__ for base in type(loss).__mro__]
    else:
        names = [getattr(loss, "__name__", "")]
    names = [name.lower().replace("_", "") for name in names]
    return any(kind in name and "crossentropy" in name for name in names)


def _compiled_losses(full, small, names) -> list:
    """The losses that the models are compiled with, for each output; `None` where there is none."""
    for model in (full, small):
        loss = getattr(model, "loss", None) if model.compiled else None
        found = None if loss is None else _for_each_output(loss, names, None)
        if found is not None:
            return found
    return [None] * len(names)


def _for_each_output(given, names: list[str], default) -> list | None:
    """What is given for each of several outputs, or for all of them.

    Args:
        given: a single value, a mapping from names of outputs, or a list.
        names: the names of the outputs.
        default: what an output that the mapping does not have gets.

    Returns:
        A list; `None` if `given` has other outputs.
    """
    if isinstance(given, Mapping):
        if not given.keys() <= {*names}:
            return None
        return [given.get(name, default) for name in names]
    if isinstance(given, list | tuple):
        return list(given) if len(given) == len(names) else None
    return [given] * len(names)


def _output_names(model, outputs) -> list[str]:
    """A name for each array in the outputs of a model: its key, or the name of its layer."""
    if isinstance(outputs, Mapping) and not any(map(keras.tree.is_nested, outputs.values())):
        return [str(key) for key in sorted(outputs)]
    count = len(keras.tree.flatten(outputs))
    names: list[str] = list(getattr(model, "output_names", None) or ())
    if len({*names}) != count:
        names = [f"output_{index}" for index in range(count)]
    return names


def _last_activations(model, count: int) -> list[str]:
    """For each output the name of the function that makes it; empty where that is not known."""
    found = [*map(_activation, _last_operations(model))]
    return found if len(found) == count else [""] * count


def _last_operations(model) -> Iterator[Any]:
    """The operations that make the outputs of a model, also of a model at its end."""
    try:
        operations = output_operations(model)
    except ValueError:  # a subclassed model
        return
    seen = set()
    for operation in operations:
        if not isinstance(operation, keras.Model):
            yield operation
        elif operation not in seen:  # it may make several outputs
            seen.add(operation)
            yield from _last_operations(operation)


def _activation(operation) -> str:
    while isinstance(operation, keras.layers.Wrapper):
        operation = operation.layer
    function = getattr(operation, "activation", None)
    return getattr(function, "__name__", "") or type(operation).__name__.lower()
