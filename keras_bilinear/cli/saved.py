"""What the commands on saved models share: reading and writing."""

import importlib
import os
import pathlib
import re
import sys
import types
import zipfile
from collections.abc import Iterable
from typing import Any

import h5py
import keras
import numpy as np
from absl import flags

from keras_bilinear import datasets
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.data import model_batches
from keras_bilinear.files import check_writable, staged
from keras_bilinear.messages import reason
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.planner import plan_rewrite

FLAGS = flags.FLAGS


def file_names(argv: list[str], *names: str) -> list[pathlib.Path]:
    """The files that the positional arguments of a command name.

    Args:
        argv: the name of the command and the positional arguments.
        names: a placeholder for each file, such as `"MODEL.keras"`, for the error text.

    Raises:
        CommandError: if `argv` does not have a file for each placeholder.
    """
    command, *given = argv
    if len(given) != len(names):
        raise CommandError(
            f"usage: keras-bilinear {command} {' '.join(names)} [--flag=value ...]; received "
            f"{len(given)} file names"
        )
    return [pathlib.Path(name) for name in given]


def check_output(path: pathlib.Path, *suffixes: str) -> None:
    """Checks, before any work, that an output file can be written.

    Args:
        path: the file.
        suffixes: the suffixes that it may have, such as `".keras"`.

    Raises:
        CommandError: if the file has another suffix, if it exists and --overwrite is not given,
            or if its folder is not writable.
    """
    if path.suffix not in suffixes:
        raise CommandError(f"the output must be a {' or '.join(suffixes)} file, not {str(path)!r}")
    if path.exists() and not FLAGS.overwrite:
        raise CommandError(f"{str(path)!r} is there already: give --overwrite to replace it")
    with command_errors(OSError):
        check_writable(path.parent)


def load(path: pathlib.Path) -> keras.Model:
    """Loads a model, compiled as it was saved if its loss and its metrics can be loaded.

    The modules of --import are imported first.

    Raises:
        CommandError: if the file is missing, is not a whole `.keras` or `.h5` file, or cannot be
            loaded by Keras, if it holds code and --unsafe is not given, or if a module cannot be
            imported.
    """
    _check_model_file(path)
    for name in FLAGS["import"].value or []:
        _import_custom_objects(name)
    try:
        try:
            model: Any = keras.models.load_model(path, safe_mode=not FLAGS.unsafe)
        except Exception:  # a loss or a metric may be missing
            model = keras.models.load_model(path, compile=False, safe_mode=not FLAGS.unsafe)
    except Exception as error:  # Keras and its backends raise errors of any class
        raise CommandError(f"cannot load {str(path)!r}: {_why_not_loaded(error)}") from error
    return model


def _check_model_file(path):
    """Checks that a path is a file, of a format that Keras reads."""
    if path.is_dir():
        what = "a folder, such as a SavedModel"
    elif path.name.endswith(".weights.h5"):
        what = "a file of weights without their model"
    elif path.suffix not in _IS_FORMAT:
        what = _FOREIGN.get(path.suffix, "no .keras or .h5 file")
    elif not path.is_file():
        raise CommandError(f"there is no file {str(path)!r}")
    elif not _IS_FORMAT[path.suffix](path):
        raise CommandError(f"{str(path)!r} is no {path.suffix} file, or only a part of one")
    else:
        return
    raise CommandError(
        f"{str(path)!r} is {what}: give a whole Keras model, as model.save('MODEL.keras') writes it"
    )


# For each suffix of a Keras model, whether a file is of the format.
_IS_FORMAT = {".keras": zipfile.is_zipfile, ".h5": h5py.is_hdf5, ".hdf5": h5py.is_hdf5}
# What files with other suffixes are.
_FOREIGN = {
    **dict.fromkeys((".pt", ".pth"), "a file of PyTorch"),
    ".onnx": "an ONNX file",
    ".pb": "a graph of TensorFlow",
    ".safetensors": "a file of weights without their model",
    ".tflite": "a LiteRT file",
}


def _import_custom_objects(name):
    """Imports a module, and lets Keras find its classes and functions, registered or not."""
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the module may do anything
        raise CommandError(f"cannot import {name!r}: {reason(error)}") from error
    for key, value in vars(module).items():
        # What the module has imported itself must not get in the way of Keras' own names.
        if isinstance(value, type | types.FunctionType) and f"{value.__module__}.".startswith(
            f"{name}."
        ):
            keras.saving.get_custom_objects()[key] = value


