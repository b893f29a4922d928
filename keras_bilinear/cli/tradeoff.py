"""`keras-bilinear tradeoff`: measures which LiteRT file of a saved model to ship."""

import pathlib

from absl import flags

from keras_bilinear import datasets
from keras_bilinear.cli import console, saved
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.files import staged
from keras_bilinear.litert.tradeoff import tradeoff
from keras_bilinear.messages import require
from keras_bilinear.progress import shown, working

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Measures the files of a saved model and of smaller models as the flags say.

    Args:
        argv: the name of the command and the positional arguments.

    Raises:
        CommandError: if a file cannot be read or written, or if the model or the data are not
            valid.
    """
    (source,) = saved.file_names(argv, "MODEL.keras")
    output = pathlib.Path(FLAGS.output) if FLAGS.output else None
    if output:
        saved.check_output(output, ".json", ".png", ".svg")
    if FLAGS.data is None:
        raise CommandError("--data is needed: inputs of the model")
    if FLAGS.labels and not saved.is_array_file(FLAGS.data):
        raise CommandError("--labels are those of a file: a data set has its own")
    with command_errors(ImportError):
        require("ai_edge_litert", "tensorflow", extra="litert")
        if output and output.suffix != ".json":
            require("matplotlib")
    shapes = saved.input_shapes()
    with shown(), working(f"measuring {source}"):
        model = saved.load(source)
        data = saved.read_data(model, "data")
        with command_errors(ValueError, TypeError, ImportError, OSError, RuntimeError):
            result = tradeoff(
                model,
                data,
                FLAGS.output_dir,
                FLAGS.budget,
                labels=saved.read(FLAGS.labels)[: FLAGS.examples] if FLAGS.labels else None,
                validation_data=_test_split(),
                recover=FLAGS.recover,
                input_shapes=shapes,
            )
    console.print_table(result.table())
    if FLAGS.max_bytes is not None or FLAGS.max_drop is not None:
        print(result.advice(FLAGS.max_bytes, FLAGS.max_drop))
    if output and output.suffix == ".json":
        saved.write(result.to_json() + "\n", output)
    elif output:
        with command_errors(OSError), staged(output.parent) as folder:
            result.plot(folder / output.name)


def _test_split() -> tuple | None:
    """Inputs and labels to measure on, if the data are a data set."""
    if saved.is_array_file(FLAGS.data):
        return None
    dataset = datasets.load(FLAGS.data, FLAGS.data_dir).head(FLAGS.examples)
    return dataset.x_test, dataset.y_test
