"""Classification data sets as NumPy arrays, ready for a network."""

import contextlib
import dataclasses
import difflib
import logging
import tempfile
from typing import Any

import keras
import numpy as np

from keras_bilinear.messages import reason, require

VOCABULARY = 20_000  # words that a text network knows
TOKENS = 200  # words of a text that a network reads
# Images of a data set whose images differ in size are resized to this height and width.
IMAGE_SIZE = (64, 64)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification data set.

    Attributes:
        name: the name that the user gave.
        kind: `"image"` for float32 inputs from 0 to 1 of shape `(n, height, width, ...)`;
            `"text"` for int32 word ids of shape `(n, TOKENS)` below `VOCABULARY`, where 0 is
            padding; `"audio"` for float32 samples of shape `(n, samples)`.
        classes: number of classes.
        x_train: inputs of the training split.
        y_train: integer labels of the training split, of shape `(n,)`.
        x_test: inputs of the test split.
        y_test: integer labels of the test split, of shape `(n,)`.
    """

    name: str
    kind: str
    classes: int
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def head(self, count: int | None) -> "Dataset":
        """The first `count` examples of both splits; `None` keeps all examples."""
        arrays = ("x_train", "y_train", "x_test", "y_test")
        return dataclasses.replace(self, **{name: getattr(self, name)[:count] for name in arrays})


def load(name: str, data_dir: str | None = None, examples: int | None = None) -> Dataset:
    """Loads `"digits"` from scikit-learn, and any other data set from TensorFlow Datasets.

    If a data set has no test split, its validation split takes that place. If it has neither,
    the last fifth of its training split does.

    Args:
        name: `"digits"`, or the name of an image or text classification set.
        data_dir: folder of the prepared TensorFlow Datasets. A data set that is missing there is
            downloaded into it. `None` uses the default folder of TensorFlow Datasets.
        examples: how many examples of each split to read; `None` reads all.

    Raises:
        ImportError: if the package that provides the data set is not installed.
        ValueError: if the name is unknown, if the data set cannot be downloaded, or if it is not
            for image or text classification.
    """
    if name == "digits":
        return _load_digits().head(examples)
    return _load_tfds(name, data_dir, -1 if examples is None else examples)


def _load_digits():
    require("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    x = (digits.images / 16).astype("float32")
    x_train, x_test, y_train, y_test = map(
        np.asarray,
        train_test_split(x, digits.target, test_size=0.2, random_state=0, stratify=digits.target),
    )
    return Dataset("digits", "image", 10, x_train, y_train, x_test, y_test)


def _load_tfds(name, data_dir, examples):
    require("tensorflow", "tensorflow_datasets", "importlib_resources")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = ["digits", *tfds.list_builders(with_community_datasets=False)]
        close = ", ".join(difflib.get_close_matches(name, known)) or "digits, mnist, imdb_reviews"
        raise ValueError(f"unknown data set {name!r}; did you mean {close}?") from error
    except Exception as error:  # a malformed name, version or configuration
        raise ValueError(f"no data set {name!r}: {_first_line(error)}") from error
    kind, label = _kind(builder)
    _prepare(builder, name)
    if "train" not in builder.info.splits:
        raise ValueError(f"data set {name!r} has no train split")
    train, test = _splits(builder.info.splits)
    x_train, y_train = _read(builder, train, kind, examples)
    x_test, y_test = _read(builder, test, kind, examples)
    if min(y_train.min(), y_test.min()) < 0:
        raise ValueError(f"data set {name!r} keeps labels of its {train} or {test} split secret")
    if kind == "text":
        x_train, x_test = _token_ids(x_train, x_test)
    return Dataset(name, kind, label.num_classes, x_train, y_train, x_test, y_test)


def _kind(builder) -> tuple[str, Any]:
    """`("image" or "text", the label feature)` of a classification set."""
    import tensorflow_datasets as tfds

    keys = builder.info.supervised_keys or ()
    features = [builder.info.features[key] for key in keys if isinstance(key, str)]
    if len(features) == 2 and isinstance(features[1], tfds.features.ClassLabel):
        for kind, feature in (("image", tfds.features.Image), ("text", tfds.features.Text)):
            if isinstance(features[0], feature):
                return kind, features[1]
    raise ValueError(f"data set {builder.name!r} is not for image or text classification")


def _prepare(builder, name):
    """Downloads a data set unless its folder has it."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    # Without a network, the ten tries of TensorFlow Datasets take minutes and print many warnings.
    downloader.MAX_RETRIES = 2
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        # The folder of the archives is removed, also after an error.
        with tempfile.TemporaryDirectory() as archives, contextlib.redirect_stdout(None):
            builder.download_and_prepare(download_dir=archives)
    except Exception as error:  # a server, a disk or any of many builders may raise it
        raise ValueError(
            f"cannot download data set {name!r} into `data_dir`; is there a network? "
            f"{_first_line(error)} Received: data_dir={str(builder.data_dir)!r}"
        ) from error


def _splits(splits):
    """The names of the splits to train and to test on."""
    for test in ("test", "validation"):
        if test in splits:
            return "train", test
    return "train[:80%]", "train[80%:]"


def _read(builder, split, kind, examples):
    """Inputs and labels of the first examples of a split; -1 reads all."""
    import tensorflow as tf

    data = builder.as_dataset(split=split, as_supervised=True).take(examples)
    if kind == "image" and None in data.element_spec[0].shape:
        data = data.map(lambda x, y: (tf.cast(tf.image.resize(x, IMAGE_SIZE), tf.uint8), y))
    batches = list(data.batch(1024).as_numpy_iterator())
    x = np.concatenate([x for x, _ in batches])
    y = np.concatenate([y for _, y in batches])
    return (x.astype("float32") / 255 if kind == "image" else x), y


def _token_ids(train, test):
    """Word ids of the texts of both splits; the most frequent words of `train` get ids."""
    tokenizer = keras.layers.TextVectorization(VOCABULARY, output_sequence_length=TOKENS)
    tokenizer.adapt(train)
    return tuple(
        np.concatenate(
            [np.asarray(tokenizer(texts[i : i + 1024])) for i in range(0, len(texts), 1024)]
        ).astype("int32")
        for texts in (train, test)
    )


def _first_line(error):
    """The type and the text of an error in one line."""
    return f"{type(error).__name__}: {reason(error)}"
