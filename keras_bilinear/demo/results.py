"""The results of the demo as a table, as JSON and as a plot."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from rich.table import Table

from keras_bilinear.reports.plots import BILINEAR_COLOR, FAINT, FULL_COLOR, INK, TITLE, percent
from keras_bilinear.tables import bytes_text, milliseconds_text, right


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured on one trained network.

    Attributes:
        parameters: number of values stored in all weights.
        macs: multiply-accumulate operations for one example.
        test_accuracy: share of the test split that the network answers right, after the training.
        keras_bytes: bytes of the `.keras` file.
        litert_bytes: bytes of the `.tflite` file.
        litert_latency_us: median microseconds of a run of the `.tflite` file on one thread.
        litert_difference: difference of the outputs of the `.tflite` file from those of the
            network, as in a `LiteRTReport`.
        step_ms: median milliseconds of a training step.
        accuracy_by_epoch: `test_accuracy` after each epoch.
    """

    parameters: int
    macs: int
    test_accuracy: float
    keras_bytes: int
    litert_bytes: int
    litert_latency_us: float
    litert_difference: float
    step_ms: float
    accuracy_by_epoch: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class DemoResults:
    """Two networks trained the same way on one data set.

    Attributes:
        dataset: name of the data set.
        settings: the flags and versions that decided the results.
        full: the results of the full network.
        bilinear: the results of the bilinear network.
    """

    dataset: str
    settings: dict[str, Any]
    full: Result
    bilinear: Result

    def table(self) -> Table:
        """A table with a row for each result: full, bilinear, and full divided by bilinear."""
        title = f"{self.dataset}: full and bilinear network"
        table = Table("", *right("full", "bilinear", "full / bilinear"), title=title)
        for attribute, (label, form) in _ROWS.items():
            full, bilinear = getattr(self.full, attribute), getattr(self.bilinear, attribute)
            ratio = f"{full / bilinear:.1f}" if attribute in _COSTS else ""
            table.add_row(label, form(full), form(bilinear), ratio)
        return table

    def write_json(self, path: str | os.PathLike) -> None:
        """Writes all attributes as JSON."""
        pathlib.Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def write_plot(self, path: str | os.PathLike) -> None:
        """Draws costs and accuracy and writes the figure as a PNG file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 5.6), dpi=150, facecolor="white", layout="constrained")
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.2, h_pad=0.2)
        costs, accuracy = figure.subplots(1, 2, width_ratios=(1.4, 1))
        share = self.bilinear.parameters / self.full.parameters
        figure.suptitle(
            f"{self.dataset}: {self.bilinear.test_accuracy:.1%} accuracy with {share:.1%} of the "
            f"parameters (full network: {self.full.test_accuracy:.1%})",
            fontsize=17,
            fontweight="bold",
            color=INK,
        )
        self._draw_costs(costs)
        self._draw_accuracy(accuracy)
        figure.savefig(path, format="png")

    def _draw_costs(self, axes):
        """Draws each cost of the bilinear network as a bar in that of the full network."""
        axes.set_title("Cost of the bilinear network as a share of the full network", **TITLE)
        costs = [(getattr(self.full, name), getattr(self.bilinear, name)) for name in _COSTS]
        shares = [bilinear / full for full, bilinear in costs]
        rows = range(len(costs))
        axes.barh(rows, 1, height=0.62, color=FULL_COLOR, alpha=0.4)
        axes.barh(rows, shares, height=0.62, color=BILINEAR_COLOR)
        right = max(1.0, *shares) + 0.03
        for row, name, share, (full, bilinear) in zip(rows, _COSTS, shares, costs, strict=True):
            inside = share > 0.8
            axes.text(
                share + (-0.015 if inside else 0.015),
                row,
                f"{share:.1%}" if share < 0.1 else f"{share:.0%}",
                ha="right" if inside else "left",
                va="center",
                fontsize=14,
                fontweight="bold",
                color="white" if inside else BILINEAR_COLOR,
            )
            form = _ROWS[name][1]
            text = f"{form(bilinear)} of {form(full)}"
            axes.text(right, row, text, va="center", fontsize=10.5, color=FAINT)
        axes.set_yticks(range(len(_COSTS)), [_ROWS[attribute][0] for attribute in _COSTS])
        axes.tick_params(axis="y", length=0, labelsize=11, labelcolor=INK)
        axes.set_xticks([])
        axes.set_xlim(0, right + 0.42)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)

    def _draw_accuracy(self, axes):
        """Draws the test accuracy of both networks by epoch."""
        axes.set_title("Test accuracy by epoch", **TITLE)
        for name, result, color in (
            ("full", self.full, FAINT),
            ("bilinear", self.bilinear, BILINEAR_COLOR),
        ):
            epochs = range(1, len(result.accuracy_by_epoch) + 1)
            label = f"{name}: {result.test_accuracy:.1%} at the end"
            axes.plot(epochs, result.accuracy_by_epoch, color=color, linewidth=2.4, label=label)
            axes.scatter(epochs[-1], result.test_accuracy, s=55, color=color, zorder=3)
        axes.legend(loc="best", frameon=False, fontsize=12, labelcolor="linecolor")
        axes.yaxis.set_major_formatter(percent)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch", color=FAINT)
        axes.grid(axis="y", color=FULL_COLOR, alpha=0.4)
        axes.tick_params(length=0, labelcolor=FAINT)
        axes.spines[:].set_visible(False)


# For each attribute of a `Result` in the table, its label and the text of its value.
_ROWS = {
    "parameters": ("parameters", "{:,}".format),
    "macs": ("MACs per example", "{:,}".format),
    "test_accuracy": ("test accuracy", "{:.2%}".format),
    "keras_bytes": (".keras file", bytes_text),
    "litert_bytes": ("LiteRT file", bytes_text),
    "litert_latency_us": ("LiteRT latency", "{:.1f} µs".format),
    "litert_difference": ("LiteRT output difference", "{:.1e}".format),
    "step_ms": ("training time per step", milliseconds_text),
}
# The attributes that are costs: smaller is better, and a ratio makes sense.
_COSTS = ("parameters", "macs", "keras_bytes", "litert_bytes", "litert_latency_us", "step_ms")
