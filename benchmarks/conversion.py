"""Measures the accuracy of a trained network right after a rewrite and as it trains on.

    python benchmarks/conversion.py

The data are scikit-learn's digits. The network is an MLP 64-256-256-256-10, whose dense layers all
get the same rank. The accuracy on the test set is measured right after the rewrite and after 3 and
20 epochs of training. The factors are the Kronecker sum nearest to each kernel, or fitted to the
training inputs, or random, which is training from scratch.
"""

import json

import numpy as np
import tables
from absl import app, flags

SEEDS = flags.DEFINE_integer("seeds", 3, "number of seeds", lower_bound=1)
RANKS = (2, 4, 8)
EPOCHS = (0, 3, 20)
FULL_EPOCHS = 30


def train_full(dataset):
    import keras

    hidden = (keras.layers.Dense(256, activation="relu") for _ in range(3))
    inputs = keras.Input(dataset.x_train.shape[1:])
    model = keras.Sequential(
        [inputs, keras.layers.Flatten(), *hidden, keras.layers.Dense(dataset.classes)]
    )
    compile_model(model)
    model.fit(dataset.x_train, dataset.y_train, epochs=FULL_EPOCHS, verbose=0)
    return model


def compile_model(model):
    import keras

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])


def accuracy(model, dataset):
    return model.evaluate(dataset.x_test, dataset.y_test, verbose=0, return_dict=True)["accuracy"]


def rewritten(model, rank, start, dataset):
    import keras

    import keras_bilinear

    data = dataset.x_train if start == "fitted" else None
    small = keras_bilinear.rewrite_model(model, rank=rank, calibration_data=data)
    if start == "random":
        small = keras.models.clone_model(small)
        compile_model(small)
    return small


def measure(seed, dataset):
    """`{(rank, start): accuracies}`, the full network's under `(0, "full")`, and the sizes."""
    import keras

    keras.utils.set_random_seed(seed)
    model = train_full(dataset)
    results = {(0, "full"): [accuracy(model, dataset)]}
    sizes = {0: model.count_params()}
    for rank in RANKS:
        for start in ("nearest", "fitted", "random"):
            small = rewritten(model, rank, start, dataset)
            sizes[rank] = small.count_params()
            done, results[rank, start] = 0, []
            for epochs in EPOCHS:
                small.fit(
                    dataset.x_train, dataset.y_train, initial_epoch=done, epochs=epochs, verbose=0
                )
                done = epochs
                results[rank, start].append(accuracy(small, dataset))
    return results, sizes


def main(argv):
    del argv

    from keras_bilinear import datasets
    from keras_bilinear.files import staged

    dataset = datasets.load("digits")
    runs = []
    for seed in range(SEEDS.value):
        results, sizes = measure(seed, dataset)
        runs.append(results)
    mean = {key: np.mean([run[key] for run in runs], axis=0) for key in runs[0]}
    lines = [
        "# conversion",
        "",
        f"`python benchmarks/conversion.py --seeds={SEEDS.value}`; "
        f"{tables.machine()}. Accuracy on the test set: right after the rewrite "
        f"/ after {EPOCHS[1]} / after {EPOCHS[2]} epochs of training; means over "
        f"{SEEDS.value} seeds.",
        "",
        f"Full network: {sizes[0]:,} parameters, {mean[0, 'full'][0]:.4f}.",
        "",
        "| rank | parameters | share | nearest | fitted | random |",
        "|---|---|---|---|---|---|",
    ]
    for rank in RANKS:
        cells = [
            " / ".join(f"{value:.3f}" for value in mean[rank, start])
            for start in ("nearest", "fitted", "random")
        ]
        share = sizes[rank] / sizes[0]
        lines.append(f"| {rank} | {sizes[rank]:,} | {share:.1%} | {' | '.join(cells)} |")
    records = [{f"{rank} {start}": list(v) for (rank, start), v in run.items()} for run in runs]
    with staged(tables.RESULTS) as folder:
        (folder / "conversion_digits.md").write_text("\n".join(lines) + "\n")
        (folder / "conversion_digits.json").write_text(json.dumps(records, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    app.run(main)
