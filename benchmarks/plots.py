"""Draws accuracy against parameters, multiplications and latency, from finished studies.

    python benchmarks/plots.py

From each `benchmarks/results/accuracy_STUDY.csv` of networks, the script draws
`benchmarks/results/accuracy_STUDY.png`: the medians and ranges over the seeds of the accuracy on
the test set, for networks whose factors are stored as the package stores them. A range leaves the
plot if a run did not begin to train. Lines join bilinear networks that differ in their rank only,
and full networks that differ in their width only. Latency is that of the LiteRT files, for the
networks that `accuracy_costs.py` has measured.

`benchmarks/results/accuracy.png` shows the small networks of all studies beside the full networks.
"""

import itertools
import re

import accuracy
import matplotlib
import numpy as np
import tables
from absl import app

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from keras_bilinear.files import staged

# The trainings of each study that the picture of all studies has.
STUDIES = {
    "fashion_mnist": ("",),
    "cifar10": ("20 epochs", "20 epochs, dropout"),
    "cifar10_resnet": ("",),
    "imdb_reviews": ("5 epochs",),
    "spoken_digit": ("clipped",),
    "spoken_digit_conv": ("",),
    "tiny_shakespeare": ("clipped",),
}
LARGEST_SHARE = 0.1  # In that picture.
SETTING = ("optimizer", "learning_rate", "weight_decay", "dropout", "label_smoothing")
KERNELS = ("full", "gain", "rewritten")
AXES = {
    "parameters": "parameters",
    "macs": "multiply-accumulates for an example",
    "latency_us": "µs for an example, LiteRT, one thread",
}


def series(rows):
    """`{(recurrent, kind, pattern, training): [rows of a network, ...]}`, by lines.

    If a network was tested in several settings, the setting that is best on held-out data counts.
    Numbers of epochs, clipped gradients, and trainings in mixed precision, which have dropout, are
    told apart.
    """
    networks, held_out = {}, {}
    several = len({row["epochs"] for row in rows}) > 1
    for row in rows:
        setting = tuple(row[name] for name in SETTING)
        epochs = f"{row['epochs']} epochs" if several else ""
        training = epochs or ("" if row["clipnorm"] == "None" else "clipped")
        training = joined(training, "" if row["policy"] == "float32" else "dropout")
        key = row["recurrent"], row["network"], row["pattern"], training
        if row["tuning"] == "True":
            held_out.setdefault((key, setting), []).append(row)
        else:
            networks.setdefault(key, {}).setdefault(setting, []).append(row)
    lines = {}
    for key, settings in networks.items():
        recurrent, network, *how = key
        best, *others = settings
        if others:
            tried = [setting for setting in settings if (key, setting) in held_out]
            best = max(tried, key=lambda setting: np.mean(accuracies(held_out[key, setting])))
        found = settings[best]
        kind = re.sub(r", (width|depth) .*", "", network.replace(f", rank {found[0]['rank']}", ""))
        lines.setdefault((recurrent, kind, *how), []).append(found)
    return lines


def accuracies(rows):
    return [float(row["accuracy"]) for row in rows]


def median(rows):
    return np.median(accuracies(rows))


def joined(*parts):
    return ", ".join(filter(None, parts))


