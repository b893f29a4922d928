"""Figures of summaries and comparisons."""

from keras_bilinear.tables import count_text

# Colours that stay apart for colour-blind readers, and in print.
FULL_COLOR, BILINEAR_COLOR, INK, FAINT = "#b8bcc6", "#d1495b", "#23262f", "#7a7f8c"

TITLE = {"color": INK, "loc": "left", "fontsize": 13, "pad": 14}


def new_figure(rows, columns):
    from matplotlib.figure import Figure

    size = 6.5 * columns, 1.6 + max(3, 0.34 * rows)
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    return figure, figure.subplots(1, columns)


def draw_bars(axes, labels, sizes, colors):
    """Bars of parameters on a logarithmic scale, those of several models for each label."""
    height = 0.8 / len(sizes)
    for index, (values, color) in enumerate(zip(sizes, colors, strict=True)):
        rows = [row + (index - (len(sizes) - 1) / 2) * height for row in range(len(values))]
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


def finish_figure(figure, title, path):
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    if path is not None:
        figure.savefig(path)
    return figure
