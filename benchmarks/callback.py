"""Measures when to rewrite a network during its training: accuracy, size and time of schedules.

    python benchmarks/callback.py --network=fashion_mnist --data_dir=DIR

and so on for `cifar10`. The script trains a full network, and networks that end with 3% of its
parameters:

- a fifth, half: `BilinearRewrite` rewrites the network after that part of the epochs;
- three steps: to 50%, 15% and 3%, after one, two and three fifths of the epochs;
- scratch: the network that "half" ends with, bilinear from the start.

The plans of a run choose from all factors; the plans of another run choose from near-square
factors only (`low_rank=False`). Each network is trained for the epochs of the full network. In a
second run, it is trained for as many epochs as take the time of the full network, if their number
differs and all steps of the schedule fit. Each finished run becomes a row of
`benchmarks/results/callback_NETWORK.csv`; a run that has a row is not done again. With
`--examples`, all networks are trained on that many examples, as an experiment with a table of its
own.
"""

import dataclasses
import itertools
import math
import time

import networks
import numpy as np
import tables
import training
from absl import app, flags, logging

BUDGET = 0.03
# Full networks, and epochs.
NETWORKS = {
    "fashion_mnist": (training.Run("fashion_mnist", "full", (1024, 1024)), 10),
    "cifar10": (training.Run("cifar10", "full", (32, 64, 128, 1024)), 5),
}
METHODS = ("half", "a fifth", "three steps", "scratch")
# What plans choose from, and the value of `low_rank`.
FACTORS = {"all": True, "near-square": False}
FIELDS = ("examples", "seed", "method", "factors", "equal")
FIELDS += ("epochs", "parameters", "accuracy", "seconds")

NETWORK = flags.DEFINE_enum("network", None, list(NETWORKS), "what to train")
EXAMPLES = flags.DEFINE_integer("examples", None, "training examples to use; all by default")
CHOICES = flags.DEFINE_multi_enum("factors", [*FACTORS], [*FACTORS], "what plans choose from")


def schedule(method, epochs):
    """`{epoch: budget}` of a method; empty for a method that does not rewrite."""
    if method in ("full", "scratch"):
        return {}
    if method == "three steps":
        return {
            math.ceil(part * epochs / 5): budget
            for part, budget in ((1, 0.5), (2, 0.15), (3, BUDGET))
        }
    return {math.ceil(epochs * {"half": 0.5, "a fifth": 0.2}[method]): BUDGET}


def train(run, method, factors, epochs, small, dataset):
    """A trained model, its accuracy on the test set, and the seconds of its training.

    The method `"scratch"` trains a model with the layers of `small`.
    """
    import keras

    from keras_bilinear import BilinearRewrite

    keras.utils.set_random_seed(run.seed)
    if method == "scratch":
        model, callbacks = keras.models.clone_model(small), []
    else:
        model, callbacks = networks.build(run, dataset), []
        if budgets := schedule(method, epochs):
            callbacks.append(BilinearRewrite(schedule=budgets, low_rank=FACTORS[factors]))
    steps = epochs * -(-len(dataset.x_train) // run.batch_size)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(run.learning_rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    start = time.perf_counter()
    model.fit(
        dataset.x_train,
        dataset.y_train,
        batch_size=run.batch_size,
        epochs=epochs,
        verbose=0,
        callbacks=callbacks,
    )
    seconds = time.perf_counter() - start
    results = model.evaluate(
        dataset.x_test, dataset.y_test, batch_size=500, verbose=0, return_dict=True
    )
    return model, results["accuracy"], seconds


def tabulate(rows):
    """Writes the means over seeds as Markdown, a table for each number of examples."""
    from keras_bilinear.files import staged

    lines = [
        f"# rewriting {NETWORK.value} during training",
        "",
        f"{tables.machine()}. Accuracy on the test set and seconds of `fit`, with compilation "
        "and rewriting; means over seeds.",
    ]
    for examples in dict.fromkeys(row["examples"] for row in rows):
        lines += ["", *table([row for row in rows if row["examples"] == examples])]
    with staged(tables.RESULTS) as folder:
        path = folder / f"callback_{NETWORK.value}.md"
        path.write_text("\n".join(lines) + "\n")


def table(rows):
    """The lines of one experiment: the command that makes it, and its table."""
    full = next(row for row in rows if row["method"] == "full")
    command = f"python benchmarks/callback.py --network={NETWORK.value}"
    if full["examples"] != "all":
        command += f" --examples={full['examples']}"
    choices = {row["factors"] for row in rows} & set(FACTORS)
    if choices < set(FACTORS):
        command += "".join(f" --factors={choice}" for choice in sorted(choices))
    lines = [
        f"`{command}`",
        "",
        "| method | factors | equal | epochs | seeds | parameters | share | accuracy | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    trainings = [("full", ""), *itertools.product(METHODS, FACTORS)]
    for equal, trained in itertools.product(("epochs", "time"), trainings):
        key = (*trained, equal)
        found = [row for row in rows if (row["method"], row["factors"], row["equal"]) == key]
        if not found:
            continue
        mean = {
            name: np.mean([float(row[name]) for row in found])
            for name in ("epochs", "parameters", "accuracy", "seconds")
        }
        lines.append(
            f"| {' | '.join(key)} | {mean['epochs']:g} | {len(found)} | "
            f"{mean['parameters']:,.0f} | {mean['parameters'] / int(full['parameters']):.1%} | "
            f"{mean['accuracy']:.4f} | {mean['seconds']:.0f} |"
        )
    return lines


def main(argv):
    del argv

    path = tables.RESULTS / f"callback_{NETWORK.value}.csv"
    rows = tables.read_rows(path)
    run, epochs = NETWORKS[NETWORK.value]
    dataset = training.load(run.dataset, EXAMPLES.value)
    halves = {}

    def row(seed, method, factors, equal, count):
        """The row of a run. A run without a row is done first."""
        key = str(EXAMPLES.value or "all"), str(seed), method, factors, equal
        for finished in rows:
            if tuple(finished[name] for name in FIELDS[: len(key)]) == key:
                return finished
        seeded = dataclasses.replace(run, seed=seed)
        if method == "scratch" and (seed, factors) not in halves:
            halves[seed, factors], *_ = train(seeded, "half", factors, epochs, None, dataset)
        model, result, seconds = train(
            seeded, method, factors, count, halves.get((seed, factors)), dataset
        )
        if method == "half" and equal == "epochs":
            halves[seed, factors] = model
        values = *key, count, model.count_params(), f"{result:.4f}", f"{seconds:.1f}"
        rows.append(dict(zip(FIELDS, map(str, values), strict=True)))
        tables.write_rows(path, rows)
        logging.info("%s", rows[-1])
        tabulate(rows)
        return rows[-1]

    for seed in range(training.SEEDS.value):
        full = row(seed, "full", "", "epochs", epochs)
        for method, factors in itertools.product(METHODS, CHOICES.value):
            rewritten = row(seed, method, factors, "epochs", epochs)
            more = round(epochs * float(full["seconds"]) / float(rewritten["seconds"]))
            budgets = schedule(method, more)
            steps_fit = len(budgets) == len(schedule(method, epochs))
            if more != epochs and steps_fit and more > max(budgets, default=0):
                row(seed, method, factors, "time", more)


if __name__ == "__main__":
    flags.mark_flag_as_required("network")
    app.run(main)
