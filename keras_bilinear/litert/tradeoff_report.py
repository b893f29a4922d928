"""What the LiteRT files of a model and of smaller models take and how well they answer."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from typing import Any

import rich.table

from keras_bilinear.reports.plots import (
    BILINEAR_COLOR,
    FAINT,
    INK,
    draw_points,
    finish_figure,
    label_bytes,
    new_figure,
)
from keras_bilinear.tables import Tabular, bytes_text, right

# Rows of labels for which a figure of two clouds of points is high enough.
_FIGURE_ROWS = 12
_COLORS = {"original": FAINT, "truncated SVD": INK}
_MARKERS = {None: "o", "dynamic_int8": "s", "int8": "^"}
# What the metric may drop by if no limit is given.
_MAX_DROP = 0.01


@dataclasses.dataclass(frozen=True)
class Variant:
    """A LiteRT file of a model, or why there is none. Part of a `Tradeoff`.

    Attributes:
        model: `"original"`; `"rewritten"`; `"recovered"`, which is rewritten and then trained by
            `recover`; or `"truncated SVD"`, in which the layers that are rewritten get kernels of
            low rank and of the same size, without a look at data.
        budget: the share of the parameters that the plan kept to; `None` for the original.
        quantize: how the file stores numbers, as `export_litert` takes it. `None` as well if there
            is no model.
        parameters: number of values stored in all weights; `None` if there is no model.
        file: name of the file in the folder; `None` if there is no file.
        bytes: size of the file in bytes; `None` if there is no file.
        metric: the metric of the file on the held-out examples; `None` if there is no file.
        latency_us: median microseconds of a run on one thread; `None` if there is no file.
        error: why there is no file; empty if there is a file.
    """

    model: str
    budget: float | None
    quantize: str | None
    parameters: int | None = None
    file: str | None = None
    bytes: int | None = None
    metric: float | None = None
    latency_us: float | None = None
    error: str = ""

    @property
    def name(self) -> str:
        """A name, such as `"rewritten 0.25, dynamic_int8"`."""
        return f"{self.model_name}, {self.numbers}"

    @property
    def numbers(self) -> str:
        """How the file stores numbers, such as `"dynamic_int8"`; `"float32"` if not quantized."""
        return self.quantize or "float32"

    @property
    def model_name(self) -> str:
        """The name without the kind of numbers, such as `"rewritten 0.25"`."""
        return self.model if self.budget is None else f"{self.model} {self.budget:g}"


@dataclasses.dataclass(frozen=True)
class Tradeoff(Tabular):
    """The files of a model and of smaller models side by side. Made by `tradeoff`.

    `print` shows it as a table, as does the last line of a notebook's cell.

    Attributes:
        metric: name of the metric. A larger value is better.
        examples: number of held-out examples that the metric is of.
        original: the metric of the model itself, before any export.
        variants: a `Variant` for each file.
        made_from: a digest of the model, the data and the options.
    """

    metric: str
    examples: int
    original: float
    variants: tuple[Variant, ...] = ()
    made_from: str = ""

    @property
    def measured(self) -> tuple[Variant, ...]:
        """The variants with a file and a metric that is a number."""
        return tuple(one for one in self.variants if not one.error and math.isfinite(_metric(one)))

    @property
    def front(self) -> tuple[Variant, ...]:
        """The variants that nothing beats, the smallest first.

        A variant beats another variant if it has no more bytes and no lower metric, and fewer
        bytes or a higher metric.
        """
        front = [
            one for one in self.measured if not any(_beats(other, one) for other in self.measured)
        ]
        return tuple(sorted(front, key=_bytes))

    def best(self, max_bytes: int | None = None, max_drop: float | None = None) -> Variant | None:
        """The variant to ship under a limit.

        Args:
            max_bytes: the most bytes of the file. Without `max_drop`, the variant with the highest
                metric is the best.
            max_drop: by how much the metric may be lower than that of the model itself, such as
                0.01 for a percentage point of accuracy. The smallest file is the best. `None`
                means 0.01 if `max_bytes` is not given either.

        Returns:
            A `Variant`; `None` if no file keeps to the limit.

        Raises:
            ValueError: if a limit is negative or no number.
        """
        most, drop = _limits(max_bytes, max_drop)
        fits = [
            one
            for one in self.measured
            if _bytes(one) <= most and not _metric(one) < self.original - drop
        ]
        if math.isinf(drop):
            return min(fits, key=lambda one: (-_metric(one), _bytes(one)), default=None)
        return min(fits, key=lambda one: (_bytes(one), -_metric(one)), default=None)

    def advice(self, max_bytes: int | None = None, max_drop: float | None = None) -> str:
        """Says what to ship under a limit, in a sentence or two.

        Args:
            max_bytes: the most bytes of the file, as for `best`.
            max_drop: by how much the metric may be lower than that of the model itself, as for
                `best`.

        Raises:
            ValueError: if a limit is negative or no number.
        """
        best = self.best(max_bytes, max_drop)
        most, drop = _limits(max_bytes, max_drop)
        limits = [
            *([] if math.isinf(most) else [f"at most {bytes_text(most)}"]),
            *([] if math.isinf(drop) else [f"at most {drop:g} of {self.metric} lost"]),
        ]
        condition = f"With {' and '.join(limits)}"
        if best is None:
            return f"{condition}, there is nothing to ship.{self._nearest(most)}"
        text = f"{condition}, ship {self._describe(best)}."
        if best.model == "original":
            better = "better" if math.isinf(drop) else "smaller"
            text += f" No rewritten file within this limit is {better}."
        others = [one for one in self.measured if one.model == "original" and one != best]
        if not others:
            return text
        return f"{text} Compare {self._describe(min(others, key=_bytes))}."

    def _nearest(self, most: float) -> str:
        """The file that misses a limit by the least, as a sentence."""
        if not self.measured:
            return " No file could be made."
        small_enough = [one for one in self.measured if _bytes(one) <= most]
        if small_enough:
            nearest = max(small_enough, key=_metric)
            return f" The best file of this size is {self._describe(nearest)}."
        nearest = min(self.measured, key=_bytes)
        return f" The smallest file is {self._describe(nearest)}."

    def _describe(self, variant):
        return f"{variant.name} ({variant.file}: {self._numbers(variant)})"

    def _numbers(self, variant):
        return (
            f"{bytes_text(_bytes(variant))}, {self.metric} {_metric(variant):.4f}, "
            f"{_microseconds(variant)}"
        )

    def table(self) -> rich.table.Table:
        """A `rich.table.Table` with a row for each variant."""
        table = rich.table.Table(
            "model",
            "numbers",
            *right("parameters", "bytes", "latency", self.metric),
            "",
            title=f"LiteRT files, {self.metric} on {self.examples:,} held-out examples",
            caption=(
                f"{self.metric} of the model itself: {self.original:.4f}. "
                f"* marks the files that no other file beats in both bytes and {self.metric}. "
                f"{self.advice()}"
            ),
        )
        front = self.front
        for variant in self.variants:
            if variant.parameters is None:  # There is no model.
                table.add_row(variant.model_name, *[""] * 5, variant.error)
                continue
            measured = ["", "", ""]
            if not variant.error:
                size, latency = bytes_text(_bytes(variant)), _microseconds(variant)
                measured = [size, latency, f"{_metric(variant):.4f}"]
            table.add_row(
                variant.model_name,
                variant.numbers,
                f"{variant.parameters:,}",
                *measured,
                "*" if variant in front else variant.error,
            )
        return table

    def to_json(self) -> str:
        """All attributes as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Tradeoff":
        """The result that `to_json` wrote.

        Raises:
            ValueError: if the text is no such result.
        """
        try:
            content = json.loads(text)
            variants = tuple(Variant(**variant) for variant in content.pop("variants"))
            return cls(**content, variants=variants)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"The text is no tradeoff: {type(error).__name__}: {error}") from error

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """Draws the metric against bytes and against latency. Needs Matplotlib.

        A line joins the variants that nothing beats. Rewritten models are hollow, recovered models
        are filled.

        Args:
            path: the file to write. Its suffix, such as `.png` or `.svg`, decides the format.
                `None` writes no file: the figure becomes the current figure of
                `matplotlib.pyplot`, which a notebook shows, and `matplotlib.pyplot.show()` in a
                script.

        Returns:
            A `matplotlib.figure.Figure`.
        """
        figure, (left, right_axes) = new_figure(_FIGURE_ROWS, 2, pyplot=path is None)
        front = [(_bytes(one), _metric(one)) for one in self.front]
        draw_points(left, self._groups(_bytes), f"{self.metric} against bytes", front)
        left.set_xscale("log")
        label_bytes(left.xaxis)
        if front:
            left.legend(frameon=False, fontsize=8)
        draw_points(right_axes, self._groups(_latency), f"{self.metric} against latency")
        right_axes.set_xlim(left=0)
        right_axes.set_xlabel("µs of a run on one thread")
        title = f"LiteRT files on {self.examples:,} held-out examples"
        return finish_figure(figure, title, path)

    def _groups(self, value: Callable[[Variant], float]) -> list[tuple[list, dict[str, Any]]]:
        """Points of variants of one kind, with the style of the kind."""
        groups: dict[tuple, list] = {}
        for one in self.measured:
            groups.setdefault((one.model, one.quantize), []).append((value(one), _metric(one)))
        return [
            (
                points,
                {
                    "label": f"{model}, {quantize or 'float32'}",
                    "marker": _MARKERS[quantize],
                    "edgecolors": _COLORS.get(model, BILINEAR_COLOR),
                    "facecolors": "white"
                    if model == "rewritten"
                    else _COLORS.get(model, BILINEAR_COLOR),
                },
            )
            for (model, quantize), points in groups.items()
        ]


