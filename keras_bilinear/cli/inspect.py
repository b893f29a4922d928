"""`keras-bilinear inspect`: shows what a saved model costs, or two side by side."""

import pathlib

from absl import flags

from keras_bilinear import datasets
from keras_bilinear.cli import console, saved
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.files import staged
from keras_bilinear.messages import reason
from keras_bilinear.progress import shown, working
from keras_bilinear.reports.summary import compare, summarize

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Inspects one or two saved models as the flags say.

    Args:
        argv: the name of the command and the positional arguments.

    Raises:
        CommandError: if a file cannot be read or written, or if a model does not take the data
            set.
    """
    names = ("MODEL.keras", "SMALL.keras")
    sources = saved.file_names(argv, *names[: max(1, len(argv) - 1)])
    output = pathlib.Path(FLAGS.output) if FLAGS.output else None
    if output:
        saved.check_output(output, ".json", ".png", ".svg")
    with shown(), working(f"inspecting {' and '.join(map(str, sources))}"):
        models = [saved.load(source) for source in sources]
        data = None
        if FLAGS.dataset:
            with command_errors(ImportError, ValueError):
                dataset = datasets.load(FLAGS.dataset, FLAGS.data_dir)
            data = dataset.x_test, dataset.y_test
        try:
            if len(models) == 1:
                costs = summarize(models[0], data)
            else:
                costs = compare(models[0], models[1], data)
        except Exception as error:  # a model may raise anything for inputs that it does not take
            raise CommandError(f"cannot run the model: {reason(error)}") from error
    console.print_table(costs.table())
    if output and output.suffix == ".json":
        saved.write(costs.to_json() + "\n", output)
    elif output:
        with command_errors(OSError), staged(output.parent) as folder:
            costs.plot(folder / output.name)
