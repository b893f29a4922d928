"""Measures size, speed, memory and accuracy of LiteRT files, full and bilinear.

    python benchmarks/litert_files.py --suite=layers
    python benchmarks/litert_files.py --suite=networks --data_dir=DIR
    python benchmarks/litert_files.py --suite=applications

Each suite writes `benchmarks/results/litert_SUITE.json` and a table beside it, as Markdown.

`layers` exports each kind of layer alone. `networks` exports the networks of four data sets, full
and bilinear. They are trained for a few epochs, which is enough to see how much accuracy a file
loses against its model. `applications` exports two networks of keras.applications with random
weights, rewritten to a tenth of their parameters.

A process that does nothing else runs a file, on one and on two threads, one example at a time. The
processes of all files take turns, and the medians over the rounds count.
"""

import dataclasses
import json
import pathlib
import statistics
import tempfile

import keras
import networks
import numpy as np
import tables
import training
from absl import app, flags, logging
from keras import layers

import keras_bilinear
from keras_bilinear import export_litert, rewrite_model
from keras_bilinear.benchmark.report import machine
from keras_bilinear.files import staged
from keras_bilinear.litert.run import run_litert
from keras_bilinear.tables import bytes_text

RANKS = (1, 4)
QUANTIZE = (None, "dynamic_int8", "int8")
THREADS = (1, 2)
ROUNDS = 3
SECONDS = 0.3
STEPS, TOKENS = 32, 100

SUITE = flags.DEFINE_enum("suite", None, ["layers", "networks", "applications"], "what to measure")


@dataclasses.dataclass
class Record:
    """What one file holds, and what was measured on it."""

    model: str
    variant: str
    quantize: str
    parameters: int
    bytes: int = 0
    ops: dict = dataclasses.field(default_factory=dict)
    arena_bytes: int = 0
    difference: float = 0.0
    latency_us: list = dataclasses.field(default_factory=lambda: [[] for _ in THREADS])
    memory_bytes: list = dataclasses.field(default_factory=lambda: [[] for _ in THREADS])
    accuracy: float | None = None
    model_accuracy: float | None = None


def layer_cases():
    """`(name, {variant: model}, inputs)` of each layer."""
    rng = np.random.default_rng(0)
    cases = []
    for width in (1024, 4096):
        cases.append((f"dense {width}", "Dense", (width,), {"units": width}))
    for channels, size in ((64, 32), (128, 16), (256, 8)):
        arguments = {"filters": channels, "kernel_size": 3, "padding": "same"}
        name = f"conv 3x3, {channels} channels, {size}x{size}"
        cases.append((name, "Conv2D", (size, size, channels), arguments))
    for rows, width in ((20_000, 128), (100_000, 256)):
        arguments = {"input_dim": rows, "output_dim": width}
        cases.append((f"embedding {rows:,} x {width}", "Embedding", (TOKENS,), arguments))
    for kind in ("GRU", "LSTM"):
        for width, units in ((64, 256), (256, 512)):
            name = f"{kind} {width} -> {units}, {STEPS} steps"
            cases.append((name, kind, (STEPS, width), {"units": units}))
    for name, kind, shape, arguments in cases:
        inputs = rng.normal(size=(64, *shape)).astype("float32")
        if kind == "Embedding":
            inputs = rng.integers(0, arguments["input_dim"], inputs.shape).astype("int32")

        def model(layer, shape=shape, dtype=inputs.dtype.name):
            return keras.Sequential([keras.Input(shape, dtype=dtype), layer])

        variants = {"full": model(getattr(layers, kind)(**arguments))}
        for rank in RANKS:
            bilinear = getattr(keras_bilinear, f"Bilinear{kind}")
            variants[f"rank {rank}"] = model(bilinear(**arguments, rank=rank))
        yield name, variants, inputs, None


NETWORKS = {
    "fashion_mnist, MLP": (training.Run("fashion_mnist", "", (1024, 1024), epochs=4), 10),
    "cifar10, VGG": (training.Run("cifar10", "", (32, 64, 128, 1024), epochs=3), 4),
    "imdb_reviews, GRU": (training.Run("imdb_reviews", "", (64, 64), epochs=4, recurrent="GRU"), 8),
    "spoken_digit, GRU": (
        training.Run("spoken_digit", "", (256,), epochs=15, recurrent="GRU"),
        4,
    ),
}
MODELS_DIR = flags.DEFINE_string(
    "models_dir",
    str(pathlib.Path(tempfile.gettempdir(), "keras_bilinear_litert")),
    "where the trained networks are kept, so that only the files are measured anew",
)
EXAMPLES = flags.DEFINE_integer("examples", 20_000, "training examples of a network")
TESTED = flags.DEFINE_integer("tested", 10_000, "test examples that each file is run on")


def network_cases():
    """`(name, {variant: trained model}, inputs, test set)` of each benchmark."""
    for name, (run, rank) in NETWORKS.items():
        dataset = training.load(run.dataset, EXAMPLES.value)
        bilinear = dataclasses.replace(run, rank=rank, pattern="channel")
        variants = {
            "full": trained(run, dataset),
            f"rank {rank}": trained(bilinear, dataset),
        }
        # Labels may be sorted.
        chosen = np.random.default_rng(0).permutation(len(dataset.x_test))[: TESTED.value]
        test = dataset.x_test[chosen], dataset.y_test[chosen]
        yield name, variants, dataset.x_train[:256], test


