"""`keras-bilinear expand`: turns the bilinear layers of a saved model into stock Keras layers."""

from keras_bilinear.cli import saved
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.layers.converter import is_bilinear
from keras_bilinear.progress import shown, working
from keras_bilinear.rewriting.rewrite import expand_model
from keras_bilinear.rewriting.sites import walk


def main(argv: list[str]) -> None:
    """Expands a saved model as the flags say.

    Args:
        argv: the name of the command and the positional arguments.

    Raises:
        CommandError: if a file cannot be read or written, or if the model has no bilinear layer.
    """
    source, output = saved.file_names(argv, "SMALL.keras", "FULL.keras")
    saved.check_output(output, ".keras")
    with shown(), working(f"expanding {source}"):
        model = saved.load(source)
        if not any(is_bilinear(site.layer) for site in walk(model)):
            raise CommandError(f"there is nothing to expand: {str(source)!r} has stock layers only")
        with command_errors(ValueError):
            full = expand_model(model)
        saved.save(full, output)
    print(f"{model.count_params():,} -> {full.count_params():,} parameters")