def _limits(max_bytes, max_drop) -> tuple[float, float]:
    """Both limits as numbers: infinity for none, and a drop of 0.01 if none is given.

    Raises:
        ValueError: if a limit is negative or no number.
    """
    for name, value in (("max_bytes", max_bytes), ("max_drop", max_drop)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and value >= 0):
            raise ValueError(f"`{name}` must be a number, not negative. Received: {name}={value!r}")
    if max_drop is None:
        max_drop = _MAX_DROP if max_bytes is None else math.inf
    return (math.inf if max_bytes is None else max_bytes), max_drop


def _beats(other: Variant, one: Variant) -> bool:
    """Whether a variant is no worse than another one in both respects, and better in one."""
    sizes, metrics = (_bytes(other), _bytes(one)), (_metric(other), _metric(one))
    no_worse = sizes[0] <= sizes[1] and metrics[0] >= metrics[1]
    return no_worse and (sizes[0] < sizes[1] or metrics[0] > metrics[1])


def _bytes(variant: Variant) -> int:
    return variant.bytes or 0


def _metric(variant: Variant) -> float:
    return math.nan if variant.metric is None else variant.metric


def _latency(variant: Variant) -> float:
    return math.nan if variant.latency_us is None else variant.latency_us


def _microseconds(variant: Variant) -> str:
    if variant.latency_us is None:
        return ""
    return f"{variant.latency_us:,.{1 if variant.latency_us < 100 else 0}f} µs"
