"""Times recurrent layers that apply their factors in each step or form their kernels.

    KERAS_BACKEND=tensorflow python benchmarks/step_ways.py

Writes `benchmarks/results/step_ways_BACKEND.md`: the times of both ways, and the way that the layer
takes by itself, which `STEP_LEAST_SAVED` in `keras_bilinear/kronecker/cost.py` decides. Both ways
take turns.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tables
from absl import app, logging

from keras_bilinear.benchmark.cases import RecurrentCase
from keras_bilinear.benchmark.worker import Steps
from keras_bilinear.kronecker import cost
from keras_bilinear.reports.timing import median_seconds

SIZES = (64, 64), (64, 128), (128, 256), (256, 512)
CASES = [
    RecurrentCase((batch, 100), *size, rank, kind)
    for kind in ("LSTM", "GRU")
    for batch in (1, 64)
    for size in SIZES
    for rank in (1, 4)
]

PASSES = "forward", "step"
# By whether the input kernel and the recurrent one are formed.
CHOSEN = {
    (False, False): "neither",
    (True, False): "input",
    (False, True): "recurrent",
    (True, True): "both",
}


def measure(case):
    """What a step saves by the recurrent factors, the kernels formed, and both passes' seconds."""
    inputs = case.inputs()
    _, layer = case.layers()
    ways = [
        Steps(type(layer).from_config({**layer.get_config(), "implementation": way}), inputs, False)
        for way in ("factorized", "materialized")
    ]
    seconds = [median_seconds([getattr(way, name) for way in ways], rounds=5) for name in PASSES]
    layer.build(inputs.shape)
    kernels = layer.cell._kernel, layer.cell._recurrent_kernel
    formed = CHOSEN[tuple(kernel.materialized for kernel in kernels)]
    return cost.saved_macs(kernels[1].factorization), formed, *seconds


def main(argv):
    del argv
    backend = keras.config.backend()
    lines = [
        f"# Factors or kernels in the steps of a recurrent layer, {backend}",
        "",
        f"`KERAS_BACKEND={backend} python benchmarks/step_ways.py`; {tables.machine()}.",
        "",
        "Milliseconds, float32, factors / kernels. Saved: the multiplications that the factors of "
        "the recurrent kernel save in a step of one example, as `STEP_LEAST_SAVED` "
        f"({cost.STEP_LEAST_SAVED[backend]:.1e}) counts them. Formed: the kernels that the layer "
        "forms by itself.",
        "",
        "| layer | saved | forward | training step | formed |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        saved, formed, *seconds = measure(case)
        cells = str(case), f"{saved:.1e}", *map(tables.milliseconds, seconds), formed
        lines.append(f"| {' | '.join(cells)} |")
        logging.info("%s", lines[-1])
    tables.write_lines(f"step_ways_{backend}.md", lines)


if __name__ == "__main__":
    app.run(main)
