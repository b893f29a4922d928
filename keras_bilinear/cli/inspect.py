"""Shows what a saved model costs, layer by layer; of two models, side by side.

keras-bilinear inspect MODEL.keras [SMALL.keras] --dataset=NAME --output=costs.json
"""

import pathlib

from absl import flags

from keras_bilinear import datasets
from keras_bilinear.cli import saved
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.files import staged
from keras_bilinear.messages import reason
from keras_bilinear.reports.summary import compare, summarize

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of `keras-bilinear inspect`."""
    saved.define_model_flags()
    saved.define_output_flags()
    flags.DEFINE_string(
        "dataset", None, "Image or text classification set of TensorFlow Datasets, for accuracy."
    )
    flags.DEFINE_string("data_dir", None, "Folder of TensorFlow Datasets.")
    flags.DEFINE_string("output", None, "Write it to this .json, .png or .svg file as well.")


def main(argv: list[str]) -> None:
    """Inspects with the flags as they are.

    Raises:
        CommandError: if a file cannot be read or written, or if the models do
            not take the data set.
    """
    names = ("MODEL.keras", "SMALL.keras")
    sources = saved.arguments(argv, *names[: max(1, len(argv) - 1)])
    output = pathlib.Path(FLAGS.output) if FLAGS.output else None
    if output:
        saved.check_output(output, ".json", ".png", ".svg")
    with saved.progress(f"inspecting {' and '.join(map(str, sources))}"):
        models = [saved.load(source) for source in sources]
        data = None
        if FLAGS.dataset:
            with command_errors(ImportError, ValueError):
                dataset = datasets.load(FLAGS.dataset, FLAGS.data_dir)
            data = dataset.x_test, dataset.y_test
        try:
            costs = (summarize if len(models) == 1 else compare)(*models, data)
        except Exception as error:  # whatever a model says of inputs that are not its own
            raise CommandError(f"cannot run the model: {reason(error)}") from error
    print(costs, end="")
    if output and output.suffix == ".json":
        saved.write(costs.to_json() + "\n", output)
    elif output:
        with command_errors(OSError), staged(output.parent) as folder:
            costs.plot(folder / output.name)
