"""Measures the first steps after a rewrite, by Adam's first second moments of the new factors.

    python benchmarks/first_steps.py --data_dir=DIR

Full networks are trained for a fifth of their epochs. Then they train for 300 more steps: full, and
rewritten by `BilinearRewrite` to 3% of their parameters. Adam's second moments of the new factors
begin at zero, at the estimate of `keras_bilinear.rewriting.adam`, or at the estimate times
`CAUTION`, as in the package. The script writes the accuracies on the test set into
`benchmarks/results/first_steps.md`.
"""

import pathlib
import tempfile
from unittest import mock

import networks
import tables
import training
from absl import app, logging

BUDGET = 0.03
RUNS = (
    training.Run("fashion_mnist", "full", (1024, 1024), epochs=5),
    training.Run("cifar10", "full", (32, 64, 128, 1024), epochs=5),
    training.Run("spoken_digit", "full", (256,), epochs=30, recurrent="GRU"),
)
STEPS, TIMES = 50, 6


def begin(run, dataset, path):
    """Trains a full network for a fifth of its epochs and saves it, with its optimizer."""
    import keras

    keras.utils.set_random_seed(0)
    model = networks.build(run, dataset)
    steps = run.epochs * -(-len(dataset.x_train) // run.batch_size)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(run.learning_rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        dataset.x_train,
        dataset.y_train,
        batch_size=run.batch_size,
        epochs=run.epochs // 5,
        verbose=0,
    )
    model.save(path)


def go_on(run, dataset, path, rewritten):
    """Accuracies of the saved network, rewritten or not, before and during further training."""
    import keras

    from keras_bilinear import BilinearRewrite

    def evaluate(*_):
        results = model.evaluate(
            dataset.x_test, dataset.y_test, batch_size=500, verbose=0, return_dict=True
        )
        accuracies.append(results["accuracy"])

    keras.utils.set_random_seed(1)
    model, accuracies, now = keras.models.load_model(path), [], run.epochs // 5
    callbacks = [BilinearRewrite(at_epoch=now, budget=BUDGET)] if rewritten else []
    model.fit(
        dataset.x_train,
        dataset.y_train,
        batch_size=run.batch_size,
        steps_per_epoch=STEPS,
        initial_epoch=now,
        epochs=now + TIMES,
        callbacks=[*callbacks, keras.callbacks.LambdaCallback(on_epoch_begin=evaluate)],
        verbose=0,
    )
    evaluate()
    return accuracies


def main(argv):
    del argv
    from keras_bilinear.files import staged
    from keras_bilinear.rewriting import adam

    steps = " | ".join(f"after {STEPS * time}" for time in range(1, TIMES + 1))
    lines = [
        "# first steps after a rewrite",
        "",
        f"`python benchmarks/first_steps.py`; {tables.machine()}. Accuracy on the test set, "
        "right after the rewrite and after steps of training; one seed.",
        "",
        f"| network | squares begin with | at first | {steps} |",
        "|---|---|---|" + "---|" * TIMES,
    ]
    cautions = {"zero": 0.0, "the estimate": 1.0, "as in the package": adam.CAUTION}
    for run in RUNS:
        dataset = training.load(run.dataset)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "model.keras")
            begin(run, dataset, path)
            found = {"full, as it is": go_on(run, dataset, path, rewritten=False)}
            for name, caution in cautions.items():
                with mock.patch.object(adam, "CAUTION", caution):
                    found[name] = go_on(run, dataset, path, rewritten=True)
        for name, accuracies in found.items():
            numbers = " | ".join(f"{accuracy:.4f}" for accuracy in accuracies)
            lines.append(f"| {run.dataset} {run.recurrent} | {name} | {numbers} |")
            logging.info("%s", lines[-1])
    with staged(tables.RESULTS) as folder:
        (folder / "first_steps.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
