"""Times layers on a GPU: full layers beside bilinear layers, factorized and materialized.

    KERAS_BACKEND=jax python benchmarks/gpu.py
    KERAS_BACKEND=torch python benchmarks/gpu.py

Writes the times into `benchmarks/results/speed_gpu_BACKEND.json` and a table of them into
`speed_gpu_BACKEND.md`. With `--nomeasure` it makes the table from the times in the file. Several
processes compile side by side. When all have compiled, they take their times one after the other.
"""

import dataclasses
import json
import multiprocessing
import os
import threading
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Processes share the GPU.

import keras
import tables
from absl import app, flags, logging

from keras_bilinear.benchmark import report
from keras_bilinear.benchmark.cases import CASES
from keras_bilinear.benchmark.worker import Steps
from keras_bilinear.files import staged
from keras_bilinear.kronecker import cost
from keras_bilinear.kronecker.target import on_gpu
from keras_bilinear.reports.timing import median_seconds, waiting

MEASURE = flags.DEFINE_boolean("measure", True, "time the layers, not only write the table anew")
POLICIES = flags.DEFINE_multi_string(
    "policy", ["float32", "mixed_bfloat16"], "dtype policies; may be repeated"
)
WAYS = ("full", "factorized", "materialized")
# The factor by which batches are larger than on a CPU, to keep a GPU busy.
ENLARGED = {"recurrent": 1, "dense": 32, "conv": 8}
PROCESSES = 15
# Seconds after which the processes that have compiled go ahead.
PATIENCE = 150


def cases():
    """The shapes of the benchmark on CPUs with the default pattern; batches of 1 at rank 1 only."""
    for suite, factor in ENLARGED.items():
        for case in CASES[suite]:
            first, *others = case.batch
            if getattr(case, "pattern", "auto") == "auto" and (first > 1 or case.rank == 1):
                enlarged = {"batch": (factor * first, *others)}
                if suite == "conv":
                    enlarged["patches"] = False
                yield dataclasses.replace(case, **enlarged)


def layers(case):
    """The layers of a case, by the way in which they compute."""
    full, bilinear = case.layers()
    lstm = isinstance(full, keras.layers.LSTM)
    if lstm and keras.config.backend() == "jax" and full.compute_dtype != "float32":
        full.use_cudnn = False  # With it Keras fails.
    config = {name: value for name, value in bilinear.get_config().items() if name != "name"}
    ways = {way: type(bilinear).from_config({**config, "implementation": way}) for way in WAYS[1:]}
    return {"full": full, **ways}


def chosen(case):
    """The way that `implementation="auto"` takes on a GPU."""
    _, bilinear = case.layers()
    with mock.patch.object(cost, "on_gpu", return_value=True):
        bilinear.build((*case.batch, case.input_dim))
    owner = getattr(bilinear, "cell", bilinear)
    return "materialized" if owner._kernel.materialized else "factorized"


def prepare(case, policy):
    """The `Steps` of a case by way, each called once."""
    keras.config.set_dtype_policy(policy)
    inputs = case.inputs()
    steps = {way: Steps(layer, inputs, xla=True) for way, layer in layers(case).items()}
    for passes in steps.values():
        passes.forward()
        passes.step()
    return steps


def work(part, ready, alone, queue):
    """Measures the cases of a process; puts an index and a record of each into the queue."""
    prepared = []
    for index, case, policy in part:
        try:
            prepared.append((index, case, policy, prepare(case, policy)))
        except Exception:
            logging.exception("%s, %s", case, policy)
            queue.put((index, None))
    try:
        ready.wait(PATIENCE)
    except threading.BrokenBarrierError:
        logging.warning("not all had compiled when the times of %s were taken", part)
    with alone:
        for index, case, policy, steps in prepared:
            kinds = (
                [passes.forward for passes in steps.values()],
                [passes.step for passes in steps.values()],
            )
            times = [median_seconds(functions, rounds=5, burst=0.02) for functions in kinds]
            seconds = dict(zip(steps, zip(*times, strict=True), strict=True))
            record = {"case": str(case), "policy": policy, "seconds": seconds}
            queue.put((index, record))


