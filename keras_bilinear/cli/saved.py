"""What the commands on saved models share: flags, reading and writing."""

import pathlib
import zipfile
from collections.abc import Iterable
from typing import Any

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


def define_model_flags() -> None:
    """Defines the flags of every command that reads a model."""
    flags.DEFINE_bool(
        "unsafe",
        False,
        "Load code that is stored in the file, such as the code of a Lambda layer. Such code can "
        "do anything on this machine.",
    )


def define_output_flags() -> None:
    """Defines the flags of every command that writes a file."""
    flags.DEFINE_bool("overwrite", False, "Replace an output file that exists.")


def define_plan_flags() -> None:
    """Defines the flags that decide a plan."""
    flags.DEFINE_float(
        "budget", None, "Share of the parameters to keep; 0.1 if no other limit is given."
    )
    flags.DEFINE_integer("max_params", None, "Number of parameters to keep.")
    flags.DEFINE_float("max_error", None, "Largest predicted relative error of a layer.")
    flags.DEFINE_integer("rank", None, "Number of Kronecker terms of every layer.")
    flags.DEFINE_integer(
        "scale",
        None,
        "Number by which both output factors of every hidden layer are multiplied; 1 if it is not "
        "given.",
    )
    flags.DEFINE_bool(
        "low_rank",
        None,
        "Whether a layer may become a product of two matrices (low rank); it may if it is not "
        "given.",
    )
    define_data_flags("calibration", "to fit the layers to")


def define_data_flags(name: str, use: str) -> None:
    """Defines the flags that name inputs of the model.

    Args:
        name: name of the flag for the inputs themselves.
        use: what the inputs are for, such as `"to fit the layers to"`.
    """
    flags.DEFINE_string(
        name,
        None,
        f"Inputs of the model {use}: a .npy file, a .npz file with an array for each input, or "
        "the name of an image or text classification set of TensorFlow Datasets, or digits.",
    )
    flags.DEFINE_integer(
        "examples", 1024, f"How many examples of --{name} to use at most.", lower_bound=1
    )
    flags.DEFINE_string("data_dir", None, "Folder of TensorFlow Datasets.")


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

    Raises:
        CommandError: if the file is missing, is not a whole `.keras` file, or cannot be loaded by
            Keras, or holds code and --unsafe is not given.
    """
    if path.suffix != ".keras":
        raise CommandError(f"{str(path)!r} is no .keras file")
    if not path.is_file():
        raise CommandError(f"there is no file {str(path)!r}")
    if not zipfile.is_zipfile(path):
        raise CommandError(f"{str(path)!r} is no .keras file, or only a part of one")
    try:
        try:
            model: Any = keras.models.load_model(path, safe_mode=not FLAGS.unsafe)
        except Exception:  # a loss or a metric may be missing
            model = keras.models.load_model(path, compile=False, safe_mode=not FLAGS.unsafe)
    except Exception as error:  # Keras and its backends raise errors of any class
        why = reason(error)
        if "safe_mode" in str(error) or "unsafe" in str(error):
            why = "it has code in it, which is loaded with --unsafe only"
        raise CommandError(f"cannot load {str(path)!r}: {why}") from error
    return model


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
        flag: name of the flag, which `define_data_flags` defined.

    Returns:
        Batches of inputs; `None` if the flag is not given.

    Raises:
        CommandError: if the data cannot be read or are no inputs of the model.
    """
    name = FLAGS[flag].value
    if name is None:
        return None
    data: Any = _read(name)
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


def _read(name):
    """The array, or dictionary of arrays, in a file or in a data set."""
    path = pathlib.Path(name)
    if path.suffix not in (".npy", ".npz"):
        with command_errors(ImportError, ValueError):
            return datasets.load(name, FLAGS.data_dir).x_train
    try:
        data = np.load(path)
        return dict(data) if hasattr(data, "files") else data  # whatever the suffix is
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CommandError(f"cannot read {name!r}: {error}") from error


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
