"""Measures the accuracy of a trained network that is rewritten, at once and after fine-tuning.

    python benchmarks/rewriting.py --network=fashion_mnist --data_dir=DIR

and so on for `cifar10` and `spoken_digit`. A full network is trained and then made smaller, at four
budgets, by these methods:

- fitted: `rewrite_model` with a plan and a fit to training inputs;
- nearest: `rewrite_model` without data, to the nearest Kronecker sum of each kernel;
- svd: each kernel becomes a product of two matrices, by truncated singular value decomposition.
  The ranks rise where a rank keeps most energy for its parameters, until there are as many
  parameters as in the fitted network;
- scratch: the fitted network with random weights.

The full network is trained further in the same way. Each finished run becomes a row of
`benchmarks/results/rewriting_NETWORK.csv`; a run that has a row is not done again.
"""

import itertools
import pathlib
import tempfile

import networks
import numpy as np
import tables
import training
from absl import app, flags, logging

BUDGETS = (0.5, 0.25, 0.1, 0.05)
METHODS = ("fitted", "nearest", "svd", "scratch")
EPOCHS = 5
# Full networks: how they are trained, and inputs for the fit.
NETWORKS = {
    "fashion_mnist": (training.Run("fashion_mnist", "full", (1024, 1024), epochs=12), 4096),
    "cifar10": (training.Run("cifar10", "full", (32, 64, 128, 1024), epochs=8), 1024),
    "spoken_digit": (
        training.Run("spoken_digit", "full", (256,), epochs=30, recurrent="GRU"),
        1024,
    ),
}
FINE_TUNING_RATE = 5e-4
FIELDS = ("seed", "budget", "method", "parameters", "one_shot", "epoch_1", f"epoch_{EPOCHS}")

NETWORK = flags.DEFINE_enum("network", None, list(NETWORKS), "what to rewrite")
EXAMPLES = flags.DEFINE_integer("examples", None, "training examples to use; all by default")
METHODS_TO_RUN = flags.DEFINE_list("methods", list(METHODS), "methods to run")
MODELS_DIR = flags.DEFINE_string(
    "models_dir",
    str(pathlib.Path(tempfile.gettempdir(), "keras_bilinear_models")),
    "where trained full networks are kept, so that a study can go on",
)


