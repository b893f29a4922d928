"""Times layers on a GPU: the full ones beside bilinear ones, factorized and materialized.

    KERAS_BACKEND=jax python benchmarks/gpu.py
    KERAS_BACKEND=torch python benchmarks/gpu.py

Writes the times into `benchmarks/results/speed_gpu_BACKEND.json`, and the table
that comes of them into `speed_gpu_BACKEND.md`; with `--nomeasure` it takes the
times that stand there. Everything is compiled before the first time is taken.
"""

import concurrent.futures
import dataclasses
import json

import keras
import tables
from absl import app, flags, logging

from keras_bilinear import benchmark
from keras_bilinear.benchmark_cases import CASES
from keras_bilinear.benchmark_worker import Steps
from keras_bilinear.files import staged
from keras_bilinear.runtime import has_gpu
from keras_bilinear.timing import median_seconds, waiting

MEASURE = flags.DEFINE_boolean("measure", True, "time the layers, not only write the table anew")
POLICIES = flags.DEFINE_multi_string(
    "policy", ["float32", "mixed_bfloat16"], "dtype policies; may be repeated"
)
WAYS = ("full", "factorized", "materialized")
# Examples for each of those that the benchmark of CPUs has, so that a layer keeps a GPU busy.
ENLARGED = {"recurrent": 1, "dense": 32, "conv": 8}


def cases(suite):
    for case in CASES[suite]:
        first, *others = case.batch
        changes = {"patches": False} if suite == "conv" else {}
        yield dataclasses.replace(case, batch=(ENLARGED[suite] * first, *others), **changes)


def layers(case):
    """The layers of a case by their way, and the way that `implementation="auto"` takes."""
    full, auto = case.layers()
    config = {name: value for name, value in auto.get_config().items() if name != "name"}
    auto.build((*case.batch, case.input_dim))
    recurrent = isinstance(auto, keras.layers.RNN)
    materialized = auto._runs_on_gpu() if recurrent else auto._kernel.materialized
    ways = {
        way: type(auto).from_config({**config, "implementation": way})
        for way in WAYS
        if way != "full"
    }
    return {"full": full, **ways}, "materialized" if materialized else "factorized"


def prepare(case, policy):
    """The `Steps` of a case by way, each called once, and the way that is taken by itself."""
    keras.config.set_dtype_policy(policy)  # Of this thread.
    by_way, auto = layers(case)
    inputs = case.inputs()
    steps = {way: Steps(layer, inputs, xla=True) for way, layer in by_way.items()}
    for one in steps.values():
        one.forward()
        one.step()
    return steps, auto


def measure():
    """A record for each case and policy, with `(forward pass, training step)` by way."""
    every = [
        (case, policy) for policy in POLICIES.value for suite in ENLARGED for case in cases(suite)
    ]
    # JAX compiles, and several threads do so side by side.
    threads = None if keras.config.backend() == "jax" else 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        prepared = list(pool.map(lambda pair: prepare(*pair), every))
    records = []
    for (case, policy), (steps, auto) in zip(every, prepared, strict=True):
        kinds = ([one.forward for one in steps.values()], [one.step for one in steps.values()])
        times = [median_seconds(functions, rounds=5, burst=0.02) for functions in kinds]
        seconds = dict(zip(steps, zip(*times, strict=True), strict=True))
        record = {"case": str(case), "policy": policy, "auto": auto, "seconds": seconds}
        records.append(record)
        logging.info(json.dumps(record))
    return records


def call_seconds():
    """What a call takes that has the GPU do next to nothing."""
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
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    yield from (
        f"# Speed of bilinear layers on a GPU, {backend}",
        "",
        f"`KERAS_BACKEND={backend} python benchmarks/gpu.py`; {facts}.",
        "",
        "Milliseconds, medians, and how many times as fast as the full layer. In bold: what "
        '`implementation="auto"` takes. A materialized recurrent layer runs the loop that Keras '
        "has for its own, which is cuDNN's where there is one. A call that does next to nothing "
        f"takes {results['call'] * 1e3:.3f} ms.",
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
                    cells.append(f"**{cell}**" if way == record["auto"] else cell)
                yield "| " + " | ".join(cells) + " |"


def main(argv):
    del argv
    backend = keras.config.backend()
    path = tables.RESULTS / f"speed_gpu_{backend}.json"
    if MEASURE.value:
        if not has_gpu():
            raise app.UsageError(f"the {backend} backend sees no GPU")
        results = {
            "machine": {"GPU": gpu(), **benchmark.machine()},
            "call": call_seconds(),
            "records": measure(),
        }
        with staged(tables.RESULTS) as folder:
            (folder / path.name).write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    with staged(tables.RESULTS) as folder:
        lines = table(results, backend)
        (folder / path.with_suffix(".md").name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
