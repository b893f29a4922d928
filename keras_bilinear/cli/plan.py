"""Shows, and writes with --output, which layers of a saved model would become bilinear.

keras-bilinear plan MODEL.keras --budget=0.1 --output=plan.json
"""

import pathlib

from absl import flags

from keras_bilinear.cli import saved

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of `keras-bilinear plan`."""
    saved.define_model_flags()
    saved.define_plan_flags()
    saved.define_output_flags()
    flags.DEFINE_string("output", None, "Write the plan to this .json file.")


def main(argv: list[str]) -> None:
    """Plans with the flags as they are.

    Raises:
        CommandError: if a file cannot be read or written, or no plan keeps to
            the limit.
    """
    (source,) = saved.arguments(argv, "MODEL.keras")
    output = pathlib.Path(FLAGS.output) if FLAGS.output else None
    if output:
        saved.check_output(output, ".json")
    with saved.progress(f"planning {source}") as bar:
        model = saved.load(source)
        plan = saved.make_plan(model, saved.read_data(model, bar))
    print(plan, end="")
    if output:
        saved.write(plan.to_json() + "\n", output)
