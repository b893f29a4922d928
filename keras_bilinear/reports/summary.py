"""What a model costs and how well it does; of two of them, side by side."""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator

import keras
import numpy as np
import rich.table

from keras_bilinear.data import batch_size, batches, model_batches
from keras_bilinear.keras_private.capture import record
from keras_bilinear.keras_private.graph import states_kept
from keras_bilinear.reports.macs import count_call, count_workspace
from keras_bilinear.reports.plots import (
    BILINEAR_COLOR,
    FAINT,
    FULL_COLOR,
    TITLE,
    draw_bars,
    finish_figure,
    new_figure,
)
from keras_bilinear.reports.timing import compile_forward, median_seconds
from keras_bilinear.rewriting.sites import check_built, walk
from keras_bilinear.tables import Tabular, bytes_text, count_text, right


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """What one layer costs.

    Attributes:
        path: names of the layers that hold it and its own, joined by `/`.
        type: name of its class.
        parameters: numbers stored in its weights.
        bytes: bytes of its weights.
        macs: multiply-accumulate operations of its projections for one example,
            over all its calls; `None` if they are not known.
        activation_bytes: what its largest call takes for one example: inputs,
            outputs, and what lies between both factors; `None` if not known.
    """

    path: str
    type: str
    parameters: int
    bytes: int
    macs: int | None
    activation_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Summary(Tabular):
    """What a model costs, and how well it does. Made by `summarize`.

    Attributes:
        name: the model's name.
        layers: a `LayerSummary` of each layer with weights.
        parameters: numbers stored in all weights.
        bytes: bytes of all weights.
        macs: multiply-accumulate operations of the projections of all layers for
            one example, but for those in `not_counted`; `None` without an example.
        peak_activation_bytes: what the layer that takes most takes for one
            example; `None` without an example.
        latency_ms: median milliseconds for one example, compiled; `None` without
            an example.
        accuracy: share of examples with the right answer; `None` without data.
    """

    name: str
    layers: tuple[LayerSummary, ...]
    parameters: int
    bytes: int
    macs: int | None
    peak_activation_bytes: int | None
    latency_ms: float | None
    accuracy: float | None

    @property
    def not_counted(self) -> tuple[str, ...]:
        """Paths of the layers whose operations are not known."""
        return tuple(layer.path for layer in self.layers if layer.macs is None)

    def table(self) -> rich.table.Table:
        """A row for each layer, and one for the model."""
        table = rich.table.Table(
            "layer",
            "type",
            *right("parameters", "bytes", "MACs", "activations"),
            title=_title(self),
            show_footer=True,
        )
        for layer in self.layers:
            table.add_row(
                layer.path,
                layer.type,
                f"{layer.parameters:,}",
                bytes_text(layer.bytes),
                _text(layer.macs, "{:,}".format),
                _text(layer.activation_bytes, bytes_text),
            )
        footer = (
            "all",
            "",
            f"{self.parameters:,}",
            bytes_text(self.bytes),
            _text(self.macs, "{:,}".format),
            _text(self.peak_activation_bytes, bytes_text),
        )
        for column, text in zip(table.columns, footer, strict=True):
            column.footer = text
        return table

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def plot(self, path: str | os.PathLike | None = None):
        """Bars of the parameters of each layer.

        Args:
            path: where to write them, as PNG, SVG or whatever matplotlib takes
                the suffix for; `None` writes nothing.

        Returns:
            A `matplotlib.figure.Figure`.
        """
        figure, axes = new_figure(len(self.layers), 1)
        sizes = [[layer.parameters for layer in self.layers]]
        draw_bars(axes, [layer.path for layer in self.layers], sizes, [BILINEAR_COLOR])
        return finish_figure(figure, _title(self), path)


