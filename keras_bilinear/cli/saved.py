"""What the commands on saved models share: reading, writing, the flags of a plan."""

import contextlib
import pathlib
import zipfile
from collections.abc import Iterator

import keras
import numpy as np
import rich.console
import rich.progress
from absl import flags

from keras_bilinear import datasets
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.data import model_batches
from keras_bilinear.files import check_writable, staged
from keras_bilinear.messages import reason
from keras_bilinear.rewriting import planner

FLAGS = flags.FLAGS


def define_model_flags() -> None:
    """Defines the flags of every command that reads a model."""
    flags.DEFINE_bool(
        "unsafe",
        False,
        "Load code that is stored in the file, such as that of a Lambda layer. It can do anything.",
    )


def define_output_flags() -> None:
    """Defines the flags of every command that writes a file."""
    flags.DEFINE_bool("overwrite", False, "Replace a file that is there.")


def define_plan_flags() -> None:
    """Defines the flags that decide a plan."""
    flags.DEFINE_float("budget", None, "Share of the parameters to keep; 0.1 if nothing is given.")
    flags.DEFINE_integer("max_params", None, "Number of parameters to keep.")
    flags.DEFINE_float("max_error", None, "Largest predicted error of a layer.")
    flags.DEFINE_integer("rank", None, "Kronecker terms of every layer.")
    flags.DEFINE_integer(
        "scale", None, "What the factors of hidden layers are multiplied by; 1 if it is not given."
    )
    flags.DEFINE_bool(
        "low_rank", None, "Whether layers may become two plain ones; they may if it is not given."
    )
    define_data_flags("calibration", "to fit to")


def define_data_flags(name: str, use: str) -> None:
    """Defines the flags that name inputs of the model.

    Args:
        name: of the flag for the inputs themselves.
        use: what they are for.
    """
    flags.DEFINE_string(
        name,
        None,
        f"Inputs of the model {use}: a .npy file, a .npz file with an array for each input, or "
        "the name of an image or text classification set of TensorFlow Datasets.",
    )
    flags.DEFINE_integer("examples", 1024, "Examples of them to use.", lower_bound=1)
    flags.DEFINE_string("data_dir", None, "Folder of TensorFlow Datasets.")


def arguments(argv: list[str], *names: str) -> list[pathlib.Path]:
    """The files that are named on the command line.

    Raises:
        CommandError: if there are not as many as names.
    """
    command, *given = argv
    if len(given) != len(names):
        raise CommandError(
            f"usage: keras-bilinear {command} {' '.join(names)} [--flag=value ...]; received "
            f"{len(given)} file names"
        )
    return [pathlib.Path(name) for name in given]


def check_output(path: pathlib.Path, *suffixes: str) -> None:
    """Checks, before any work, that a file can be written.

    Raises:
        CommandError: if its name has another suffix, if it is there and may not
            be replaced, or if its folder is not writable.
    """
    if path.suffix not in suffixes:
        raise CommandError(f"the output must be a {' or '.join(suffixes)} file, not {str(path)!r}")
    if path.exists() and not FLAGS.overwrite:
        raise CommandError(f"{str(path)!r} is there already: give --overwrite to replace it")
    with command_errors(OSError):
        check_writable(path.parent)


def load(path: pathlib.Path) -> keras.Model:
    """Loads a model, compiled as it was where what that needs is at hand.

    Raises:
        CommandError: if the file is missing, is no whole `.keras` file, or holds
            what Keras cannot load, or does not load in its safe mode.
    """
    if path.suffix != ".keras":
        raise CommandError(f"{str(path)!r} is no .keras file")
    if not path.is_file():
        raise CommandError(f"there is no file {str(path)!r}")
    if not zipfile.is_zipfile(path):
        raise CommandError(f"{str(path)!r} is no .keras file, or only a part of one")
    try:
        try:
            return keras.models.load_model(path, safe_mode=not FLAGS.unsafe)
        except Exception:  # of a loss or a metric, perhaps
            return keras.models.load_model(path, compile=False, safe_mode=not FLAGS.unsafe)
    except Exception as error:  # Keras, its backends and what they call raise anything
        why = reason(error)
        if "safe_mode" in str(error) or "unsafe" in str(error):
            why = "it has code in it, which is loaded with --unsafe only"
        raise CommandError(f"cannot load {str(path)!r}: {why}") from error


def save(model: keras.Model, path: pathlib.Path) -> None:
    """Saves a model beside and renames it."""
    with command_errors(OSError), staged(path.parent) as folder:
        model.save(folder / path.name)


def write(text: str, path: pathlib.Path) -> None:
    """Writes a text beside and renames it."""
    with command_errors(OSError), staged(path.parent) as folder:
        (folder / path.name).write_text(text)


def read_data(model: keras.Model, bar: rich.progress.Progress, flag: str = "calibration"):
    """The inputs that a flag names; `None` without the flag.

    Args:
        model: the model that they are for.
        bar: where each pass through the data is shown.
        flag: see `define_data_flags`.

    Raises:
        CommandError: if they cannot be read or are no inputs of the model.
    """
    name = FLAGS[flag].value
    if name is None:
        return None
    data = _read(name)
    for key, values in data.items() if isinstance(data, dict) else [("input", data)]:
        if values.dtype == object or values.ndim < 2 or not len(values):
            raise CommandError(f"{name!r} has no examples of the model's {key}")
    try:
        inputs = keras.tree.map_structure(lambda values: values[:1], data)
        keras.ops.convert_to_numpy(keras.tree.flatten(model(inputs))[0])
    except Exception as error:  # whatever a model says of inputs that are not its own
        raise CommandError(f"{name!r} has no inputs of the model: {reason(error)}") from error
    data = keras.tree.map_structure(lambda values: values[: FLAGS.examples], data)
    with command_errors(ValueError):
        data = [*model_batches(data, model, name)]
    return _Passes(data, bar, flag.replace("_", " "))


class _Passes:
    """Batches that show how far a pass through them is."""

    def __init__(self, batches, bar, name):
        self._batches, self._bar, self._name = batches, bar, name

    def __iter__(self):
        task = self._bar.add_task(self._name, total=len(self._batches))
        try:
            for batch in self._batches:
                yield batch
                self._bar.advance(task)
        finally:
            self._bar.remove_task(task)


def _read(name):
    path = pathlib.Path(name)
    if path.suffix not in (".npy", ".npz"):
        with command_errors(ImportError, ValueError):
            return datasets.load(name, FLAGS.data_dir).x_train
    try:
        data = np.load(path)
        return dict(data) if hasattr(data, "files") else data  # whatever the file is called
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CommandError(f"cannot read {name!r}: {error}") from error


def make_plan(model: keras.Model, data) -> planner.RewritePlan:
    """The plan that the flags ask for.

    Raises:
        CommandError: if they are not valid, or no plan keeps to the limit.
    """
    with command_errors(ValueError):
        return planner.plan_rewrite(
            model,
            budget=FLAGS.budget,
            max_params=FLAGS.max_params,
            max_error=FLAGS.max_error,
            calibration_data=data,
            rank="auto" if FLAGS.rank is None else FLAGS.rank,
            scale=1 if FLAGS.scale is None else FLAGS.scale,
            low_rank=FLAGS.low_rank is not False,
        )


@contextlib.contextmanager
def progress(description: str) -> Iterator[rich.progress.Progress]:
    """Shows on a terminal's stderr that the command is at work."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(
        console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        bar.add_task(description, total=None)
        yield bar
