"""`keras-bilinear rewrite`: makes a smaller model from a saved model."""

import pathlib

from absl import flags

from keras_bilinear.cli import console, saved
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.progress import shown, working
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.rewrite import rewrite_model

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Rewrites a saved model as the flags say.

    Args:
        argv: the name of the command and the positional arguments.

    Raises:
        CommandError: if a file cannot be read or written, or if no plan keeps to the limit.
    """
    source, output = saved.file_names(argv, "MODEL.keras", "SMALL.keras")
    saved.check_output(output, ".keras")
    limits = ("budget", "max_params", "max_error", "rank", "scale", "low_rank")
    if FLAGS.plan and any(getattr(FLAGS, name) is not None for name in limits):
        raise CommandError(f"--plan and --{', --'.join(limits)} exclude each other")
    if FLAGS.recover and FLAGS.calibration is None:
        raise CommandError("--recover needs --calibration")
    with shown(), working(f"rewriting {source}"):
        model = saved.load(source)
        data = saved.read_data(model)
        plan = _read_plan(pathlib.Path(FLAGS.plan)) if FLAGS.plan else saved.make_plan(model, data)
        with command_errors(ValueError):
            small = rewrite_model(model, plan, data, recover=FLAGS.recover)
        saved.save(small, output)
    console.print_table(plan.table())


def _read_plan(path: pathlib.Path) -> RewritePlan:
    try:
        return RewritePlan.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {str(path)!r}: {error}") from error