def draw(lines, title):
    """A row of plots for each kind of recurrent layer; a single row without recurrent layers."""
    firsts = [rows[0] for line in lines.values() for rows in line]
    columns = [name for name in AXES if any(name in first for first in firsts)]
    kinds = dict.fromkeys(joined(*key[1:]) for key in lines)
    palette = [*matplotlib.color_sequences["tab20"], *matplotlib.color_sequences["tab20b"]]
    colors = dict(zip(kinds, itertools.cycle(palette)))
    layers = dict.fromkeys(key[0] for key in lines)
    # A legend of so many lines fits.
    size = 5 * len(columns), max(4 * len(layers), 0.22 * len(kinds))
    options = {"sharex": "col", "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(layers), len(columns), figsize=size, **options)
    shown = {}
    for layer, row in zip(layers, axes, strict=True):
        row[0].set_ylabel(joined(layer, "test accuracy"))
        for (own, *key), networks in lines.items():
            label = joined(*key)
            for axis, column in zip(row, columns, strict=True):
                if own == layer:
                    shown[label] = draw_line(axis, networks, column, label, colors[label])
    for axis, column in zip(axes[-1], columns, strict=True):
        axis.set_xlabel(AXES[column])
    values = [accuracies(rows) for line in lines.values() for rows in line]
    medians = [np.median(of_network) for of_network in values]
    spread = np.ptp(medians)
    bottom = max(min(map(min, values)), min(medians) - spread)
    margin = 0.05 * spread
    axes[0, 0].set_ylim(bottom - margin, max(map(max, values)) + margin)
    figure.legend(shown.values(), shown, loc="outside right", fontsize="small")
    figure.suptitle(f"{title}: medians and ranges over the seeds; numbers are ranks")
    return figure


def draw_line(axis, networks, column, label, color):
    """Networks that differ in a single property, by a column of their rows."""
    networks = [rows for rows in networks if column in rows[0]]
    networks.sort(key=lambda rows: int(rows[0][column]))
    x = [int(rows[0][column]) for rows in networks]
    y = np.array([median(rows) for rows in networks])
    low = [min(accuracies(rows)) for rows in networks]
    high = [max(accuracies(rows)) for rows in networks]
    style = {"marker": "o" if "bilinear" in label else "s", "capsize": 3, "color": color}
    line = axis.errorbar(x, y, (y - low, high - y), **style)
    for rows, *place in zip(networks, x, y, strict=True):
        if "bilinear" in label:
            axis.annotate(rows[0]["rank"], place, xytext=(4, -10), textcoords="offset points")
    axis.set_xscale("log", subs=[])
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axis.grid(alpha=0.3)
    return line


def draw_all(lines):
    """The networks of all studies: distance from the full network's accuracy, by their share."""
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    axis.axhline(0, color="black", linewidth=1)
    colors = iter(matplotlib.color_sequences["tab10"])
    pairs = [(study, training) for study, trainings in STUDIES.items() for training in trainings]
    for study, training in pairs:
        of_training = {key: line for key, line in lines[study].items() if key[-1] == training}
        for recurrent in dict.fromkeys(key[0] for key in of_training):
            line = of_training[recurrent, "full", "", training]
            full = next(rows for rows in line if rows[0]["network"] == "full")
            color = next(colors)
            axis.scatter([], [], color=color, label=joined(study, recurrent, training))
            for key, networks in of_training.items():
                for rows in networks if key[0] == recurrent else ():
                    share = int(rows[0]["parameters"]) / int(full[0]["parameters"])
                    if share <= LARGEST_SHARE:
                        place = 100 * share, 100 * (median(rows) - median(full))
                        if rows[0]["kernels"] == "full":
                            style = {"marker": "x"}
                        else:
                            style = {"facecolor": color if len(rows) > 1 else "none"}
                        axis.scatter(*place, color=color, **style)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g%%"))
    axis.set_yscale("symlog", linthresh=2)
    axis.set_yticks([-40, -20, -10, -5, -2, -1, 0, 1, 2, 5])
    axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%+g"))
    axis.set_xlabel("parameters, as a share of the full network's")
    axis.set_ylabel("test accuracy, points from the full network's")
    axis.grid(alpha=0.3)
    axis.set_title("Bilinear networks (dots; circles: one seed), full ones (crosses): medians")
    figure.legend(loc="outside right", fontsize="small")
    return figure


def main(argv):
    del argv
    lines = {}
    for study in STUDIES:
        rows = [row for row in accuracy.read_study(study) if row["kernels"] in KERNELS]
        costs = accuracy.read_costs(study)
        rows = [costs.get(accuracy.structure(row), {}) | row for row in rows]
        lines[study] = series(rows)
        write(draw(lines[study], study), f"accuracy_{study}.png")
    write(draw_all(lines), "accuracy.png")


def write(figure, name):
    with staged(tables.RESULTS) as folder:
        figure.savefig(folder / name, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    app.run(main)
