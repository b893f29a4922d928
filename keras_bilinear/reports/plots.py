"""Parts of the figures of summaries and comparisons, drawn with Matplotlib."""

import base64
import functools
import io
import os
from collections.abc import Sequence
from typing import Any

from keras_bilinear.tables import bytes_text, count_text

# Colours that stay apart for colour-blind readers, and in print.
FULL_COLOR, BILINEAR_COLOR, INK, FAINT = "#b8bcc6", "#d1495b", "#23262f", "#7a7f8c"

# Keyword arguments of every title.
TITLE: dict[str, Any] = {"color": INK, "loc": "left", "fontsize": 13, "pad": 14}


def new_figure(rows: int, columns: int, pyplot: bool = False) -> tuple[Any, list[Any]]:
    """A figure with axes side by side.

    Args:
        rows: number of labels along the vertical axis, which decides the height.
        columns: number of axes.
        pyplot: whether the figure becomes the current figure of `matplotlib.pyplot`, which shows
            it in a notebook, or in a window by `show`.

    Returns:
        The `matplotlib.figure.Figure` and the list of its axes.
    """
    if pyplot:
        from matplotlib.pyplot import figure as make
    else:
        from matplotlib.figure import Figure as make

    size = 6.5 * columns, 1.6 + max(3, 0.34 * rows)
    figure: Any = make(figsize=size, dpi=150, facecolor="white", layout="constrained")
    figure._repr_mimebundle_ = functools.partial(_show_once, figure)
    return figure, [*figure.subplots(1, columns, squeeze=False).flat]


def _show_once(figure, **_):
    """What IPython shows of a figure, in a notebook that shows all open figures after a cell.

    The figure may be the result of the cell as well: it is closed.
    """
    from matplotlib import pyplot

    if "inline" not in pyplot.get_backend():
        return {}  # IPython then does as with any figure.
    pyplot.close(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return {"image/png": base64.b64encode(picture.getvalue()).decode()}


def draw_parameters(
    axes: Any, labels: Sequence[str], counts: Sequence[Sequence[int]], colors: Sequence[str]
) -> None:
    """Draws bars of the parameters of each layer on a logarithmic scale.

    Args:
        axes: where to draw.
        labels: a label for each layer.
        counts: for each model, the parameters of each layer.
        colors: for each model, the colour of its bars.
    """
    height = 0.8 / len(counts)
    for index, (values, color) in enumerate(zip(counts, colors, strict=True)):
        rows = [row + (index - (len(counts) - 1) / 2) * height for row in range(len(values))]
        axes.barh(rows, values, height=height, color=color)
        for row, value in zip(rows, values, strict=True):
            axes.annotate(
                count_text(value),
                (value, row),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=FAINT,
            )
    axes.set_title("Parameters of each layer", **TITLE)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(length=0, labelcolor=INK)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)


def draw_accuracy(axes: Any, models: Sequence[tuple[str, int, float | None, str]]) -> None:
    """Draws the accuracy of models against their parameters.

    Args:
        axes: where to draw.
        models: for each model its label, parameters, accuracy and colour.
    """
    for label, parameters, accuracy, color in models:
        axes.scatter(parameters, accuracy, s=80, color=color, label=label)
    axes.set_title("Accuracy against parameters", **TITLE)
    axes.set_xscale("log")
    axes.legend(frameon=False, labelcolor="linecolor")
    axes.yaxis.set_major_formatter(percent)
    axes.grid(color=FULL_COLOR, alpha=0.4)
    axes.spines[:].set_visible(False)


def draw_points(
    axes: Any,
    groups: Sequence[tuple[Sequence[tuple[float, float]], dict[str, Any]]],
    title: str,
    line: Sequence[tuple[float, float]] = (),
) -> None:
    """Draws points of several kinds.

    Args:
        axes: where to draw.
        groups: for each kind its points and the keyword arguments of `axes.scatter`.
        title: the title.
        line: points to join by a line.
    """
    if line:
        axes.plot(*zip(*line, strict=True), color=FULL_COLOR, zorder=1)
    for points, style in groups:
        axes.scatter(*zip(*points, strict=True), s=50, linewidths=1.5, **style)
    axes.set_title(title, **TITLE)
    axes.grid(color=FULL_COLOR, alpha=0.4)
    axes.spines[:].set_visible(False)


def label_bytes(axis: Any) -> None:
    """Labels a logarithmic axis with numbers of bytes, such as `20 kB`."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: bytes_text(value))


def percent(value: float, _: int) -> str:
    """The text of an accuracy along an axis."""
    return f"{100 * value:g}%"


def finish_figure(figure: Any, title: str, path: str | os.PathLike | None) -> Any:
    """Gives a figure its title and writes it, unless `path` is `None`; returns the figure."""
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    if path is not None:
        figure.savefig(path)
    return figure
