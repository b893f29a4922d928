"""Times every way of a bilinear convolution, fits the cost model, and tests its choices.

    KERAS_BACKEND=jax python benchmarks/conv_ways.py [--nomeasure]
    TF_ENABLE_ONEDNN_OPTS=1 KERAS_BACKEND=tensorflow python benchmarks/conv_ways.py

Writes the times into `benchmarks/results/conv_ways_LIBRARY.json` and tables of them into
`conv_ways_LIBRARY.md`. The library is the one that computes the backend's convolutions. With
`--nomeasure` it makes the tables from the times in the file. The coefficients that it prints are
those of `keras_bilinear/kronecker/cost.py`. They are fitted on a grid of cases and tested on
another grid.
"""

import dataclasses
import itertools
import json
import math
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tables
from absl import app, flags, logging
from scipy.optimize import least_squares, nnls

from keras_bilinear.benchmark import choices, report
from keras_bilinear.benchmark.cases import ConvCase
from keras_bilinear.benchmark.worker import Steps, median_seconds
from keras_bilinear.files import staged
from keras_bilinear.kronecker import cost
from keras_bilinear.kronecker.factorization import FACTORIZED, Order
from keras_bilinear.kronecker.target import convolution_library

MEASURE = flags.DEFINE_boolean("measure", True, "time the ways, not only fit the model anew")
WAYS = tuple(Order)
# The rates of a machine without delays: three passes of 1e11 MACs a second.
LEAST = cost.Work(0.03, 0.001, 0.001, 0.001, 0.001, 0.001)


def grid(shapes, kinds):
    """Cases of all shapes (size, channels, filters, window, strides) with all kinds."""
    return [
        ConvCase((16, *size), channels, filters, rank, window, strides, pattern)
        for (size, channels, filters, window, strides), (rank, pattern) in itertools.product(
            shapes, kinds
        )
    ]


FIT = grid(
    [
        ((32, 32), 32, 32, 3, 1),
        ((24, 24), 64, 64, 3, 1),
        ((16, 16), 96, 128, 3, 1),
        ((8, 8), 256, 256, 3, 1),
        ((16, 16), 128, 64, 3, 2),
        ((16, 16), 64, 64, 5, 1),
        ((400,), 128, 128, 5, 1),
        ((8, 8, 8), 64, 64, 3, 1),
    ],
    [(1, "channel"), (4, "channel"), (1, "spatial"), (3, "spatial")],
)
JUDGE = grid(
    [
        ((28, 28), 48, 48, 3, 1),
        ((14, 14), 128, 128, 3, 1),
        ((7, 7), 384, 384, 3, 1),
        ((28, 28), 64, 128, 3, 2),
        ((20, 20), 64, 32, 5, 1),
        ((300,), 64, 192, 3, 1),
    ],
    [(1, "channel"), (2, "channel"), (8, "channel"), (1, "spatial"), (2, "spatial")],
)


def measure(case):
    """Seconds for each output position, `[forward pass, training step]` of each way."""
    inputs = case.inputs()
    steps = []
    for order in WAYS:
        _, layer = case.layers()
        steps.append(Steps(layer, inputs, xla=keras.config.backend() == "jax"))
        layer._kernel._order = order  # before its first call
    positions = math.prod(steps[0].layer.compute_output_shape(inputs.shape)[:-1])
    forward = median_seconds([s.forward for s in steps], rounds=4, burst=0.05)
    step = median_seconds([s.step for s in steps], rounds=4, burst=0.05)
    logging.info("%s: forward %s, step %s", case, forward, step)
    return (np.array([forward, step]).T / positions).tolist()


def build(case):
    """The bilinear layer of a case."""
    _, layer = case.layers()
    layer.build((*case.batch, case.input_dim))
    return layer


def planned(case):
    """The `Factorization` and the strides of a case."""
    layer = build(case)
    return layer.factorization, layer.strides


