"""What the notebooks in `tutorials/` share: their data, their pace and their picture.

With the environment variable `KERAS_BILINEAR_QUICK=1` a notebook runs in seconds, on few examples
and without a download. This shows that it runs, not how accurate a network gets.
"""

import os
from typing import Any

import keras
import numpy as np

from keras_bilinear import datasets
from keras_bilinear.datasets import Dataset

QUICK = os.environ.get("KERAS_BILINEAR_QUICK") == "1"
QUICK_EXAMPLES = 64  # examples of each split in quick mode
SAMPLING_RATE = 8000  # samples per second of spoken_digit
TEST_TAKES = range(5)  # takes of each speaker and digit that spoken_digit is tested on


def set_up() -> None:
    """Sets the dtype policy: mixed float16 if TensorFlow has a GPU, else float32.

    Weights are float32 in both cases.
    """
    import tensorflow as tf

    # TensorFlow would warn of the traces that several models in one process need.
    tf.get_logger().setLevel("ERROR")
    if tf.config.list_physical_devices("GPU"):
        keras.config.set_dtype_policy("mixed_float16")
    print(f"dtype policy: {keras.config.dtype_policy().name}")


def load(name: str) -> Dataset:
    """Loads a data set from TensorFlow Datasets and prints what it has loaded.

    TensorFlow Datasets downloads the data set into the folder that the environment variable
    `TFDS_DATA_DIR` names. In quick mode, small data of the same shapes take the place of a data
    set that is not in that folder.

    Args:
        name: `"spoken_digit"`, or an image or text classification set. The recordings of
            `"spoken_digit"` are cut, or filled up with silence, to one second of `SAMPLING_RATE`
            samples.

    Raises:
        ImportError: if TensorFlow Datasets is not installed.
        ValueError: if the name is unknown, or if the data set cannot be downloaded.
    """
    examples = QUICK_EXAMPLES if QUICK else None
    if QUICK and not _is_prepared(name):
        dataset = _stand_in(name)
    elif name == "spoken_digit":
        dataset = _recordings(examples)
    else:
        dataset = datasets.load(name, examples=examples)
    print(
        f"{dataset.name}{'' if dataset.name == name else f' in the place of {name}'}: "
        f"{len(dataset.x_train):,} examples to train on and {len(dataset.x_test):,} to test on, "
        f"each of shape {dataset.x_train.shape[1:]}"
    )
    return dataset


def draw(results: dict[str, tuple[keras.Model, keras.callbacks.History]]) -> None:
    """Draws the test accuracy of networks by epoch, and against their parameters.

    Args:
        results: for the name of each network, the model and the result of its `fit`. The model
            was compiled with `metrics=["accuracy"]` and trained with validation data.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    _, (curves, sizes) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for name, (model, history) in results.items():
        accuracy = history.history["val_accuracy"]
        curves.plot(range(1, len(accuracy) + 1), accuracy, marker="o", markersize=4, label=name)
        size = model.count_params()
        sizes.scatter(size, accuracy[-1], s=70)
        sizes.annotate(
            f"{size:,}", (size, accuracy[-1]), (0, -18), textcoords="offset points", ha="center"
        )
    curves.set(xlabel="epoch", ylabel="accuracy on the test set")
    curves.legend(frameon=False)
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    sizes.set(xlabel="parameters", xscale="log")
    sizes.xaxis.set_minor_formatter("")
    sizes.margins(0.2)
    for axes in (curves, sizes):
        axes.grid(alpha=0.3)
        axes.spines[:].set_visible(False)
    plt.show()


def _is_prepared(name):
    import tensorflow_datasets as tfds

    return tfds.builder(name).is_prepared()


def _recordings(examples):
    """spoken_digit, with the test split that its authors define."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    data: Any = tfds.load("spoken_digit", split="train")
    data = data.take(-1 if examples is None else examples)
    x, y, takes = [], [], []
    for example in data.as_numpy_iterator():
        samples = example["audio"][:SAMPLING_RATE] / 2**15
        x.append(np.pad(samples.astype("float32"), (0, SAMPLING_RATE - len(samples))))
        y.append(example["label"])
        # A file is called DIGIT_SPEAKER_TAKE.wav.
        name = example["audio/filename"].decode()
        takes.append(int(name.removesuffix(".wav").rsplit("_", 1)[1]))
    x, y, test = np.stack(x), np.array(y), np.isin(takes, TEST_TAKES)
    return Dataset("spoken_digit", "audio", 10, x[~test], y[~test], x[test], y[test])


def _stand_in(name):
    """Small data with the shapes of a data set."""
    if name == "imdb_reviews":
        return _random("text", classes=2, example=_words)
    if name == "spoken_digit":
        return _random("audio", classes=10, example=_tone)
    digits = datasets.load("digits", examples=QUICK_EXAMPLES)
    shape = {"fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}[name]
    x_train, x_test = (_enlarge(x, shape) for x in (digits.x_train, digits.x_test))
    return Dataset("digits", "image", 10, x_train, digits.y_train, x_test, digits.y_test)


def _enlarge(images, shape):
    rows, columns = (np.arange(size) * 8 // size for size in shape[:2])
    return np.repeat(images[:, rows[:, None], columns, None], shape[2], axis=3)


def _random(kind, classes, example):
    random = np.random.default_rng(0)
    arrays = []
    for count in (QUICK_EXAMPLES, QUICK_EXAMPLES):
        y = random.integers(classes, size=count)
        arrays += [np.stack([example(random, label) for label in y]), y]
    return Dataset(f"generated {kind}", kind, classes, *arrays)


def _words(random, label):
    """A text of a class: the higher the label, the rarer the words."""
    ranks = random.beta(1 + label, 1, datasets.TOKENS)
    return (1 + ranks * (datasets.VOCABULARY - 1)).astype("int32")


def _tone(random, label):
    """A recording of a class: the higher the label, the higher the pitch."""
    seconds = np.arange(SAMPLING_RATE) / SAMPLING_RATE
    tone = np.sin(2 * np.pi * 200 * (1 + label) * seconds)
    return (tone + 0.1 * random.normal(size=SAMPLING_RATE)).astype("float32") / 2
