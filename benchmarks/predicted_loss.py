"""Compares the predicted losses of 30 plans of a trained network with what is measured.

    python benchmarks/predicted_loss.py --data_dir=DIR

The network is a multilayer perceptron on Fashion-MNIST, trained here. There are three kinds of
plans, with ten budgets each. The measured loss is the divergence of the rewritten network's
probabilities from the full network's, on the calibration data and on the test set.
"""

import dataclasses

import numpy as np
import tables
import training
from absl import app
from scipy import stats

BUDGETS = {
    "all": (0.5, 0.35, 0.25, 0.18, 0.12, 0.09, 0.06, 0.04, 0.03, 0.02),
    # Fits of high ranks take long, and larger budgets are not used up.
    "near-square": (0.12, 0.1, 0.09, 0.08, 0.06, 0.05, 0.04, 0.03, 0.025, 0.02),
    "all, the last layer full": (0.45, 0.3, 0.2, 0.15, 0.11, 0.08, 0.05, 0.035, 0.03, 0.025),
}
EXAMPLES = 2048


def main(argv):
    del argv
    import keras
    import networks

    from keras_bilinear import plan_rewrite, rewrite_model

    run = training.Run("fashion_mnist", "full", (512, 512, 512), epochs=6)
    dataset = training.load(run.dataset, None)
    keras.utils.set_random_seed(0)
    model = networks.build(dataclasses.replace(run, seed=0), dataset)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    model.fit(dataset.x_train, dataset.y_train, batch_size=128, epochs=run.epochs, verbose=2)
    data = dataset.x_train[:EXAMPLES]
    sets = {"calibration": data, "test": dataset.x_test}
    full = {name: log_softmax(model.predict(x, verbose=0)) for name, x in sets.items()}
    lines, predicted, measured = [], [], {name: [] for name in sets}
    options = {
        "all": {},
        "near-square": {"low_rank": False},
        "all, the last layer full": {"exclude": [model.layers[-1]]},
    }
    for family, budget in ((family, b) for family, budgets in BUDGETS.items() for b in budgets):
        plan = plan_rewrite(model, budget, calibration_data=data, **options[family])
        small = rewrite_model(model, plan, calibration_data=data)
        predicted.append(plan.predicted_loss)
        for name, x in sets.items():
            logits = log_softmax(small.predict(x, verbose=0))
            gap = np.exp(full[name]) * (full[name] - logits)
            measured[name].append(gap.sum(-1).mean())
        accuracy = np.mean(logits.argmax(-1) == dataset.y_test)
        lines.append(
            f"| {family} | {budget} | {plan.parameters:,} | {predicted[-1]:.4f} | "
            f"{measured['calibration'][-1]:.4f} | {measured['test'][-1]:.4f} | {accuracy:.4f} |"
        )
        print(lines[-1], flush=True)
    ranks = {name: stats.spearmanr(predicted, values)[0] for name, values in measured.items()}
    accuracy = np.mean(full["test"].argmax(-1) == dataset.y_test)
    tables.write_lines(
        "predicted_loss.md",
        [
            "# predicted loss",
            "",
            f"`python benchmarks/predicted_loss.py`; {tables.machine()}. A network "
            f"784-512-512-512-10 with a test accuracy of {accuracy:.4f}, "
            f"{EXAMPLES:,} calibration examples, losses in nats. "
            "Rank correlation of predicted and measured losses: "
            f"{ranks['calibration']:.3f} on the calibration data, {ranks['test']:.3f} on the test "
            "set.",
            "",
            "| factors | budget | parameters | predicted | measured, calibration | measured, test "
            "| accuracy |",
            "|---|---|---|---|---|---|---|",
            *lines,
        ],
    )


def log_softmax(logits):
    logits = logits.astype("float64")
    return (
        logits
        - logits.max(-1, keepdims=True)
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )


if __name__ == "__main__":
    app.run(main)