def _why_not_loaded(error):
    """The reason why Keras does not load a model, and the flag that helps."""
    why = reason(error)
    if "safe_mode" in why:
        return "it has code in it, which is loaded with --unsafe only"
    # Keras says "Could not locate class 'My'" or, of .h5 files, "Unknown layer: 'package>My'".
    if unknown := re.match(r"(?:Could not locate|Unknown) ([\w ]+):? '(?:.*>)?(.+?)'", why):
        kind, name = unknown.groups()
        return f"the {kind} {name!r} is not known: name its module with --import=MODULE"
    return why


def save(model: keras.Model, path: pathlib.Path) -> None:
    """Saves a model, so that the file appears whole or not at all.

    Raises:
        CommandError: if the file cannot be written.
    """
    with command_errors(OSError), staged(path.parent) as folder:
        model.save(folder / path.name)


def write(text: str, path: pathlib.Path) -> None:
    """Writes a text, so that the file appears whole or not at all.

    Raises:
        CommandError: if the file cannot be written.
    """
    with command_errors(OSError), staged(path.parent) as folder:
        (folder / path.name).write_text(text)


def read_data(model: keras.Model, flag: str = "calibration") -> Iterable[Any] | None:
    """Reads the inputs that a flag names.

    Args:
        model: the model that takes the inputs.
        flag: name of the flag.

    Returns:
        Batches of inputs; `None` if the flag is not given.

    Raises:
        CommandError: if the data cannot be read or are no inputs of the model.
    """
    name = FLAGS[flag].value
    if name is None:
        return None
    data: Any = read(name)
    for key, values in data.items() if isinstance(data, dict) else [("input", data)]:
        if values.dtype == object or values.ndim < 2 or not len(values):
            raise CommandError(f"{name!r} has no examples of the model's {key}")
    try:
        inputs = keras.tree.map_structure(lambda values: values[:1], data)
        keras.ops.convert_to_numpy(keras.tree.flatten(model(inputs))[0])
    except Exception as error:  # a model may raise anything for inputs that it does not take
        raise CommandError(f"{name!r} has no inputs of the model: {reason(error)}") from error
    data = keras.tree.map_structure(lambda values: values[: FLAGS.examples], data)
    with command_errors(ValueError):
        return [*model_batches(data, model, name)]


def is_array_file(name: str) -> bool:
    """Whether a flag names a file of NumPy, and no data set."""
    return pathlib.Path(name).suffix in (".npy", ".npz")


def read(name: str) -> Any:
    """The array, or dictionary of arrays, in a file, or the training inputs of a data set.

    Raises:
        CommandError: if there are none.
    """
    path = pathlib.Path(name)
    if not is_array_file(name):
        with command_errors(ImportError, ValueError):
            return datasets.load(name, FLAGS.data_dir).x_train
    try:
        data = np.load(path)
        return dict(data) if hasattr(data, "files") else data  # whatever the suffix is
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CommandError(f"cannot read {name!r}: {error}") from error


def input_shapes() -> tuple | dict[str, tuple] | None:
    """The argument `input_shapes` of `export_litert` from the values of the flag.

    Raises:
        CommandError: if a shape has no numbers.
    """
    shapes = {}
    for text in FLAGS.input_shape or []:
        name, _, sizes = text.rpartition("=")
        try:
            shapes[name] = tuple(int(size) for size in sizes.split(","))
        except ValueError:
            raise CommandError(
                f"--input_shape must be numbers with commas between them, not {sizes!r}"
            ) from None
    if not shapes:
        return None
    return shapes.pop("") if list(shapes) == [""] else shapes


def make_plan(model: keras.Model, data: Iterable[Any] | None) -> RewritePlan:
    """Plans the rewrite of a model as the flags say.

    Args:
        model: the model.
        data: calibration data; `None` plans without them.

    Raises:
        CommandError: if the flags are not valid, or if no plan keeps to the limit.
    """
    with command_errors(ValueError):
        return plan_rewrite(
            model,
            budget=FLAGS.budget,
            max_params=FLAGS.max_params,
            max_error=FLAGS.max_error,
            calibration_data=data,
            rank="auto" if FLAGS.rank is None else FLAGS.rank,
            scale=1 if FLAGS.scale is None else FLAGS.scale,
            low_rank=FLAGS.low_rank is not False,
        )