def trained(run, dataset):
    path = pathlib.Path(MODELS_DIR.value, f"{run.dataset}_{run.recurrent}_{run.rank}.keras")
    if not path.exists():
        keras.utils.set_random_seed(0)
        model = networks.build(run, dataset)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, metrics=["accuracy"])
        model.fit(dataset.x_train, dataset.y_train, run.batch_size, run.epochs, verbose=0)
        with staged(path.parent) as folder:
            model.save(folder / path.name)
    return keras.models.load_model(path, compile=False)


def application_cases():
    """`(name, {variant: model}, inputs, None)` of each application."""
    for name in ("VGG16", "MobileNetV2"):
        keras.utils.set_random_seed(0)
        model = getattr(keras.applications, name)(weights=None)
        inputs = np.random.default_rng(0).uniform(size=(16, *model.input_shape[1:]))
        variants = {"full": model, "10%": rewrite_model(model, budget=0.1)}
        yield name, variants, inputs.astype("float32"), None


def correct(outputs, labels):
    (outputs,) = outputs.values() if isinstance(outputs, dict) else (outputs,)
    return float(np.mean(outputs.reshape(len(labels), -1).argmax(-1) == labels))


def export(cases, folder):
    """Writes all files and runs each file on its test set: `[(record, path, inputs)]`."""
    files = []
    for name, variants, inputs, test in cases:
        for variant, model in variants.items():
            for quantize in QUANTIZE:
                path = folder / f"{len(files)}.tflite"
                logging.info("%s, %s, %s", name, variant, quantize)
                report = export_litert(
                    model, path, quantize, representative_data=inputs, tolerance=1.0
                )
                record = Record(name, variant, quantize or "float32", model.count_params())
                record.bytes, record.ops = report.bytes, report.ops
                record.arena_bytes, record.difference = report.arena_bytes, report.difference
                if test:
                    x, labels = test
                    record.accuracy = correct(
                        run_litert(path, {"input_1": x[:, None]}, seconds=0).outputs, labels
                    )
                    record.model_accuracy = correct(model.predict(x, verbose=0), labels)
                files.append((record, path, inputs[:1, None]))
    return files


def measure(files):
    for number in range(ROUNDS):
        logging.info("round %d of %d", number + 1, ROUNDS)
        for record, path, inputs in files:
            for index, threads in enumerate(THREADS):
                run = run_litert(path, {"input_1": inputs}, threads, SECONDS)
                record.latency_us[index].append(run.latency_us)
                record.memory_bytes[index].append(run.memory_bytes or 0)
    for record, *_ in files:
        record.latency_us = [statistics.median(times) for times in record.latency_us]
        record.memory_bytes = [statistics.median(sizes) for sizes in record.memory_bytes]


def tabulate(records, command):
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    lines = [
        f"# LiteRT, {SUITE.value}",
        "",
        f"`{command}`; {facts}; XNNPACK on. In brackets: how many times as small, and as fast, as "
        "the full model's file of the same kind. Memory: resident memory, at its peak, of a "
        "process that only loads and runs the file on one thread.",
        "",
    ]
    tested = any(record.accuracy is not None for record in records)
    header = ["model", "variant", "numbers", "parameters", "bytes", "µs, 1 thread", "µs, 2 threads"]
    header += ["memory", "difference", *(["accuracy", "model's"] if tested else [])]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    full = {
        (record.model, record.quantize): record for record in records if record.variant == "full"
    }
    for record in records:
        other = full[record.model, record.quantize]

        def ratio(text, of, record=record, other=other):
            if record is other:
                return text
            times = of(other) / of(record)
            return f"{text} ({times:.{1 if times >= 1 else 2}f}x)"

        cells = [record.model, record.variant, record.quantize, f"{record.parameters:,}"]
        cells.append(ratio(f"{record.bytes:,}", lambda record: record.bytes))
        for index in range(len(THREADS)):
            text = f"{record.latency_us[index]:,.0f}"
            cells.append(ratio(text, lambda record, index=index: record.latency_us[index]))
        cells += [bytes_text(record.memory_bytes[0]), f"{record.difference:.1e}"]
        if tested:
            cells += [f"{record.accuracy:.4f}", f"{record.model_accuracy:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv):
    del argv
    cases = {
        "layers": layer_cases,
        "networks": network_cases,
        "applications": application_cases,
    }[SUITE.value]()
    with tempfile.TemporaryDirectory() as folder:
        files = export(cases, pathlib.Path(folder))
        measure(files)
    records = [record for record, *_ in files]
    command = f"python benchmarks/litert_files.py --suite={SUITE.value}"
    results = {"command": command, **machine(), "records": [*map(dataclasses.asdict, records)]}
    with staged(tables.RESULTS) as folder:
        (folder / f"litert_{SUITE.value}.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / f"litert_{SUITE.value}.md").write_text(tabulate(records, command))


if __name__ == "__main__":
    flags.mark_flag_as_required("suite")
    app.run(main)
