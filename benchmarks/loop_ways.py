"""Times recurrent layers that project their inputs before the loop or inside the loop.

    KERAS_BACKEND=tensorflow python benchmarks/loop_ways.py

Writes `benchmarks/results/loop_ways_BACKEND.md`: the times of both ways, and the way that the layer
takes by itself, which `LOOP_LEAST_MACS` in `keras_bilinear/kronecker/cost.py` decides. Both ways
take turns.
"""

import math
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tables
from absl import app, logging

from keras_bilinear.benchmark.cases import CASES
from keras_bilinear.benchmark.worker import Steps
from keras_bilinear.kronecker import cost
from keras_bilinear.reports.timing import median_seconds

LIMITS = {"before": math.inf, "in": 0.0}


def within(limit, function):
    """The function, called where loops project inputs of so many multiplications and more."""

    def call():
        least, backend = cost.LOOP_LEAST_MACS, keras.config.backend()
        normal, least[backend] = least[backend], limit
        try:
            return function()
        finally:
            least[backend] = normal

    return call


def measure(case, xla):
    """Multiplications, whether the loop is chosen, and the seconds of each way's two passes."""
    inputs = case.inputs()
    forward, step = [], []
    for limit in LIMITS.values():
        _, layer = case.layers()
        passes = Steps(layer, inputs, xla)
        forward.append(within(limit, passes.forward))
        step.append(within(limit, passes.step))
    seconds = [median_seconds(functions, rounds=5) for functions in (forward, step)]
    kernel = layer.cell._kernel
    macs = cost.step_macs(kernel.factorization, kernel.order, len(inputs))
    return macs, layer.cell.projects_in_steps(len(inputs)), *seconds


def main(argv):
    del argv
    backend = keras.config.backend()
    lines = [
        f"# Where a recurrent layer projects its inputs, {backend}",
        "",
        f"`KERAS_BACKEND={backend} python benchmarks/loop_ways.py`; {tables.machine()}.",
        "",
        "Milliseconds, float32, before the loop / in it. Multiplications: those of the inputs of "
        "one time step, over all examples, as `LOOP_LEAST_MACS` "
        f"({cost.LOOP_LEAST_MACS[backend]:.0e}) counts them.",
        "",
        "| layer | multiplications | forward | training step | chosen |",
        "|---|---|---|---|---|",
    ]
    for xla in (False, True) if backend == "tensorflow" else (False,):
        for case in CASES["recurrent"]:
            macs, in_loop, *seconds = measure(case, xla)
            name = f"{case}, XLA" if xla else str(case)
            times = map(tables.milliseconds, seconds)
            cells = name, f"{macs:.1e}", *times, "in it" if in_loop else "before"
            lines.append(f"| {' | '.join(cells)} |")
            logging.info("%s", lines[-1])
    tables.write_lines(f"loop_ways_{backend}.md", lines)


if __name__ == "__main__":
    app.run(main)
