"""Undoing a step: the weights that a model had before it."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import keras

from keras_bilinear.files import staged
from keras_bilinear.keras_private.optimizer import iterations_kept

_FILE = "before_bilinear_rewrite.weights.h5"


class WeightsBefore:
    """A file with the weights of a model, and of its optimizer, from before a step.

    Args:
        folder: where the file is kept, so that a training that was killed finds it again;
            `None` for a temporary folder.
    """

    def __init__(self, folder: pathlib.Path | None):
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory | None = None

    @contextlib.contextmanager
    def kept(self, model: keras.Model) -> Iterator[None]:
        """Keeps the weights, in place of older weights, if the step inside goes well."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory()
            self._folder = pathlib.Path(self._temporary.name)
        with staged(self._folder) as folder:
            model.save_weights(folder / _FILE)
            yield

    def exist(self) -> bool:
        """Whether there are weights: they are gone where the backup beside them was deleted."""
        return self._folder is not None and (self._folder / _FILE).exists()

    def give_back(self, model: keras.Model) -> None:
        """Gives a model its weights from before the step; iterations go on counting.

        Args:
            model: the model, with the layers that it had before the step.

        Raises:
            FileNotFoundError: if no weights were kept.
        """
        if self._folder is None:
            raise FileNotFoundError("No weights were kept.")
        with iterations_kept(model.optimizer):
            model.load_weights(self._folder / _FILE)