def compile_model(model, rate, epochs, dataset, batch_size):
    import keras

    steps = epochs * -(-len(dataset.x_train) // batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss, metrics=["accuracy"])


def test_accuracy(model, dataset):
    results = model.evaluate(
        dataset.x_test, dataset.y_test, batch_size=500, verbose=0, return_dict=True
    )
    return results["accuracy"]


def trained(run, dataset, path):
    import keras

    if not path.exists():
        keras.utils.set_random_seed(run.seed)
        model = networks.build(run, dataset)
        compile_model(model, run.learning_rate, run.epochs, dataset, run.batch_size)
        model.fit(
            dataset.x_train,
            dataset.y_train,
            batch_size=run.batch_size,
            epochs=run.epochs,
            verbose=0,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
    return keras.models.load_model(path)


def make_small(model, budget, method, data, seed, cache):
    """The network of a method; `cache` keeps the fitted network, whose size other methods need."""
    import keras

    from keras_bilinear import plan_rewrite, rewrite_model

    if method == "nearest":
        return rewrite_model(model, budget=budget)
    if (seed, budget) not in cache:
        plan = plan_rewrite(model, budget=budget, calibration_data=data)
        logging.info("%s", plan)
        cache[seed, budget] = rewrite_model(model, plan, data)
    fitted = cache[seed, budget]
    if method == "svd":
        return low_rank_model(model, fitted.count_params())
    if method == "scratch":
        keras.utils.set_random_seed(seed)
        return keras.models.clone_model(fitted)
    return fitted


def low_rank_model(model, parameters):
    """A Sequential model whose kernels are products of two matrices, within a parameter limit."""
    import keras

    kernels = {}
    for layer in model.layers:
        for name in ("kernel", "recurrent_kernel"):
            owner = getattr(layer, "cell", layer)
            if hasattr(owner, name):
                kernel = keras.ops.convert_to_numpy(getattr(owner, name))
                kernels[layer.name, name] = kernel.reshape(-1, kernel.shape[-1])
    values = {key: np.linalg.svd(kernel, compute_uv=False) for key, kernel in kernels.items()}
    spent = model.count_params() - sum(kernel.size for kernel in kernels.values())
    ranks = dict.fromkeys(kernels, 1)
    spent += sum(sum(kernel.shape) for kernel in kernels.values())
    while True:
        gains = {
            key: values[key][rank] ** 2 / np.sum(values[key] ** 2) / sum(kernels[key].shape)
            for key, rank in ranks.items()
            if (rank + 1) * sum(kernels[key].shape) < kernels[key].size
            and spent + sum(kernels[key].shape) <= parameters
        }
        if not gains:
            break
        best = max(gains, key=gains.get)
        ranks[best] += 1
        spent += sum(kernels[best].shape)
    layers = [keras.Input(model.input_shape[1:], dtype=model.inputs[0].dtype)]
    for layer in model.layers:
        names = [name for owner, name in ranks if owner == layer.name]
        layers += low_rank_layers(layer, [ranks[layer.name, name] for name in names])
    return keras.Sequential(layers)


def low_rank_layers(layer, ranks):
    """The layers that replace a layer whose kernels get these ranks."""
    import keras

    if not ranks:
        return [keras.layers.deserialize(keras.layers.serialize(layer))]
    if isinstance(layer, keras.layers.RNN):
        return [low_rank_gru(layer, ranks)]
    (rank,) = ranks
    config = layer.get_config()
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    left, right = split(kernel.reshape(-1, kernel.shape[-1]), rank)
    if isinstance(layer, keras.layers.Dense):
        first = keras.layers.Dense(rank, use_bias=False)
        second = keras.layers.Dense.from_config({**config, "name": None})
    else:
        plain = {"filters": rank, "use_bias": False, "activation": None, "name": None}
        first = keras.layers.Conv2D.from_config({**config, **plain})
        second = keras.layers.Conv2D(layer.filters, 1, activation=layer.activation)
        left = left.reshape(*kernel.shape[:-1], rank)
        right = right[None, None]
    first.build(layer.input.shape)
    first.set_weights([left])
    second.build((*layer.output.shape[:-1], rank))
    second.set_weights([right, keras.ops.convert_to_numpy(layer.bias)])
    return [first, second]


def split(kernel, rank):
    left, values, right = np.linalg.svd(kernel, full_matrices=False)
    root = np.sqrt(values[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def low_rank_gru(layer, ranks):
    """A GRU layer whose kernels are products of two matrices."""
    import keras

    full = layer.cell

    class Cell(keras.layers.GRUCell):
        def build(self, input_shape):
            self.factors = {
                name: [
                    self.add_weight(shape=part.shape, name=f"{name}_{side}")
                    for side, part in zip(("left", "right"), parts, strict=True)
                ]
                for name, parts in factors.items()
            }
            self.bias = self.add_weight(shape=full.bias.shape, name="bias")
            self.built = True

        @property
        def kernel(self):
            return keras.ops.matmul(*self.factors["kernel"])

        @property
        def recurrent_kernel(self):
            return keras.ops.matmul(*self.factors["recurrent_kernel"])

    names = ("kernel", "recurrent_kernel")
    factors = {
        name: split(keras.ops.convert_to_numpy(getattr(full, name)), rank)
        for name, rank in zip(names, ranks, strict=True)
    }
    config = layer.get_config()
    cell = Cell(config["units"])
    rnn = keras.layers.RNN(cell, return_sequences=config["return_sequences"])
    rnn.build(layer.input.shape)
    for name, parts in factors.items():
        for variable, values in zip(cell.factors[name], parts, strict=True):
            variable.assign(values)
    cell.bias.assign(keras.ops.convert_to_numpy(full.bias))
    return rnn


def mean_and_deviation(values):
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values):.4f}" if len(values) > 1 else "")


def tabulate(rows, command):
    from keras_bilinear.files import staged

    best = np.mean([float(row["one_shot"]) for row in rows if row["method"] == "full"])
    lines = [
        f"# rewriting {NETWORK.value}",
        "",
        f"`{command}`; {tables.machine()}. Accuracy on the test set: right after the rewrite / "
        f"after 1 / after {EPOCHS} epochs of fine-tuning (from scratch: of training), Adam at "
        f"{FINE_TUNING_RATE:g} (from scratch: 0.001) with cosine decay; means and "
        "deviations over seeds. The last column is the difference from the full network as it was, "
        "in points.",
        "",
        "| budget | method | seeds | parameters | one-shot | epoch 1 | epoch 5 | to the full one |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for budget, method in [(1, "full"), *itertools.product(BUDGETS, METHODS)]:
        found = [row for row in rows if (row["budget"], row["method"]) == (str(budget), method)]
        if not found:
            continue
        values = [[float(row[name]) for row in found] for name in FIELDS[4:]]
        numbers = " | ".join(map(mean_and_deviation, values))
        difference = 100 * (np.mean(values[-1]) - best)
        lines.append(
            f"| {budget} | {method} | {len(found)} | {int(found[0]['parameters']):,} | "
            f"{numbers} | {difference:+.2f} |"
        )
    with staged(tables.RESULTS) as folder:
        path = folder / f"rewriting_{NETWORK.value}.md"
        path.write_text("\n".join(lines) + "\n")


def main(argv):
    del argv
    import dataclasses

    import keras

    path = tables.RESULTS / f"rewriting_{NETWORK.value}.csv"
    rows = tables.read_rows(path)
    done = {tuple(row[name] for name in FIELDS[:3]) for row in rows}
    command = f"python benchmarks/rewriting.py --network={NETWORK.value}"
    run, calibration_examples = NETWORKS[NETWORK.value]
    dataset = training.load(run.dataset, EXAMPLES.value)
    if EXAMPLES.value:
        command += f" --examples={EXAMPLES.value}"
    batch_size = run.batch_size

    def write(*values):
        row = dict(zip(FIELDS, map(str, values), strict=True))
        rows.append(row)
        tables.write_rows(path, rows)
        logging.info("%s", row)
        tabulate(rows, command)

    def fine_tuned(model, rate):
        """The accuracies of a model before and during further training."""
        compile_model(model, rate, EPOCHS, dataset, batch_size)
        accuracies = [test_accuracy(model, dataset)]
        for first, last in ((0, 1), (1, EPOCHS)):
            model.fit(
                dataset.x_train,
                dataset.y_train,
                batch_size=batch_size,
                initial_epoch=first,
                epochs=last,
                verbose=0,
            )
            accuracies.append(test_accuracy(model, dataset))
        return [f"{accuracy:.4f}" for accuracy in accuracies]

    cache = {}
    for seed in range(training.SEEDS.value):
        model_path = pathlib.Path(
            MODELS_DIR.value, f"{NETWORK.value}_{EXAMPLES.value}_{seed}.keras"
        )
        model = trained(dataclasses.replace(run, seed=seed), dataset, model_path)
        if (str(seed), "1", "full") not in done:
            copy = keras.models.load_model(model_path)
            write(seed, 1, "full", model.count_params(), *fine_tuned(copy, FINE_TUNING_RATE))
        for budget in BUDGETS:
            for method in METHODS_TO_RUN.value:
                if (str(seed), str(budget), method) in done:
                    continue
                data = dataset.x_train[:calibration_examples]
                small = make_small(model, budget, method, data, seed, cache)
                rate = run.learning_rate if method == "scratch" else FINE_TUNING_RATE
                write(seed, budget, method, small.count_params(), *fine_tuned(small, rate))


if __name__ == "__main__":
    flags.mark_flag_as_required("network")
    app.run(main)
