"""What decides a training of a study, and that training."""

import dataclasses
import math
import time

import sequences
from absl import flags
from networks import build

DATA_DIR = flags.DEFINE_string("data_dir", None, "where tfds keeps its data")
SEEDS = flags.DEFINE_integer(
    "seeds", 3, "number of seeds, where a study has none of its own", lower_bound=1
)
BATCH_SIZES = {"digits": 32, "spoken_digit": 32, "cifar10": 64, "tiny_shakespeare": 64}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training, and all that decides its outcome.

    Attributes:
        dataset: name of the data set.
        network: what the tables call the network.
        hidden: widths of the hidden layers. A convolutional network has the filters of each
            block or stage and the units of the dense layer after them. A recurrent network has
            the width of the embedding, if it has an embedding, and the units of its recurrent
            layer.
        rank: the rank of all layers, or a rank for each of `hidden`. 0 stands for a full
            layer. The layer of the classes has the last rank.
        kernels: how bilinear layers store their factors. `"gain"` is what the package does.
            `"plain"` stores the factors themselves. `"unbounded"` gives the factors the
            deviation of the full kernel, whatever the width of the layer and the rank. `"calm"`
            stores recurrent factors twice as large, so that steps move them half as much.
            `"undivided"` keeps the gain in the gradients. A full network has `"full"`. A network
            with `"rewritten"` begins as a full network, and `BilinearRewrite` makes it smaller
            after a fifth of the epochs.
        optimizer: name of the optimizer.
        learning_rate: learning rate of the optimizer.
        weight_decay: weight decay of the optimizer.
        dropout: share of the values that dropout layers drop; 0 makes no such layers.
        label_smoothing: the share of each label that all classes get.
        epochs: number of passes through the data.
        seed: seed of the initial values and of the order of the examples.
        tuning: `True` holds out the last tenth of the examples and finds the accuracy on it.
            `False` trains on all examples and finds the accuracy on the test set.
        pattern: pattern of bilinear convolutions. In a recurrent network, `"low-rank"` gives the
            embedding the factors of a low-rank table instead of near-square factors. `"halves"`
            makes two such tables that share their numbers, for the more frequent half of the
            words and for the other half. `"frequent half"` has only the first of both tables.
        recurrent: class of the recurrent layer, such as `"GRU"`; empty for other networks.
        examples: how many of the first examples to use; `None` for all.
        clipnorm: the largest norm of all gradients together; larger gradients are scaled down.
            `None` for no limit.
        architecture: `"resnet20"`, or empty for the network that the data set has otherwise.
        budget: the share of the parameters that a rewritten network keeps.
        depth: number of convolutions in a block, or of residual blocks in a stage.
        policy: Keras' dtype policy. The layer of the classes is in float32.
    """

    dataset: str
    network: str
    hidden: tuple
    rank: int | tuple = 0
    kernels: str = "full"
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    dropout: float = 0.0
    label_smoothing: float = 0.0
    epochs: int = 1
    seed: int = 0
    tuning: bool = False
    pattern: str = ""
    recurrent: str = ""
    examples: int | None = None
    clipnorm: float | None = None
    architecture: str = ""
    budget: float | None = None
    depth: int = 3
    policy: str = "float32"

    @property
    def key(self):
        return tuple(str(value) for value in dataclasses.astuple(self))

    @property
    def batch_size(self):
        return BATCH_SIZES.get(self.dataset, 128)


def load(name, examples=None):
    """A data set, with at most so many training examples."""
    from keras_bilinear import datasets

    loader = getattr(sequences, f"load_{name}", None)
    dataset = loader(DATA_DIR.value) if loader else datasets.load(name, DATA_DIR.value)
    return dataclasses.replace(
        dataset, x_train=dataset.x_train[:examples], y_train=dataset.y_train[:examples]
    )


def store(model, kernels):
    """Makes bilinear layers store the factors of their kernels in another way."""
    import keras

    from keras_bilinear.kronecker.initializers import deviation
    from keras_bilinear.layers.converter import is_bilinear

    for layer in model.layers:
        if kernels == "calm" and is_bilinear(layer) and isinstance(layer, keras.layers.RNN):
            kernel = layer.cell._recurrent_kernel
            _store_with_gain(kernel, kernel.gain / 4)
        elif kernels != "calm" and is_bilinear(layer):
            kernel, gain = layer._kernel, 1.0
            if kernels == "unbounded":
                shape = kernel.factorization
                window = math.prod(shape.window)
                fans = window * shape.input_dim, window * shape.output_dim
                gain = 1 / (deviation(layer.kernel_initializer, *fans) * math.sqrt(shape.rank))
            _store_with_gain(kernel, gain)


def _store_with_gain(kernel, gain):
    for factor in (kernel.left, kernel.right):
        factor.assign(factor * math.sqrt(kernel.gain / gain))
    kernel.gain = gain


def compile_model(model, run, steps):
    import keras

    kind, options = {
        "adam": (keras.optimizers.Adam, {}),
        "adamw": (keras.optimizers.AdamW, {"weight_decay": run.weight_decay}),
        "sgd": (keras.optimizers.SGD, {"momentum": 0.9}),
    }[run.optimizer]
    schedule = keras.optimizers.schedules.CosineDecay(run.learning_rate, steps)
    model.compile(
        kind(schedule, global_clipnorm=run.clipnorm, **options),
        keras.losses.CategoricalCrossentropy(True, label_smoothing=run.label_smoothing),
        metrics=["accuracy"],
    )


def train(run, dataset):
    """Trains as `run` says; returns the columns of its row that are measured."""
    import keras

    from keras_bilinear import BilinearRewrite, exporting
    from keras_bilinear.layers import base
    from keras_bilinear.reports import summary

    keras.utils.set_random_seed(run.seed)
    keras.config.set_dtype_policy(run.policy)
    model = build(run, dataset)
    if run.kernels in ("plain", "unbounded", "calm"):
        store(model, run.kernels)
    x, y = dataset.x_train, keras.utils.to_categorical(dataset.y_train, dataset.classes)
    if run.tuning:
        held_out = len(x) // 10
        unseen = x[-held_out:], y[-held_out:]
        x, y = x[:-held_out], y[:-held_out]
    else:
        unseen = dataset.x_test, keras.utils.to_categorical(dataset.y_test, dataset.classes)
    compile_model(model, run, steps=run.epochs * -(-len(x) // run.batch_size))
    callbacks = []
    if run.kernels == "rewritten":
        callbacks.append(BilinearRewrite(math.ceil(run.epochs / 5), run.budget))
    scale_gradient = base._scale_gradient
    if run.kernels == "undivided":
        base._scale_gradient = lambda x, scale: x
    try:
        start = time.perf_counter()
        history = model.fit(
            x, y, batch_size=run.batch_size, epochs=run.epochs, callbacks=callbacks, verbose=0
        )
        seconds = time.perf_counter() - start
    finally:
        base._scale_gradient = scale_gradient
    loss, accuracy = model.evaluate(*unseen, batch_size=1000, verbose=0)
    with exporting():  # Backends differ in the kernels that they form.
        macs = summary.count_macs(model)
    return {
        "parameters": model.count_params(),
        "macs": macs,
        "train_loss": f"{history.history['loss'][-1]:.4f}",
        "accuracy": f"{accuracy:.4f}",
        "seconds": f"{seconds:.0f}",
        "bits": f"{loss / math.log(2):.4f}",
        "backend": keras.config.backend(),
    }
