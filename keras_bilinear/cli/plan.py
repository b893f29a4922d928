"""`keras-bilinear plan`: shows which layers of a saved model would become bilinear."""

import pathlib

from absl import flags

from keras_bilinear.cli import console, saved
from keras_bilinear.progress import shown, working

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Plans the rewrite of a saved model as the flags say.

    Args:
        argv: the name of the command and the positional arguments.

    Raises:
        CommandError: if a file cannot be read or written, or if no plan keeps to the limit.
    """
    (source,) = saved.file_names(argv, "MODEL.keras")
    output = pathlib.Path(FLAGS.output) if FLAGS.output else None
    if output:
        saved.check_output(output, ".json")
    with shown(), working(f"planning {source}"):
        model = saved.load(source)
        plan = saved.make_plan(model, saved.read_data(model))
    console.print_table(plan.table())
    if output:
        saved.write(plan.to_json() + "\n", output)