@dataclasses.dataclass(frozen=True)
class Comparison(Tabular):
    """Two models side by side. Made by `compare`.

    Attributes:
        full: summary of the one.
        small: summary of the other, whose layers have the same paths.
    """

    full: Summary
    small: Summary

    def table(self) -> rich.table.Table:
        """A row for each layer that differs, and one for each total."""
        table = rich.table.Table(
            "", *right("full", "small", "full / small"), title=f"{self.full.name}, full and small"
        )
        for label, form, of in _COLUMNS:
            full, small = of(self.full), of(self.small)
            if full is not None and small is not None:
                table.add_row(label, form(full), form(small), _ratio(full, small, label))
        table.add_section()
        for path, full, small in self._layers():
            if (full.type, full.parameters) != (small.type, small.parameters):
                table.add_row(
                    f"{path}: {full.type} to {small.type}",
                    f"{full.parameters:,}",
                    f"{small.parameters:,}",
                    _ratio(full.parameters, small.parameters, "parameters"),
                )
        return table

    def _layers(self) -> Iterator[tuple[str, LayerSummary, LayerSummary]]:
        """The layers that both models have.

        Those of a subclassed model may have other names in a copy of it, but the
        same order.
        """
        full, small = ({one.path: one for one in model.layers} for model in (self.full, self.small))
        if not full.keys() & small.keys() and len(full) == len(small):
            small = dict(zip(full, small.values(), strict=True))
        for path in full:
            if path in small:
                yield path, full[path], small[path]

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def plot(self, path: str | os.PathLike | None = None):
        """Bars of the parameters of each layer and, with data, accuracy against size.

        Args:
            path: see `Summary.plot`.

        Returns:
            A `matplotlib.figure.Figure`.
        """
        layers = [*self._layers()]
        with_accuracy = self.full.accuracy is not None
        figure, axes = new_figure(len(layers), 2 if with_accuracy else 1)
        bars, *others = axes if with_accuracy else [axes]
        sizes = [[both[which].parameters for _, *both in layers] for which in (0, 1)]
        draw_bars(bars, [path for path, *_ in layers], sizes, [FULL_COLOR, BILINEAR_COLOR])
        for scatter in others:
            for label, one, color in (
                ("full", self.full, FAINT),
                ("small", self.small, BILINEAR_COLOR),
            ):
                scatter.scatter(one.parameters, one.accuracy, s=80, color=color, label=label)
            scatter.set_title("Accuracy against parameters", **TITLE)
            scatter.set_xscale("log")
            scatter.legend(frameon=False, labelcolor="linecolor")
            scatter.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
            scatter.grid(color=FULL_COLOR, alpha=0.4)
            scatter.spines[:].set_visible(False)
        return finish_figure(figure, f"{_title(self.full)} to {_title(self.small)}", path)


def summarize(model: keras.Model, data=None) -> Summary:
    """What a model costs: parameters, bytes, operations, activations and latency.

    Operations and activations are those of this backend and device, where a GPU
    forms most kernels. Within `exporting()` they are those of a file.

    Args:
        model: a built model.
        data: examples, to give the accuracy: a tuple of inputs and labels, as
            arrays, or an iterable of batches of both, such as a
            `tf.data.Dataset`. Labels are integers or one-hot vectors; a single
            output answers 1 above 0.5 or, where the model is compiled with a loss
            of logits, above 0. Inputs alone, an array or a dictionary of arrays,
            give no accuracy, but an example for a model whose inputs are not known
            otherwise: one that is subclassed, or has sizes that are not fixed.
            `None` takes zeros.

    Returns:
        A `Summary`: a table when it is printed, or shown in a notebook.

    Raises:
        ValueError: if the model is not built, or if the data have no batch or
            labels that do not fit.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), BilinearDense(256)])
    >>> summary = summarize(model)
    >>> summary.parameters, summary.bytes, summary.macs
    (512, 2048, 3072)
    """
    (summary,) = _summaries([model], data)
    return summary


