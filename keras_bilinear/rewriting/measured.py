"""A metric of a model, and how much worse smaller models made from it are."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_bilinear.data import count_examples, describe, model_batches
from keras_bilinear.keras_private.graph import states_kept
from keras_bilinear.keras_private.training import higher_is_better, metric_direction
from keras_bilinear.progress import track
from keras_bilinear.rewriting.answers import read_inputs


class Measure:
    """Measures models on the same data.

    Args:
        full: the full model, or a copy that is compiled alike: its metrics are reset.
        data: validation data, see `smallest_plan`.
        metric: what to measure, see `smallest_plan`.
        mode: `"max"`, `"min"` or `"auto"`.

    Raises:
        ValueError: if the data or the metric are not valid, or the metric is not finite.
    """

    def __init__(self, full: keras.Model, data: Any, metric: Any, mode: str):
        self._inputs, self._labels = _read(full, data)
        self._full = full
        self._targets: list = []
        self._score, direction = self._find(metric, mode)
        self._sign = 1 if (direction if mode == "auto" else mode) == "max" else -1
        self._full_score = self._score(full)
        if not math.isfinite(self._full_score):
            raise ValueError(
                "The metric of the full model must be finite. "
                f"Received: {self._full_score} for metric={metric!r}"
            )

    def drop(self, small: keras.Model) -> float:
        """By how much a model is worse than the full model; negative if it is better."""
        return self._sign * (self._full_score - self._score(small))

    def _find(self, metric, mode) -> tuple[Callable[[keras.Model], float], str]:
        """The function that measures a model, and which direction is better."""
        compiled = self._compiled_metrics()
        if metric is None and len(compiled) > 1:
            metric = next((name for name in compiled if not name.endswith("loss")), None)
        if isinstance(metric, str) and metric in compiled:
            name = metric
            callback = keras.callbacks.Callback()
            callback.set_model(self._full)
            higher = higher_is_better(callback, name, mode)
            return lambda model: self._evaluate(model)[name], "max" if higher else "min"
        # What is compared with the full model needs its outputs only once.
        outputs = self._outputs(self._full)
        if metric is None:
            _check_answers(outputs)
            self._targets = outputs
            return self._agreement, "max"
        self._targets = outputs if self._labels is None else self._labels
        metric = _named(metric, compiled)
        if isinstance(metric, keras.metrics.Metric):
            direction = metric_direction(metric)
            if direction is None and mode == "auto":
                raise ValueError(
                    'Whether a larger metric is better is not known: give mode="max" or "min". '
                    f"Received: metric={metric!r}"
                )
            return lambda model: self._update(metric, model), direction or mode
        return lambda model: self._call(metric, model), "max"

    def _compiled_metrics(self) -> dict[str, float]:
        """The metrics that the model is compiled with, and the loss; none without labels."""
        if self._labels is None or not getattr(self._full, "compiled", False):
            return {}
        return self._evaluate(self._full)

    def _evaluate(self, model: Any) -> dict[str, float]:
        data = _LabeledBatches(self._inputs, self._labels)
        with states_kept(model):
            found = model.evaluate(data, verbose=0, return_dict=True)
        return {name: float(value) for name, value in found.items()}

    def _outputs(self, model) -> list:
        """What a model makes of each batch, in the structure of its outputs."""
        with states_kept(model):
            return [
                tree.map_structure(np.asarray, model.predict_on_batch(inputs))
                for inputs in track(self._inputs, "measuring")
            ]

    def _agreement(self, model) -> float:
        same = total = 0
        for targets, outputs in zip(self._targets, self._outputs(model), strict=True):
            for target, output in zip(tree.flatten(targets), tree.flatten(outputs), strict=True):
                agree = _answers(target) == _answers(output)
                same, total = same + int(agree.sum()), total + agree.size
        return same / total

    def _update(self, metric, model) -> float:
        metric.reset_state()
        for targets, outputs in zip(self._targets, self._outputs(model), strict=True):
            metric.update_state(targets, outputs)
        return _number(keras.ops.convert_to_numpy(metric.result()), metric)

    def _call(self, function, model) -> float:
        targets, outputs = (_concatenate(x) for x in (self._targets, self._outputs(model)))
        return _number(function(targets, outputs), function)


class _LabeledBatches(keras.utils.PyDataset):
    """Batches of inputs and labels, as `evaluate` reads them."""

    def __init__(self, inputs: list, labels: Any):
        super().__init__()
        self._items = [*zip(inputs, labels, strict=True)]

    def __len__(self):
        return len(self._items)

    def __getitem__(self, index):
        return self._items[index]


def _read(model, data) -> tuple[list, list | None]:
    """The inputs of each batch, and the labels of each batch or `None`."""
    batches = [*model_batches(data, model, "validation_data")]
    inputs = [read_inputs(batch) for batch in batches]
    if isinstance(data, tuple):
        _, labels, _ = keras.utils.unpack_x_y_sample_weight(data)
        if labels is None:
            return inputs, None
        ends = np.cumsum([0, *map(count_examples, batches)])
        labels = tree.map_structure(_to_numpy, labels)
        for array in tree.flatten(labels):
            if array.ndim == 0 or len(array) != ends[-1]:
                raise ValueError(
                    "`validation_data` must have an array with a label for each of the "
                    f"{ends[-1]} examples. Received: {describe(array)}"
                )
        return inputs, [
            tree.map_structure(lambda array, a=start, b=end: array[a:b], labels)
            for start, end in itertools.pairwise(ends)
        ]
    found = [keras.utils.unpack_x_y_sample_weight(batch)[1] for batch in batches]
    if any(labels is None for labels in found):
        return inputs, None
    return inputs, [tree.map_structure(_to_numpy, labels) for labels in found]


def _to_numpy(values):
    return np.asarray(keras.ops.convert_to_numpy(values) if hasattr(values, "shape") else values)


def _named(metric, compiled):
    """A metric of Keras by its name; anything else as it is.

    Raises:
        ValueError: if it is no metric.
    """
    found = metric
    if isinstance(metric, str):
        # Keras knows only with the shapes of labels what accuracy is meant.
        try:
            found = None if metric in ("accuracy", "acc") else keras.metrics.get(metric)
        except ValueError:
            found = None
    if not callable(found):
        known = ", ".join(map(repr, compiled)) or "none, or there are no labels"
        raise ValueError(
            "`metric` must be a metric that the model is compiled with, a metric of Keras or a "
            f"function. The compiled metrics are {known}. Received: metric={metric!r}"
        )
    return found


def _number(value, metric) -> float:
    """A metric as a number: the mean over examples if there is one for each."""
    try:
        return float(np.mean(_to_numpy(value)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`metric` must give a number. Received: {describe(value)} from {metric!r}"
        ) from error


def _concatenate(batches: list) -> Any:
    return tree.map_structure(lambda *parts: np.concatenate(parts), *batches)


def _check_answers(batches: list) -> None:
    """Checks that outputs are answers: numbers along an axis of which the largest counts.

    Raises:
        ValueError: if they are not.
    """
    for output in tree.flatten(batches[0]):
        between = output.shape[-1:] == (1,) and np.all((output >= 0) & (output <= 1))
        if output.ndim < 2 or (output.shape[-1] < 2 and not between):
            raise ValueError(
                "The agreement is that of outputs with several numbers, or of probabilities: give "
                f"a `metric`. Received: outputs of shape {output.shape}"
            )


def _answers(output: np.ndarray) -> np.ndarray:
    """The answers in an output: the positions of the largest numbers, or what is above 0.5."""
    return output > 0.5 if output.shape[-1] == 1 else output.argmax(-1)
