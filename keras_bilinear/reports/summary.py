"""What a model costs and how well it does; two models side by side."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import rich.table

from keras_bilinear.data import first_example, zeros
from keras_bilinear.keras_private.graph import states_kept
from keras_bilinear.layers.macs import count_workspace
from keras_bilinear.progress import shown
from keras_bilinear.reports.accuracy import accuracy, read_examples
from keras_bilinear.reports.plots import (
    BILINEAR_COLOR,
    FAINT,
    FULL_COLOR,
    draw_accuracy,
    draw_parameters,
    finish_figure,
    new_figure,
)
from keras_bilinear.reports.timing import compile_forward, median_seconds
from keras_bilinear.rewriting.operations import count_bytes, count_calls, record_calls
from keras_bilinear.rewriting.sites import check_built, walk
from keras_bilinear.tables import Tabular, bytes_text, count_text, milliseconds_text, right


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """What one layer costs. Part of a `Summary`.

    Attributes:
        path: the names of the layers that hold the layer and its own name, joined by `/`.
        type: name of the layer's class.
        parameters: number of values stored in the layer's weights.
        bytes: bytes of the layer's weights.
        macs: multiply-accumulate operations of the layer's projections for one example, added up
            over all calls of the layer. `None` if they are unknown.
        activation_bytes: bytes of the inputs, the outputs and the values between both factors in
            the layer's largest call for one example. Kernels do not count, stored or formed for
            the call. `None` if they are unknown.
    """

    path: str
    type: str
    parameters: int
    bytes: int
    macs: int | None
    activation_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Summary(Tabular):
    """What a model costs and how well it does. Made by `summarize`.

    `print` shows it as a table, as does the last line of a notebook's cell.

    Attributes:
        name: the model's name.
        layers: a `LayerSummary` for each layer with weights.
        parameters: number of values stored in all weights; shared weights count once.
        bytes: bytes of all weights.
        macs: multiply-accumulate operations of the projections of all layers for one example.
            Layers in `not_counted` are left out. `None` if the shape of an example is unknown.
        peak_activation_bytes: the largest `activation_bytes` of a layer, layers without weights
            included. `None` if the shape of an example is unknown.
        latency_ms: median milliseconds of a compiled inference call on one example. `None` if the
            shape of an example is unknown.
        accuracy: share of the examples that the model answers right, from 0 to 1. For a model
            with several outputs a dictionary of the shares, by the names of the outputs. `None`
            without labels.
    """

    name: str
    layers: tuple[LayerSummary, ...]
    parameters: int
    bytes: int
    macs: int | None
    peak_activation_bytes: int | None
    latency_ms: float | None
    accuracy: float | dict[str, float] | None

    @property
    def not_counted(self) -> tuple[str, ...]:
        """Paths of the layers whose operations are unknown."""
        return tuple(layer.path for layer in self.layers if layer.macs is None)

    def table(self) -> rich.table.Table:
        """A `rich.table.Table` with a row for each layer and a footer for the model."""
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
        """All attributes as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """Draws the parameters of each layer as bars. Needs Matplotlib.

        Args:
            path: the file to write. Its suffix, such as `.png` or `.svg`, decides the format.
                `None` writes no file: the figure becomes the current figure of
                `matplotlib.pyplot`, which a notebook shows, and `matplotlib.pyplot.show()` in a
                script.

        Returns:
            A `matplotlib.figure.Figure`.
        """
        figure, (axes,) = new_figure(len(self.layers), 1, pyplot=path is None)
        counts = [[layer.parameters for layer in self.layers]]
        draw_parameters(axes, [layer.path for layer in self.layers], counts, [BILINEAR_COLOR])
        return finish_figure(figure, _title(self), path)