def count_macs(model: keras.Model) -> int:
    """Multiply-accumulate operations of a model's projections for one example.

    Raises:
        ValueError: if the shape of an example is not known, or if there is a
            layer whose operations cannot be counted.
    """
    example = _zeros(model)
    if example is None:
        raise ValueError(
            "The operations for one example can only be counted if its shape is known. "
            f"Received: model={model!r}"
        )
    costs = _costs(model, example)
    unknown = [path for path, (macs, _) in costs.items() if macs is None]
    if unknown:
        raise ValueError(
            f"The operations of these layers cannot be counted. Received: {', '.join(unknown)}"
        )
    return sum(macs for macs, _ in costs.values())


def compare(full: keras.Model, small: keras.Model, data=None) -> Comparison:
    """Two models side by side, such as a full one and what `rewrite_model` made of it.

    Args:
        full: a built model.
        small: another one for the same inputs.
        data: see `summarize`.

    Returns:
        A `Comparison`: a table when it is printed, or shown in a notebook.

    Raises:
        ValueError: see `summarize`.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(256)])
    >>> small = rewrite_model(model, rank=2)
    >>> comparison = compare(model, small)
    >>> comparison.full.parameters, comparison.small.parameters
    (16640, 768)
    """
    return Comparison(*_summaries([full, small], data))


def _summaries(models, data):
    for model in models:
        check_built(model)
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(states_kept(model))
        return _measured(models, None if data is None else _examples(models[0], data))


def _measured(models, data):
    seconds = [None] * len(models)
    example = _first(models[0], data) if data is not None else _zeros(models[0])
    if example is not None:
        seconds = median_seconds([compile_forward(model, example) for model in models])
    return [
        _summarize(model, data, example, latency)
        for model, latency in zip(models, seconds, strict=True)
    ]


def _summarize(model, data, example, latency):
    paths = {site.path: site for site in walk(model, weightless=True)}
    costs = {path: (None, None) for path in paths} if example is None else _costs(model, example)
    layers = tuple(
        LayerSummary(
            path,
            type(site.layer).__name__,
            site.layer.count_params(),
            _bytes(site.layer.variables),
            *costs[path],
        )
        for path, site in paths.items()
        if site.layer.weights
    )
    known = example is not None
    return Summary(
        name=model.name,
        layers=layers,
        parameters=model.count_params(),
        bytes=_bytes(model.weights),
        macs=sum(layer.macs or 0 for layer in layers) if known else None,
        peak_activation_bytes=max((most for _, most in costs.values()), default=0)
        if known
        else None,
        latency_ms=None if latency is None else 1e3 * latency,
        accuracy=_accuracy(model, data),
    )


def _costs(model, example):
    """`{path: (MACs, bytes of activations)}`, for one example."""
    examples = len(keras.tree.flatten(example)[0])
    sites = {site.path: site for site in walk(model, weightless=True)}
    loops = {
        path: owner
        for path, site in sites.items()
        for owner, _ in site.owners
        if isinstance(owner, keras.layers.RNN)
    }
    layers = {path: site.layer for path, site in sites.items()}
    layers |= {owner: owner for owner in loops.values()}
    calls = record(model, layers, example, _shapes)
    costs = {}
    for path, site in sites.items():
        # A backend may trace the cell of a loop instead of running each of its steps.
        steps = [loop for loop, *_ in calls[loops[path]]] if path in loops else []
        macs, most = 0, 0
        for inputs, outputs, moved, size in calls[path][: 1 if steps else None]:
            count = count_call(site.layer, inputs, outputs)
            times = sum(shape[1] for shape in steps) if steps else 1
            macs = None if count is None or macs is None else macs + times * count
            most = max(most, moved + size * count_workspace(site.layer, inputs, outputs))
        costs[path] = None if macs is None else macs // examples, most // examples
    return costs


def _shapes(inputs, arguments, outputs):
    """Of a call: shapes of inputs and outputs, bytes of both, bytes of a number."""
    del arguments
    tensors = [keras.tree.flatten(side) for side in (inputs, outputs)]
    moved = sum(map(_tensor_bytes, (*tensors[0], *tensors[1])))
    first, last = (tuple(side[0].shape) if side else () for side in tensors)
    return first, last, moved, _item_bytes(tensors[1][0]) if tensors[1] else 0


