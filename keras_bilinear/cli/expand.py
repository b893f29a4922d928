"""Turns the bilinear layers of a saved model into stock Keras layers.

keras-bilinear expand SMALL.keras FULL.keras
"""

from keras_bilinear.cli import saved
from keras_bilinear.cli.errors import command_errors
from keras_bilinear.progress import shown, working
from keras_bilinear.rewriting.rewrite import expand_model


def define_flags() -> None:
    """Defines the flags of `keras-bilinear expand`."""
    saved.define_model_flags()
    saved.define_output_flags()


def main(argv: list[str]) -> None:
    """Expands a saved model as the flags say.

    Args:
        argv: the name of the command and the positional arguments.

    Raises:
        CommandError: if a file cannot be read or written.
    """
    source, output = saved.file_names(argv, "SMALL.keras", "FULL.keras")
    saved.check_output(output, ".keras")
    with shown(), working(f"expanding {source}"):
        model = saved.load(source)
        with command_errors(ValueError):
            full = expand_model(model)
        saved.save(full, output)
    print(f"{model.count_params():,} -> {full.count_params():,} parameters")
