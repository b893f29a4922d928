"""`keras-bilinear demo`: trains a full and a bilinear network the same way and compares them."""

import functools
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import rich.console
import rich.progress
from absl import flags

from keras_bilinear import datasets
from keras_bilinear.cli.console import print_table
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.demo.results import DemoResults, Result
from keras_bilinear.files import check_writable, staged
from keras_bilinear.kronecker.factorization import choose_factors
from keras_bilinear.layers import BilinearDense, BilinearEmbedding
from keras_bilinear.litert.export import export_litert
from keras_bilinear.litert.report import LiteRTReport
from keras_bilinear.messages import require
from keras_bilinear.reports.summary import count_macs

FLAGS = flags.FLAGS
EMBEDDING_WIDTH = 128
QUICK_EXAMPLES = 512  # examples of each split with --quick
# The flags whose values decide the results.
SETTINGS = ("width", "depth", "rank", "scale", "batch_size", "learning_rate", "seed")
# The first steps compile and warm up, and their times do not count.
UNTIMED_STEPS = 3


def main(argv: list[str]) -> None:
    """Runs the demo as the flags say.

    Args:
        argv: the name of the command; there are no positional arguments.

    Raises:
        CommandError: if there are positional arguments, if a package is missing, if the output
            folder cannot be written into, or if the data set cannot be loaded.
    """
    if len(argv) > 1:
        raise CommandError(f"demo takes flags only, not {argv[1]!r}")
    output_dir = pathlib.Path(FLAGS.output_dir)
    with command_errors(ImportError, OSError):
        require("ai_edge_litert", "matplotlib", "tensorflow")
        check_writable(output_dir)
    console = rich.console.Console(stderr=True)
    status = console.status(f"Loading {FLAGS.dataset}")
    with status, command_errors(ImportError, ValueError):
        dataset = datasets.load(FLAGS.dataset, FLAGS.data_dir)
    epochs = FLAGS.epochs or (40 if dataset.name == "digits" else 5)
    if FLAGS.quick:
        dataset, epochs = dataset.head(QUICK_EXAMPLES), 1
    outcome = DemoResults(
        dataset=dataset.name,
        settings=_settings(epochs),
        full=_run_network("full", None, dataset, epochs, output_dir, console),
        bilinear=_run_network("bilinear", FLAGS.rank, dataset, epochs, output_dir, console),
    )
    with command_errors(OSError), staged(output_dir) as folder:
        outcome.write_json(folder / "results.json")
        outcome.write_plot(folder / "results.png")
    print_table(outcome.table())
    print(f"Files are in {output_dir}.")


def _settings(epochs: int) -> dict[str, Any]:
    """The flags and versions that decide the results."""
    return {
        **{name: FLAGS[name].value for name in SETTINGS},
        "mixed_precision": FLAGS.mixed_precision,
        "quick": FLAGS.quick,
        "epochs": epochs,
        "backend": keras.backend.backend(),
        "keras": keras.version(),
    }