def _tensor_bytes(tensor):
    shape = getattr(tensor, "shape", (None,))
    return 0 if None in shape else math.prod(shape) * _item_bytes(tensor)


def _item_bytes(tensor):
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


def _bytes(variables):
    return sum(map(_tensor_bytes, variables))


def _zeros(model):
    """An example of zeros; `None` if the model does not say of what shape."""
    if not hasattr(model, "inputs"):  # subclassed
        return None
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    if any(None in one.shape[1:] or one.dtype == "string" for one in model.inputs):
        return None
    return keras.tree.map_structure(
        lambda one: np.zeros((one.shape[0] or 1, *one.shape[1:]), one.dtype), inputs
    )


def _examples(model, data) -> Iterable:
    """Batches of inputs, or of inputs and labels."""
    if not isinstance(data, tuple):
        return model_batches(data, model)
    inputs, labels = data
    inputs = [
        keras.utils.unpack_x_y_sample_weight(batch)[0] for batch in model_batches(inputs, model)
    ]
    labels = [*batches(np.asarray(labels), size=batch_size(model))]
    if len(inputs) != len(labels):
        raise ValueError("`data` must have as many labels as examples.")
    return [*zip(inputs, labels, strict=True)]


def _first(model, data):
    """An example, or as many as the states of the model are for."""
    inputs, *_ = keras.utils.unpack_x_y_sample_weight(next(iter(data)))
    least = slice(batch_size(model, 1))
    return keras.tree.map_structure(lambda x: keras.ops.convert_to_numpy(x)[least], inputs)


def _accuracy(model, data):
    right = total = 0
    threshold = 0.0 if getattr(getattr(model, "loss", None), "from_logits", False) else 0.5
    for batch in data or ():
        inputs, labels, _ = keras.utils.unpack_x_y_sample_weight(batch)
        if labels is None:
            return None
        # Batches may be of another library than the backend.
        inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, inputs)
        outputs = model.predict_on_batch(inputs)
        if keras.tree.is_nested(outputs):
            raise ValueError(
                "Accuracy is that of a model with one output: give `data` without labels. "
                f"Received: model={model.name!r} with {len(outputs)} outputs"
            )
        outputs = np.asarray(outputs)
        labels = np.asarray(keras.ops.convert_to_numpy(labels))
        answers = outputs.argmax(-1) if outputs.shape[-1] > 1 else outputs[..., 0] > threshold
        if labels.ndim == outputs.ndim and labels.shape[-1] == 1:
            labels = labels[..., 0]
        elif labels.shape == outputs.shape:
            labels = labels.argmax(-1)
        if labels.shape != answers.shape:
            raise ValueError(
                "`data` must have a label, an integer or a one-hot vector, for each output. "
                f"Received: labels of shape {labels.shape} for outputs of shape {outputs.shape}"
            )
        right += (answers == labels).sum()
        total += labels.size
    return float(right / total) if total else None


def _milliseconds(value):
    return f"{value:.3g} ms"


# Label, text of the value, and where it stands.
_COLUMNS = (
    ("parameters", "{:,}".format, lambda one: one.parameters),
    ("bytes", bytes_text, lambda one: one.bytes),
    ("MACs", "{:,}".format, lambda one: one.macs),
    ("peak activations", bytes_text, lambda one: one.peak_activation_bytes),
    ("latency", _milliseconds, lambda one: one.latency_ms),
    ("accuracy", "{:.2%}".format, lambda one: one.accuracy),
)


def _ratio(full, small, label):
    return f"{full / small:.1f}" if small and label != "accuracy" else ""


def _text(value, form):
    return "unknown" if value is None else form(value)


def _title(summary):
    parts = [f"{summary.name}: {count_text(summary.parameters)} parameters"]
    if summary.latency_ms is not None:
        parts.append(_milliseconds(summary.latency_ms))
    if summary.accuracy is not None:
        parts.append(f"accuracy {summary.accuracy:.2%}")
    return ", ".join(parts)