def measure():
    """Yields, more and more, a record for each case and policy."""
    every = [(policy, case) for policy in POLICIES.value for case in cases()]
    every = [(index, case, policy) for index, (policy, case) in enumerate(every)]
    context = multiprocessing.get_context("spawn")
    count = min(PROCESSES, len(every))
    shared = context.Barrier(count), context.Lock(), context.Queue()
    processes = [
        context.Process(target=work, args=(every[i::count], *shared), daemon=True)
        for i in range(count)
    ]
    for process in processes:
        process.start()
    records = {}
    while len(records) < len(every):
        index, record = shared[-1].get(timeout=900)
        records[index] = record
        yield [records[index] for index in sorted(records) if records[index]]


def call_seconds():
    """Seconds of a call that gives the GPU almost nothing to do."""
    x = keras.ops.ones((8, 8))
    if keras.config.backend() == "jax":
        return median_seconds([lambda: keras.ops.add(x, x).block_until_ready()])[0]
    return median_seconds([waiting(lambda: keras.ops.add(x, x))])[0]


def gpu():
    """The name of the GPU."""
    if keras.config.backend() == "torch":
        import torch

        return torch.cuda.get_device_name()
    import jax

    return jax.devices()[0].device_kind


def table(results, backend):
    auto = {str(case): chosen(case) for case in cases()}
    slower = []
    for record in results["records"]:
        total = {way: sum(record["seconds"][way]) for way in WAYS[1:]}
        slower.append(total[auto[record["case"]]] / min(total.values()))
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    missing = len(POLICIES.value) * len(auto) - len(slower)
    yield from (
        f"# Speed of bilinear layers on a GPU, {backend}",
        "",
        f"`KERAS_BACKEND={backend} python benchmarks/gpu.py`; {facts}.",
        "",
        "Milliseconds, medians, and how many times as fast as the full layer. In bold: what "
        '`implementation="auto"` takes, by a rule that was made from these figures: forward pass '
        f"and training step together the faster way in {sum(s == 1 for s in slower)} of "
        f"{len(slower)} cases, and at worst {max(slower):.2f} times as slow. A call that does next "
        f"to nothing takes {results['call'] * 1e3:.3f} ms.",
        "",
        "A materialized recurrent layer runs the loop that Keras has for its own: cuDNN's, but for "
        "GRU on JAX. In mixed precision Keras' LSTM fails on JAX with cuDNN; both run without it.",
    )
    if missing:
        yield from (
            "",
            f"{missing} cases are missing.",
        )
    for policy in dict.fromkeys(record["policy"] for record in results["records"]):
        header = ("layer", "call", *WAYS)
        yield from ("", f"## {policy}", "", "| " + " | ".join(header) + " |")
        yield "|" + "---|" * len(header)
        for record in results["records"]:
            if record["policy"] != policy:
                continue
            for index, call in enumerate(("forward", "training step")):
                full = record["seconds"]["full"][index]
                cells = [record["case"], call, f"{full * 1e3:.3f}"]
                for way in WAYS[1:]:
                    seconds = record["seconds"][way][index]
                    cell = f"{seconds * 1e3:.3f} ({full / seconds:.2f}x)"
                    cells.append(f"**{cell}**" if way == auto[record["case"]] else cell)
                yield "| " + " | ".join(cells) + " |"


def main(argv):
    del argv
    backend = keras.config.backend()
    path = tables.RESULTS / f"speed_gpu_{backend}.json"
    if MEASURE.value:
        if not on_gpu():
            raise app.UsageError(f"the {backend} backend sees no GPU")
        results = {"machine": {"GPU": gpu(), **report.machine()}, "call": call_seconds()}
        for records in measure():
            with staged(tables.RESULTS) as folder:
                text = json.dumps({**results, "records": records}, indent=1)
                (folder / path.name).write_text(text + "\n")
    results = json.loads(path.read_text())
    with staged(tables.RESULTS) as folder:
        lines = table(results, backend)
        (folder / path.with_suffix(".md").name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
