"""What the study needs to know about a model, and where models and inputs come from."""

import abc
import ast
import dataclasses
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from typing import Any, ClassVar

import numpy as np

from keras_bilinear.files import staged


class MissingData(Exception):
    """Inputs of a model are not on this machine; the message says which."""


@dataclasses.dataclass(frozen=True)
class Sources:
    """Folders that models and inputs are read from.

    Attributes:
        packages_dir: where packages are downloaded to and unpacked.
        real_data_dir: a folder with `chr10_50kb.fa.gz` and `peptides.csv.gz`, or `None`.
        data_dir: the folder of TensorFlow Datasets; `None` for its default.
    """

    packages_dir: pathlib.Path
    real_data_dir: pathlib.Path | None = None
    data_dir: str | None = None

    def package(self, requirement):
        """The folder of an unpacked package such as `deepcut==0.7.0.0`, downloaded if needed.

        The package is not installed, and nothing of its code is run or imported here. (To name a
        source archive, pip runs its `setup.py`.)
        """
        folder = self.packages_dir / requirement.replace("==", "-")
        if not folder.exists():
            self.packages_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as download:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
                subprocess.run([*pip, "--dest", download, requirement], check=True)
                (archive,) = pathlib.Path(download).iterdir()
                with staged(self.packages_dir) as unfinished:
                    _unpack(archive, unfinished / folder.name)
        return folder

    def real(self, name):
        """A file in `real_data_dir`."""
        if self.real_data_dir is None or not (self.real_data_dir / name).exists():
            raise MissingData(f"{name} is not in --real_data_dir={self.real_data_dir}")
        return self.real_data_dir / name


def _unpack(archive, folder):
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    else:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


class Case(abc.ABC):
    """A trained model, inputs for it, and how to judge its outputs.

    Inputs are what the model's `predict` takes: an array, or a list of arrays for several inputs.
    Outputs are an array, or a dictionary of arrays for several outputs, as `outputs_of` and LiteRT
    give them.

    Attributes:
        name: name of the case.
        requirement: package and version that the model is taken from.
        metric: what the first number of `scores` is.
        lower_is_better: whether a smaller first number is better.
        also: what the second number of `scores` is.
        calibration: number of training inputs for a plan and a fit.
        training: number of training inputs to recover with.
        input_shapes: shapes of the inputs in LiteRT files, where the model leaves them open.
    """

    name: ClassVar[str]
    requirement: ClassVar[str]
    metric: ClassVar[str]
    also: ClassVar[str]
    lower_is_better: ClassVar[bool] = False
    calibration: ClassVar[int] = 2048
    training: ClassVar[int] = 20_000
    input_shapes: ClassVar[Any] = None

    def __init__(self, sources: Sources):
        self.sources = sources

    @property
    def folder(self) -> pathlib.Path:
        """The unpacked package of the model."""
        return self.sources.package(self.requirement)

    @abc.abstractmethod
    def load(self):
        """The model: stock Keras layers with the trained weights."""

    @abc.abstractmethod
    def training_inputs(self, count: int):
        """At most `count` inputs to calibrate, fit and recover with; none is a test input."""

    @abc.abstractmethod
    def test(self):
        """`(inputs, labels)` for the scores; `labels` is `None` if there are none."""

    @abc.abstractmethod
    def scores(self, outputs, original, labels) -> tuple[float, float]:
        """How good outputs for the test inputs are.

        Args:
            outputs: what a file or a model gives for the test inputs.
            original: what the original model gives for them, in float32.
            labels: what `test` gives.

        Returns:
            The metric that counts, and a second one beside it.
        """

    def lost(self, score, original):
        """The share of the original model's metric that a metric is worse by."""
        change = (original - score) / original
        return -change if self.lower_is_better else change


def constant(path, name):
    """The value of a constant in a Python file, which is read and not run."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise ValueError(f"There is no constant {name!r} in {path}")


def split(items, test, seed=0):
    """Shuffles a list and splits it: `(training items, the last `test` items)`."""
    order = np.random.default_rng(seed).permutation(len(items))
    items = [items[index] for index in order]
    return items[:-test], items[-test:]


def correlation(first, second):
    """Pearson's correlation of all values of two arrays."""
    return float(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1])


def f1(found, expected):
    """The F1 score of one boolean array against another."""
    return 2 * np.sum(found & expected) / (np.sum(found) + np.sum(expected))
