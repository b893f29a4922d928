"""How well LiteRT files answer examples that no layer was fitted to."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_bilinear.litert.comparison import answering, parts
from keras_bilinear.litert.converter import named_outputs
from keras_bilinear.litert.export import inference_twin
from keras_bilinear.litert.run import run_litert
from keras_bilinear.reports.accuracy import right_answers, takes_logits
from keras_bilinear.rewriting.output_losses import output_losses

# Outputs of a model by their names in a file.
Outputs = dict[str, np.ndarray]


class HeldOut:
    """Examples with what a model makes of them, and a metric of other outputs for them.

    Args:
        model: the model.
        arguments: the nested specs of its arguments, as `input_specs` gives them.
        inputs: for each input, by name, the values of all runs, as `read_examples` gives them.
        labels: the labels of the examples; `None` to measure the agreement with the model.
        metric: a function of labels and outputs; `None` for the accuracy.

    Attributes:
        metric: name of the metric.
        count: number of examples.
        original: the metric of the model itself.

    Raises:
        ValueError: if labels or the results of the metric are not valid.
    """

    def __init__(
        self,
        model: keras.Model,
        arguments: list,
        inputs: dict[str, np.ndarray],
        labels: Any,
        metric: Callable[[Any, Any], Any] | None,
    ):
        self._inputs = inputs
        runs = min(map(len, inputs.values()))
        answer = answering(inference_twin(model), arguments)
        each = [answer([values[run] for values in inputs.values()]) for run in range(runs)]
        outputs = keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *each)
        named = named_outputs(outputs)
        first = keras.tree.flatten(each[0])
        self._run_bytes = sum(array.nbytes for array in first)
        self._run_bytes += sum(values[0].nbytes for values in inputs.values())
        self.count = runs * next(iter(inputs.values())).shape[1]
        if labels is None:
            self.metric = "agreement"
            self._measure = _agreement(model, outputs)
        else:
            # A file takes whole batches, so some of the last examples may be left out.
            labels = keras.tree.map_structure(lambda values: values[: self.count], labels)
            self.metric = "accuracy" if metric is None else _name(metric)
            self._measure = (
                _accuracy(model, labels, named) if metric is None else _own(metric, labels)
            )
        self.original = self._measure(named)

    def measure(self, path: Any) -> float:
        """The metric of a LiteRT file.

        Raises:
            ValueError: if the metric is no number.
            RuntimeError: if LiteRT cannot run the file.
        """
        runs = [
            run_litert(path, part, seconds=0.0).outputs
            for part in parts(self._inputs, self._run_bytes)
        ]
        outputs = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
        return self._measure(
            {name: values.reshape(-1, *values.shape[2:]) for name, values in outputs.items()}
        )

    def latency(self, path: Any, seconds: float) -> float:
        """The median microseconds of a run of a LiteRT file on the first inputs.

        Raises:
            RuntimeError: if LiteRT cannot run the file.
        """
        first = {name: values[:1] for name, values in self._inputs.items()}
        return run_litert(path, first, seconds=seconds).latency_us


def _name(metric):
    return getattr(metric, "__name__", None) or type(metric).__name__


def _own(metric, labels) -> Callable[[Outputs], float]:
    """A metric of the user's, which gets the array of a single output."""

    def measure(outputs):
        found = metric(labels, outputs if len(outputs) > 1 else next(iter(outputs.values())))
        value = np.asarray(keras.ops.convert_to_numpy(found))
        if value.size != 1 or value.dtype.kind not in "biuf":
            raise ValueError(
                "`metric` must return a number for labels and outputs. "
                f"Received: {found!r} from {_name(metric)}"
            )
        return float(value.reshape(()))

    return measure


def _accuracy(model, labels, outputs: Outputs) -> Callable[[Outputs], float]:
    """The share of right answers of a single output."""
    if len(outputs) > 1 or keras.tree.is_nested(labels):
        raise ValueError(
            "The labels of a model with several outputs need a `metric`, which gets the labels and "
            f"a dictionary of the outputs. Received: outputs {', '.join(outputs)}"
        )
    if not np.array_equal(labels, np.round(labels)):
        raise ValueError(
            "Accuracy needs labels that are integers or one-hot vectors. Give a `metric` for other "
            f"labels. Received: labels of type {labels.dtype}"
        )
    name = (getattr(model, "output_names", None) or ["output_0"])[0]
    logits = takes_logits(model, name, [name])

    def measure(outputs):
        (values,) = outputs.values()
        return float(right_answers(labels, values, logits).mean())

    return measure


def _agreement(model, outputs: Any) -> Callable[[Outputs], float]:
    """How far other outputs agree with those of the model; the least of all outputs."""
    losses = output_losses("auto", model, model, outputs)
    kinds = named_outputs(keras.tree.pack_sequence_as(outputs, losses))
    expected = named_outputs(outputs)

    def measure(actual):
        return min(
            _output_agreement(kinds[name], values, actual[name])
            for name, values in expected.items()
        )

    return measure


def _output_agreement(loss: Any, expected: np.ndarray, actual: np.ndarray) -> float:
    """The share of the same answers, or 1 less the relative error where there are no answers."""
    if loss.name.startswith("divergence"):
        return float(np.mean(expected.argmax(-1) == actual.argmax(-1)))
    if loss.name.startswith("binary"):
        least = 0.0 if loss.name.endswith("logits") else 0.5
        return float(np.mean((expected > least) == (actual > least)))
    squares = np.square(expected.astype("float64") - actual.astype("float64"))
    return 1 - float(np.sqrt(loss.scale * squares.mean()))
