"""Draws a full and a bilinear projection: `python docs/draw_idea.py` writes docs/idea.svg."""

import pathlib

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FILE = pathlib.Path(__file__).with_name("idea.svg")
D, SIDE = 1024, 32  # width of the layer, and sides of the matrix that a vector is reshaped into
SHADES = ("#cfdbe8", "#a9bfd6", "#86a5c5", "#648cb3")  # parts of a vector, rows of its matrix
FULL, LEFT, RIGHT, INK, FAINT = "#b8bcc6", "#e08592", "#f2c879", "#23262f", "#6b707c"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": INK,
    # Text stays text, and nothing depends on the time or on the version of Matplotlib.
    "svg.fonttype": "none",
    "svg.hashsalt": "idea",
}
MIDDLE = 3.05  # height of the centres


def draw(file) -> None:
    """Writes the picture to a file; the bytes are the same each time."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.4), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 17), ylim=(0, 6.233), aspect="equal")
        axes.axis("off")
        _full(axes)
        axes.plot([6.35, 6.35], [0.2, 6.0], color=FULL, linewidth=1)
        _bilinear(axes)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def _full(axes):
    _title(axes, 0.5, "Full projection", "y = x W")
    _costs(axes, 0.5, D * D, D * D)
    _vector(axes, 0.7, "x")
    _arrow(axes, 1.1, 1.6)
    _box(axes, 3.1, 2.6, FULL, "W", f"{D} x {D}")
    _arrow(axes, 4.6, 5.1)
    _vector(axes, 5.5, "y")


def _bilinear(axes):
    _title(axes, 6.85, "Bilinear projection", "Y = Σ Lᵀ X R")
    _costs(axes, 6.85, 2 * SIDE**2, 2 * SIDE * D, " for each term of the sum")
    shape = f"{SIDE} x {SIDE}"
    _vector(axes, 7.05, "x")
    _arrow(axes, 7.45, 8.15, "reshape")
    _sign(axes, 8.6, "Σ", size=26)
    _sign(axes, 8.6, "rank", size=11, below=0.62)
    _box(axes, 9.7, 1.15, LEFT, "Lᵀ", shape, stacked=True)
    _matrix(axes, 11.2, "X", shape)
    _box(axes, 12.6, 1.15, RIGHT, "R", shape, stacked=True)
    _sign(axes, 13.65, "=", size=18)
    _matrix(axes, 14.55, "Y", shape)
    _arrow(axes, 15.3, 16.0, "reshape")
    _vector(axes, 16.4, "y")


def _title(axes, x, name, formula):
    axes.text(x, 5.75, name, fontsize=15, fontweight="bold")
    axes.text(x, 5.25, formula, fontsize=13)


def _costs(axes, x, numbers, multiplications, each=""):
    axes.text(x, 0.6, f"{numbers:,} parameters{each}")
    axes.text(x, 0.2, f"{multiplications:,} multiplications{each}")


def _vector(axes, x, name):
    height = 3.2 / len(SHADES)
    for row, shade in enumerate(SHADES):
        _rectangle(axes, x - 0.15, MIDDLE + 1.6 - (row + 1) * height, 0.3, height, shade)
    axes.text(x, MIDDLE, name, ha="center", va="center", fontweight="bold")
    axes.text(x, MIDDLE - 1.85, str(D), ha="center", va="center", color=FAINT)


def _matrix(axes, x, name, shape, size=1.15):
    """Draws a matrix whose rows have the shades of the parts of a vector."""
    height = size / len(SHADES)
    for row, shade in enumerate(SHADES):
        bottom = MIDDLE + size / 2 - (row + 1) * height
        _rectangle(axes, x - size / 2, bottom, size, height, shade)
    _labels(axes, x, size, name, shape)


def _box(axes, x, size, color, name, shape, stacked=False):
    for offset in (0.24, 0.12, 0) if stacked else (0,):
        left, bottom = x - size / 2 + offset, MIDDLE - size / 2 + offset
        _rectangle(axes, left, bottom, size, size, color)
    _labels(axes, x, size, name, shape)


def _labels(axes, x, size, name, shape):
    axes.text(x, MIDDLE, name, ha="center", va="center", fontsize=14, fontweight="bold")
    axes.text(x, MIDDLE - size / 2 - 0.25, shape, ha="center", va="center", color=FAINT)


def _rectangle(axes, left, bottom, width, height, color):
    box = Rectangle((left, bottom), width, height, facecolor=color, edgecolor="white", linewidth=1)
    axes.add_patch(box)


def _arrow(axes, start, end, label=""):
    axes.annotate(
        "", (end, MIDDLE), (start, MIDDLE), arrowprops={"arrowstyle": "->", "color": FAINT}
    )
    middle = (start + end) / 2
    axes.text(middle, MIDDLE + 0.3, label, ha="center", va="center", fontsize=10, color=FAINT)


def _sign(axes, x, sign, size, below=0.0):
    axes.text(x, MIDDLE - below, sign, ha="center", va="center", fontsize=size, color=INK)


if __name__ == "__main__":
    draw(FILE)