def fit(times):
    """Coefficients that make the relative errors of the predicted times small.

    Least squares of the logarithms with a loss that lets single cases stand
    apart, from where nonnegative least squares of the relative errors lead.
    """
    coefficients = []
    for ways in (FACTORIZED, (Order.MATERIALIZED,)):
        work, seconds = [], []
        for case, both in zip(FIT, times, strict=True):
            plan, strides = planned(case)
            for way in ways:
                work.append(dataclasses.astuple(cost.work(plan, way, strides)))
                seconds.append(sum(both[WAYS.index(way)]))
        work, seconds = np.array(work), np.array(seconds) * 1e9
        used = work.any(axis=0)
        least = np.array(dataclasses.astuple(LEAST))[used]
        start, _ = nnls(work[:, used] / seconds[:, None], np.ones(len(seconds)))

        def error(logarithms, work=work[:, used], seconds=seconds):
            return np.log(work @ np.exp(logarithms) / seconds)

        fitted = least_squares(
            error,
            np.log(np.maximum(start, 2 * least)),
            bounds=(np.log(least), np.inf),
            loss="soft_l1",
            f_scale=0.1,
        )
        rates = np.zeros(work.shape[1])
        rates[used] = np.exp(fitted.x)
        coefficients.append(cost.Work(*(float(f"{rate:.3g}") for rate in rates)))
    return tuple(coefficients)


def judge(cases, times, coefficients):
    """For each case: the chosen way, the best way, and how much slower the chosen way is."""
    for case, both in zip(cases, times, strict=True):
        plan, strides = planned(case)
        predicted = [cost.seconds(plan, way, strides, coefficients) for way in WAYS]
        chosen = int(np.argmin(predicted))
        total = np.sum(both, axis=1)
        yield case, both, WAYS[chosen], WAYS[int(np.argmin(total))], total[chosen] / total.min()


def main(argv):
    del argv
    library = convolution_library()
    path = tables.RESULTS / f"conv_ways_{library}.json"
    if MEASURE.value:
        measured = {
            "machine": report.machine(),
            "fit": [measure(case) for case in FIT],
            "judge": [measure(case) for case in JUDGE],
        }
        with staged(tables.RESULTS) as folder:
            (folder / path.name).write_text(json.dumps(measured, indent=1) + "\n")
    measured = json.loads(path.read_text())
    fitted, used = fit(measured["fit"]), cost.NANOSECONDS[library]
    facts = ", ".join(f"{name} {value}" for name, value in measured["machine"].items())
    backend, _, environment = choices.COLUMNS[library]
    environment = " ".join(
        f"{name}={value}" for name, value in {**environment, "KERAS_BACKEND": backend}.items()
    )
    lines = [
        f"# Ways of a bilinear convolution, {library}",
        "",
        f"`{environment} python benchmarks/conv_ways.py`; {facts}.",
        "",
        "Nanoseconds for each output position, forward / training step (Adam), batch of 16, "
        "float32. `left` and `right`: the factor that is applied first. The choice is that of the "
        "model in `keras_bilinear/kronecker/cost.py`, for forward pass and training step together.",
        "",
        "Fitted: " + ", ".join(f"`{work}`" for work in fitted) + ". "
        f"The package has {'these' if fitted == used else 'others: run this anew'}.",
    ]
    for title, cases, name in (("Fitted on", FIT, "fit"), ("Judged on", JUDGE, "judge")):
        rows = list(judge(cases, measured[name], fitted))
        fastest = sum(chosen == best for _, _, chosen, best, _ in rows)
        slower = [row[-1] for row in rows]
        lines += [
            "",
            f"## {title}",
            "",
            f"Fastest way chosen in {fastest} of {len(rows)} cases, one within 5% of it in "
            f"{sum(s < 1.05 for s in slower)}; at worst {max(slower):.2f} times as slow.",
            "",
            "| case | left | right | materialized | chosen | slower than the best |",
            "|---|---|---|---|---|---|",
        ]
        for case, both, chosen, _, slow in rows:
            cells = [f"{f * 1e9:.0f} / {s * 1e9:.0f}" for f, s in both]
            lines.append(f"| {case} | {' | '.join(cells)} | {chosen.value} | {slow:.2f} |")
    print("\n".join(line for line in lines if not line.startswith("|")))
    with staged(tables.RESULTS) as folder:
        (folder / f"conv_ways_{library}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
