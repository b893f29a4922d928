"""Trains full, bilinear and narrower full networks alike, and tabulates how well they do.

    python benchmarks/accuracy.py --study=fashion_mnist --data_dir=DIR
    python benchmarks/accuracy.py --study=initialization --data_dir=DIR

Each finished run appends one row to `benchmarks/results/accuracy_STUDY.csv`; a
run that stands there already is not done again, so a study can be stopped and
continued. The table of means over the rows so far is written beside it, as
Markdown.

The last tenth of the training set is held out. Learning rates are compared by
the accuracy on it. The weight decay and dropout of the fashion_mnist study were
chosen on earlier single runs that showed the test accuracy.
"""

import csv
import dataclasses
import itertools
import pathlib
import platform
import time

from absl import app, flags, logging

STUDY = flags.DEFINE_enum("study", None, ["fashion_mnist", "initialization"], "what to run")
DATA_DIR = flags.DEFINE_string("data_dir", None, "where tfds keeps its data")
SEEDS = flags.DEFINE_integer("seeds", 3, "number of seeds", lower_bound=1)
RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training, and all that decides its outcome.

    `kernels` says how the bilinear layers store their factors: `"gain"` is what
    the package does; `"plain"` stores the factors themselves; `"undivided"`
    keeps the gain in the gradients. Full networks have `"full"`.
    """

    dataset: str
    network: str
    hidden: tuple
    rank: int
    kernels: str
    optimizer: str
    learning_rate: float
    weight_decay: float
    dropout: float
    epochs: int
    seed: int

    @property
    def key(self):
        return tuple(str(value) for value in dataclasses.astuple(self))


def fashion_mnist():
    """The MLP 784-1024-1024-10 against bilinear ones of at most 2.5% of its size.

    All networks with and without weight decay and dropout; each at the learning
    rate that is best for the full one and at twice that, and at lower or higher
    ones where that could be better.
    """
    regularized = {"optimizer": "adamw", "weight_decay": 0.05, "dropout": 0.1}
    plain = {"optimizer": "adam", "weight_decay": 0.0, "dropout": 0.0}
    full = (1024, 1024)
    for network, hidden, rank, kernels, regime, learning_rates in (
        ("full", full, 0, "full", plain, (5e-4, 1e-3, 2e-3)),
        ("full", full, 0, "full", regularized, (5e-4, 1e-3, 2e-3)),
        ("bilinear, rank 10", full, 10, "gain", regularized, (1e-3, 2e-3)),
        ("narrower full", (54, 54), 0, "full", plain, (1e-3, 2e-3, 4e-3)),
        ("narrower full", (54, 54), 0, "full", regularized, (1e-3, 2e-3)),
        ("bilinear, rank 10", full, 10, "gain", plain, (1e-3,)),
        ("bilinear, scale 2, rank 3", (4096, 4096), 3, "gain", regularized, (1e-3,)),
        ("bilinear, rank 10", full, 10, "gain", regularized, (4e-3,)),
    ):
        for learning_rate, seed in itertools.product(learning_rates, range(SEEDS.value)):
            yield Run(
                dataset="fashion_mnist",
                network=network,
                hidden=hidden,
                rank=rank,
                kernels=kernels,
                learning_rate=learning_rate,
                epochs=12,
                seed=seed,
                **regime,
            )


def initialization():
    """The ways to store factors, on three data sets, at the full network's learning rates."""
    tasks = (
        ("digits", (256, 256, 256), 30, {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.03}),
        ("fashion_mnist", (1024, 1024), 4, {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.03}),
        ("imdb_reviews", (128,), 4, {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.3}),
    )
    for dataset, hidden, epochs, learning_rates in tasks:
        for optimizer, learning_rate in learning_rates.items():
            # Dividing the gradients makes no difference to Adam and its kin.
            ways = ("gain", "plain", "undivided") if optimizer == "sgd" else ("gain", "plain")
            networks = [("full", 0), *itertools.product(ways, (1, 4))]
            for (kernels, rank), seed in itertools.product(networks, range(SEEDS.value)):
                network = f"bilinear, rank {rank}" if rank else "full"
                yield Run(
                    dataset=dataset,
                    network=network,
                    hidden=hidden,
                    rank=rank,
                    kernels=kernels,
                    optimizer=optimizer,
                    learning_rate=learning_rate,
                    weight_decay=0.004 if optimizer == "adamw" else 0.0,
                    dropout=0.0,
                    epochs=epochs,
                    seed=seed,
                )


def build(run, dataset):
    import keras

    import keras_bilinear

    def dense(units, **kwargs):
        if not run.rank:
            return keras.layers.Dense(units, **kwargs)
        return keras_bilinear.BilinearDense(units, rank=run.rank, **kwargs)

    if dataset.kind == "text":
        embedding = (
            keras_bilinear.BilinearEmbedding(20_000, 128, rank=run.rank)
            if run.rank
            else keras.layers.Embedding(20_000, 128)
        )
        inputs = keras.Input(dataset.x_train.shape[1:], dtype="int32")
        first = [embedding, keras.layers.GlobalAveragePooling1D()]
    else:
        inputs = keras.Input(dataset.x_train.shape[1:])
        first = [keras.layers.Flatten()]
    hidden = []
    for units in run.hidden:
        hidden.append(dense(units, activation="relu"))
        if run.dropout:
            hidden.append(keras.layers.Dropout(run.dropout))
    return keras.Sequential([inputs, *first, *hidden, dense(dataset.classes)])