@dataclasses.dataclass(frozen=True)
class Comparison(Tabular):
    """Two models side by side. Made by `compare`.

    `print` shows it as a table, as does the last line of a notebook's cell.

    Attributes:
        full: the `Summary` of the first model.
        small: the `Summary` of the second model.
    """

    full: Summary
    small: Summary

    def table(self) -> rich.table.Table:
        """A `rich.table.Table` with a row for each total and each layer that differs."""
        table = rich.table.Table(
            "", *right("full", "small", "full / small"), title=f"{self.full.name}, full and small"
        )
        for label, form, attribute in _TOTALS:
            full, small = getattr(self.full, attribute), getattr(self.small, attribute)
            if full is not None and small is not None:
                table.add_row(label, form(full), form(small), _ratio(full, small))
        full, small = _accuracies(self.full), _accuracies(self.small)
        for label, share in full.items():
            if label in small:
                table.add_row(label, f"{share:.2%}", f"{small[label]:.2%}", "")
        table.add_section()
        for path, full, small in self._common_layers():
            if (full.type, full.parameters) != (small.type, small.parameters):
                table.add_row(
                    f"{path}: {full.type} to {small.type}",
                    f"{full.parameters:,}",
                    f"{small.parameters:,}",
                    _ratio(full.parameters, small.parameters),
                )
        return table

    def _common_layers(self) -> Iterator[tuple[str, LayerSummary, LayerSummary]]:
        """The layers that both models have, found by their paths.

        A copy of a subclassed model may give its layers other names. If the models share no
        path and have as many layers, the layers are paired by their order.
        """
        full = {layer.path: layer for layer in self.full.layers}
        small = {layer.path: layer for layer in self.small.layers}
        if not full.keys() & small.keys() and len(full) == len(small):
            small = dict(zip(full, small.values(), strict=True))
        for path in full:
            if path in small:
                yield path, full[path], small[path]

    def to_json(self) -> str:
        """Both summaries as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """Draws the parameters of each layer as bars. Needs Matplotlib.

        If the accuracy is known, a second picture shows it against the parameters.

        Args:
            path: the file to write. Its suffix, such as `.png` or `.svg`, decides the format.
                `None` writes no file: the figure becomes the current figure of
                `matplotlib.pyplot`, which a notebook shows, and `matplotlib.pyplot.show()` in a
                script.

        Returns:
            A `matplotlib.figure.Figure`.
        """
        layers = [*self._common_layers()]
        with_accuracy = bool(_accuracies(self.full))
        columns = 2 if with_accuracy else 1
        figure, axes = new_figure(len(layers), columns, pyplot=path is None)
        counts = [
            [full.parameters for _, full, _ in layers],
            [small.parameters for _, _, small in layers],
        ]
        paths = [path for path, *_ in layers]
        draw_parameters(axes[0], paths, counts, [FULL_COLOR, BILINEAR_COLOR])
        if with_accuracy:
            models = [
                (label + accuracy.removeprefix("accuracy"), summary.parameters, share, color)
                for label, summary, color in (
                    ("full", self.full, FAINT),
                    ("small", self.small, BILINEAR_COLOR),
                )
                for accuracy, share in _accuracies(summary).items()
            ]
            draw_accuracy(axes[1], models)
        return finish_figure(figure, f"{_title(self.full)} to {_title(self.small)}", path)


def summarize(model: keras.Model, data: Any = None, verbose: int | str = "auto") -> Summary:
    """Finds what a model costs: parameters, bytes, operations, activations and latency.

    Operations and activations depend on the backend and the device: on a GPU most layers form their
    kernels. Within `exporting()` they are the operations and activations of an exported file.

    Args:
        model: a built model.
        data: examples of the model's inputs. For the accuracy, give inputs and labels: a tuple
            of two arrays, or an iterable of batches such as a `tf.data.Dataset`. Labels are
            integers or one-hot vectors; those of several outputs are in a dictionary by the
            names of the outputs, some of which may have none, or in a list in their order. An
            output of size 1 answers 1 above 0.5, or above 0 if the model is compiled with a
            loss that takes logits.
            Inputs without labels, an array or a dictionary of arrays, give no accuracy. A model
            that does not tell the shape of its inputs needs them: a subclassed model, or a model
            with a size that is not fixed. `None` measures on zeros.
        verbose: 1 shows on stderr, or in a notebook, how far the work is; 0 shows nothing.
            `"auto"` is 1 in a terminal and in a notebook, 0 elsewhere.

    Returns:
        A `Summary`, which prints as a table.

    Raises:
        TypeError: if `data` are neither arrays nor an iterable of batches.
        ValueError: if the model is not built, if `data` have no batch, if the labels do not
            fit the outputs, or if `verbose` is not valid.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), BilinearDense(256)])
    >>> summary = summarize(model)
    >>> summary.parameters, summary.bytes, summary.macs
    (512, 2048, 3072)
    """
    with shown(verbose):
        (summary,) = _summaries([model], data)
    return summary


def compare(
    full: keras.Model, small: keras.Model, data: Any = None, verbose: int | str = "auto"
) -> Comparison:
    """Puts two models side by side, such as a full model and the result of `rewrite_model`.

    Both models are measured in turns, so that a machine whose speed drifts treats them alike.

    Args:
        full: a built model.
        small: another built model for the same inputs.
        data: examples of the models' inputs. For the accuracy, give inputs and labels: a tuple
            of two arrays, or an iterable of batches such as a `tf.data.Dataset`. Labels are
            integers or one-hot vectors; those of several outputs are in a dictionary by the
            names of the outputs, some of which may have none, or in a list in their order. An
            output of size 1 answers 1 above 0.5, or above 0 if the model is compiled with a
            loss that takes logits.
            Inputs without labels, an array or a dictionary of arrays, give no accuracy. Models
            that do not tell the shape of their inputs need them: subclassed models, or models
            with a size that is not fixed. `None` measures on zeros.
        verbose: 1 shows on stderr, or in a notebook, how far the work is; 0 shows nothing.
            `"auto"` is 1 in a terminal and in a notebook, 0 elsewhere.

    Returns:
        A `Comparison`, which prints as a table.

    Raises:
        TypeError: if `data` are neither arrays nor an iterable of batches.
        ValueError: if a model is not built, if `data` have no batch, if the labels do not
            fit the outputs, or if `verbose` is not valid.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(256)])
    >>> small = rewrite_model(model, rank=2)
    >>> comparison = compare(model, small)
    >>> comparison.full.parameters, comparison.small.parameters
    (16640, 768)
    """
    with shown(verbose):
        full_summary, small_summary = _summaries([full, small], data)
    return Comparison(full_summary, small_summary)


def count_macs(model: keras.Model) -> int:
    """Counts the multiply-accumulate operations of a model's projections for one example.

    Args:
        model: a built model.

    Raises:
        ValueError: if the shape of an example is unknown, or if the operations of a layer are.
    """
    example = zeros(model)
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
    return sum(macs for macs, _ in costs.values() if macs is not None)


def _summaries(models: Sequence[keras.Model], data: Any) -> list[Summary]:
    """Measures models for the same inputs. Their states stay what they were."""
    for model in models:
        check_built(model)
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(states_kept(model))
        examples = None if data is None else read_examples(models[0], data)
        example = zeros(models[0]) if examples is None else first_example(models[0], examples)
        latencies: list[float | None] = [None] * len(models)
        if example is not None:
            latencies = [*median_seconds([compile_forward(model, example) for model in models])]
        return [
            _summarize(model, examples, example, latency)
            for model, latency in zip(models, latencies, strict=True)
        ]


def _summarize(model, examples, example, latency):
    """The summary of a model, with the seconds of a call; `None` stands for unknown."""
    sites = {site.path: site for site in walk(model, weightless=True)}
    costs = {path: (None, None) for path in sites} if example is None else _costs(model, example)
    layers = tuple(
        LayerSummary(
            path,
            type(site.layer).__name__,
            site.layer.count_params(),
            count_bytes(site.layer.variables),
            *costs[path],
        )
        for path, site in sites.items()
        if site.layer.weights
    )
    macs = peak = None
    if example is not None:
        macs = sum(layer.macs or 0 for layer in layers)
        peak = max((activations or 0 for _, activations in costs.values()), default=0)
    return Summary(
        name=model.name,
        layers=layers,
        parameters=model.count_params(),
        bytes=count_bytes(model.weights),
        macs=macs,
        peak_activation_bytes=peak,
        latency_ms=None if latency is None else 1e3 * latency,
        accuracy=None if examples is None else accuracy(model, examples),
    )


def _costs(model, example) -> dict[str, tuple[int | None, int]]:
    """The operations and the bytes of activations of each layer for one example, by its path."""
    examples = len(keras.tree.flatten(example)[0])
    layers = {site.path: site.layer for site in walk(model, weightless=True)}
    costs = {}
    for path, calls in record_calls(model, example).items():
        macs, most = count_calls(layers[path], calls), 0
        for call in calls:
            between = count_workspace(layers[path], call.inputs, call.outputs)
            most = max(most, call.bytes + call.item_bytes * between)
        costs[path] = None if macs is None else macs // examples, most // examples
    return costs


# Label, text of the value, and attribute of a `Summary`.
_TOTALS = (
    ("parameters", "{:,}".format, "parameters"),
    ("bytes", bytes_text, "bytes"),
    ("MACs", "{:,}".format, "macs"),
    ("peak activations", bytes_text, "peak_activation_bytes"),
    ("latency", milliseconds_text, "latency_ms"),
)


def _accuracies(summary):
    """The accuracy of each output of a model, by its label in tables."""
    if isinstance(summary.accuracy, dict):
        return {f"accuracy of {name}": share for name, share in summary.accuracy.items()}
    return {} if summary.accuracy is None else {"accuracy": summary.accuracy}


def _ratio(full, small):
    return f"{full / small:.1f}" if small else ""


def _text(value, form):
    return "unknown" if value is None else form(value)


def _title(summary):
    parts = [f"{summary.name}: {count_text(summary.parameters)} parameters"]
    if summary.latency_ms is not None:
        parts.append(milliseconds_text(summary.latency_ms))
    parts += [f"{label} {share:.2%}" for label, share in _accuracies(summary).items()]
    return ", ".join(parts)