def _run_network(
    name: str,
    rank: int | None,
    dataset: datasets.Dataset,
    epochs: int,
    output_dir: pathlib.Path,
    console: rich.console.Console,
) -> Result:
    """Trains and writes one network, as the flags say, and measures it."""
    keras.utils.set_random_seed(FLAGS.seed)
    model = build(
        dataset,
        width=FLAGS.width,
        depth=FLAGS.depth,
        rank=rank,
        scale=FLAGS.scale,
        dtype="mixed_bfloat16" if FLAGS.mixed_precision else "float32",
    )
    steps = -(-len(dataset.x_train) // FLAGS.batch_size)
    with Progress(name, epochs, steps, console) as progress:
        accuracy = train(model, dataset, epochs, FLAGS.batch_size, FLAGS.learning_rate, progress)
    seconds = progress.step_seconds
    keras_bytes, litert = write(model, dataset, output_dir, name)
    return Result(
        parameters=model.count_params(),
        macs=count_macs(model),
        test_accuracy=accuracy[-1],
        keras_bytes=keras_bytes,
        litert_bytes=litert.bytes,
        litert_latency_us=litert.latency_us,
        litert_difference=litert.difference,
        step_ms=1e3 * statistics.median(seconds[UNTIMED_STEPS:] or seconds),
        accuracy_by_epoch=tuple(accuracy),
    )


def build(
    dataset: datasets.Dataset, width: int, depth: int, rank: int | None, scale: int, dtype: str
) -> keras.Model:
    """Makes a multilayer perceptron that classifies images or texts.

    Its first layer flattens an image, or takes the mean of the embeddings of a text's words.

    Args:
        dataset: the data set to classify.
        width: units of each hidden layer.
        depth: number of hidden layers.
        rank: number of Kronecker terms of each layer; `None` makes the full network.
        scale: number by which both output factors of every hidden layer of a bilinear network are
            multiplied. The full network ignores it.
        dtype: dtype policy of all layers but the last, which is float32.
    """
    dense: Callable[..., keras.Layer] = keras.layers.Dense
    embedding: Callable[..., keras.Layer] = keras.layers.Embedding
    if rank is not None:
        dense = functools.partial(BilinearDense, rank=rank)
        embedding = functools.partial(BilinearEmbedding, rank=rank)

    def hidden(size: int) -> tuple[int, dict[str, Any]]:
        """Width and further arguments of a hidden layer."""
        if rank is None or scale == 1:
            return size, {"dtype": dtype}
        factors = tuple(scale * factor for factor in choose_factors(size))
        return math.prod(factors), {"dtype": dtype, "output_factors": factors}

    if dataset.kind == "text":
        size, options = hidden(EMBEDDING_WIDTH)
        layers = [
            keras.Input(dataset.x_train.shape[1:], dtype="int32"),
            embedding(datasets.VOCABULARY, size, mask_zero=True, **options),
            keras.layers.GlobalAveragePooling1D(dtype=dtype),
        ]
    else:
        layers = [keras.Input(dataset.x_train.shape[1:]), keras.layers.Flatten(dtype=dtype)]
    size, options = hidden(width)
    layers += [dense(size, activation="relu", **options) for _ in range(depth)]
    layers.append(dense(dataset.classes, dtype="float32"))
    return keras.Sequential(layers)


class Progress(keras.callbacks.Callback):
    """Shows a progress bar for a whole training and times its steps.

    Args:
        name: name of the network.
        epochs: number of epochs.
        steps: number of steps in each epoch.
        console: where to show the bar; `None` takes the default console of `rich`.
    """

    def __init__(
        self, name: str, epochs: int, steps: int, console: rich.console.Console | None
    ) -> None:
        super().__init__()
        self.step_seconds: list[float] = []
        self._title = f"{name:8} network"
        self._bar = rich.progress.Progress(
            "{task.description}",
            rich.progress.BarColumn(),
            "{task.completed}/{task.total} steps",
            rich.progress.TimeElapsedColumn(),
            "{task.fields[accuracy]}",
            console=console,
        )
        self._task = self._bar.add_task(self._title, total=epochs * steps, accuracy="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def on_train_batch_begin(self, batch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.step_seconds.append(time.perf_counter() - self._begin)
        self._bar.advance(self._task)

    def on_epoch_end(self, epoch, logs: Any = None):
        accuracy = f"test accuracy {logs['val_accuracy']:.2%}"
        self._bar.update(self._task, accuracy=accuracy)


def train(
    model: keras.Model,
    dataset: datasets.Dataset,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    progress: Progress,
) -> list[float]:
    """Trains a network with Adam; returns the test accuracy after each epoch."""
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        dataset.x_train,
        dataset.y_train,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(dataset.x_test, dataset.y_test),
        callbacks=[progress],
        verbose=0,
    )
    return history.history["val_accuracy"]


def write(
    model: keras.Model, dataset: datasets.Dataset, output_dir: pathlib.Path, name: str
) -> tuple[int, LiteRTReport]:
    """Writes a trained network as `.keras` and `.tflite` and measures both files.

    Args:
        model: the network.
        dataset: its data set; both files are compared on the test split.
        output_dir: folder of the files.
        name: name of the files without suffix.

    Returns:
        The size of the `.keras` file in bytes, and the report on the `.tflite` file.

    Raises:
        CommandError: if a file cannot be written.
    """
    with command_errors(OSError), staged(output_dir) as folder:
        keras_file, litert_file = folder / f"{name}.keras", folder / f"{name}.tflite"
        model.save(keras_file)
        litert = export_litert(model, litert_file, representative_data=dataset.x_test)
        return keras_file.stat().st_size, litert
