"""What the demo measured, as table, JSON and plot."""

import dataclasses
import json
import os
import pathlib

from rich.table import Table

from keras_bilinear.reports.plots import BILINEAR_COLOR, FAINT, FULL_COLOR, INK, TITLE
from keras_bilinear.tables import bytes_text


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured on one trained network."""

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
        settings: what the networks were trained with, for the record.
        full: the full network's numbers.
        bilinear: the bilinear network's numbers.
    """

    dataset: str
    settings: dict
    full: Result
    bilinear: Result

    def table(self) -> Table:
        """All numbers, one row each, with the ratio of the full to the bilinear network's."""
        table = Table(title=f"{self.dataset}: full and bilinear network")
        table.add_column("")
        for heading in ("full", "bilinear", "full / bilinear"):
            table.add_column(heading, justify="right")
        for attribute, (label, form) in _ROWS.items():
            full, bilinear = getattr(self.full, attribute), getattr(self.bilinear, attribute)
            ratio = f"{full / bilinear:.1f}" if attribute in _COSTS else ""
            table.add_row(label, form(full), form(bilinear), ratio)
        return table

    def write_json(self, path: str | os.PathLike) -> None:
        """Writes everything as JSON."""
        pathlib.Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def write_plot(self, path: str | os.PathLike) -> None:
        """Draws costs and accuracy as a PNG."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 5.6), dpi=150, facecolor="white", layout="constrained")
        figure.get_layout_engine().set(w_pad=0.2, h_pad=0.2)
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
        axes.set_title("Cost of the bilinear network as a share of the full one", **TITLE)
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
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch", color=FAINT)
        axes.grid(axis="y", color=FULL_COLOR, alpha=0.4)
        axes.tick_params(length=0, labelcolor=FAINT)
        axes.spines[:].set_visible(False)


def _milliseconds(value):
    return f"{value:.3g} ms"


_ROWS = {
    "parameters": ("parameters", "{:,}".format),
    "macs": ("MACs per example", "{:,}".format),
    "test_accuracy": ("test accuracy", "{:.2%}".format),
    "keras_bytes": (".keras file", bytes_text),
    "litert_bytes": ("LiteRT file", bytes_text),
    "litert_latency_us": ("LiteRT latency", "{:.1f} µs".format),
    "litert_difference": ("LiteRT output difference", "{:.1e}".format),
    "step_ms": ("training time per step", _milliseconds),
}
# The rows of which less is better, and a ratio makes sense.
_COSTS = ("parameters", "macs", "keras_bytes", "litert_bytes", "litert_latency_us", "step_ms")