def store_plainly(model):
    """Makes each bilinear layer store the factors of its kernel without a gain."""
    from keras_bilinear.layers.projection import BilinearLayer

    for layer in model.layers:
        if isinstance(layer, BilinearLayer):
            kernel = layer._kernel
            kernel.left.assign(kernel.left * kernel.gain**0.5)
            kernel.right.assign(kernel.right * kernel.gain**0.5)
            kernel.gain = 1.0


def train(run, dataset):
    """Trains as `run` says; returns the columns of its row that are measured."""
    import keras

    from keras_bilinear.layers import projection

    keras.utils.set_random_seed(run.seed)
    model = build(run, dataset)
    if run.kernels == "plain":
        store_plainly(model)
    held_out = len(dataset.x_train) // 10
    held_out_set = dataset.x_train[-held_out:], dataset.y_train[-held_out:]
    x, y = dataset.x_train[:-held_out], dataset.y_train[:-held_out]
    batch_size = 32 if len(x) < 10_000 else 128
    schedule = keras.optimizers.schedules.CosineDecay(
        run.learning_rate, run.epochs * -(-len(x) // batch_size)
    )
    optimizer = {
        "adam": keras.optimizers.Adam,
        "adamw": lambda rate: keras.optimizers.AdamW(rate, weight_decay=run.weight_decay),
        "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
    }[run.optimizer](schedule)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    scale_gradient = projection._scale_gradient
    if run.kernels == "undivided":
        projection._scale_gradient = lambda x, scale: x
    try:
        start = time.perf_counter()
        history = model.fit(x, y, batch_size=batch_size, epochs=run.epochs, verbose=0)
        seconds = time.perf_counter() - start
    finally:
        projection._scale_gradient = scale_gradient
    evaluate = lambda x, y: model.evaluate(x, y, batch_size=1000, verbose=0)[1]  # noqa: E731
    return {
        "parameters": model.count_params(),
        "train_loss": f"{history.history['loss'][-1]:.4f}",
        "held_out_accuracy": f"{evaluate(*held_out_set):.4f}",
        "test_accuracy": f"{evaluate(dataset.x_test, dataset.y_test):.4f}",
        "seconds": f"{seconds:.0f}",
    }


def machine():
    import keras

    versions = f"Python {platform.python_version()}, Keras {keras.__version__}"
    return f"{versions}, {keras.config.backend()} backend, {platform.machine()} CPU"


def tabulate(rows, path, command):
    """Writes the means and deviations over the seeds as a Markdown table."""
    import numpy as np

    group = ("dataset", "optimizer", "dropout", "network", "kernels", "learning_rate", "epochs")
    header = (*group, "seeds", "parameters", "share", "train loss", "held-out accuracy")
    header += ("test accuracy",)
    lines = [
        f"# {path.stem.replace('_', ' ')}",
        "",
        f"`{command}`; {machine()}. Mean ± deviation over seeds.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    rows = sorted(rows, key=lambda row: (row["dataset"], row["optimizer"], row["dropout"]))
    full_size = {r["dataset"]: int(r["parameters"]) for r in rows if r["network"] == "full"}
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in group), []).append(row)
    for key, members in groups.items():
        size = int(members[0]["parameters"])
        spread = []
        for column in ("train_loss", "held_out_accuracy", "test_accuracy"):
            values = np.array([float(row[column]) for row in members])
            spread.append(f"{values.mean():.4f} ± {values.std():.4f}")
        share = size / full_size[members[0]["dataset"]]
        cells = (*key, len(members), f"{size:,}", f"{share:.2%}", *spread)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    temporary = path.with_suffix(".md.tmp")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(path)


def main(argv):
    del argv
    from keras_bilinear import datasets

    fields = [field.name for field in dataclasses.fields(Run)]
    path = RESULTS / f"accuracy_{STUDY.value}.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    finished = {tuple(row[name] for name in fields) for row in rows}
    command = f"python benchmarks/accuracy.py --study={STUDY.value}"
    loaded = {}
    for run in {"fashion_mnist": fashion_mnist, "initialization": initialization}[STUDY.value]():
        if run.key in finished:
            continue
        if run.dataset not in loaded:
            loaded[run.dataset] = datasets.load(run.dataset, DATA_DIR.value)
        row = dict(zip(fields, run.key, strict=True)) | train(run, loaded[run.dataset])
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if not rows:
                writer.writeheader()
            writer.writerow(row)
        rows.append({name: str(value) for name, value in row.items()})
        logging.info("%s", row)
        tabulate(rows, path.with_suffix(".md"), command)


if __name__ == "__main__":
    flags.mark_flag_as_required("study")
    app.run(main)
