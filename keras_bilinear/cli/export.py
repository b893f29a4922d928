"""`keras-bilinear export`: writes a saved model as a LiteRT file."""

from absl import flags

from keras_bilinear.cli import console, saved
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.litert.export import export_litert
from keras_bilinear.messages import require
from keras_bilinear.progress import shown, working

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    """Exports a saved model as the flags say.

    Args:
        argv: the name of the command and the positional arguments.

    Raises:
        CommandError: if a file cannot be read or written, or if the model cannot be exported.
    """
    source, output = saved.file_names(argv, "MODEL.keras", "MODEL.tflite")
    saved.check_output(output, ".tflite")
    with command_errors(ImportError):
        require("ai_edge_litert", "tensorflow", extra="litert")
    shapes = _input_shapes(FLAGS.input_shape)
    with shown(), working(f"exporting {source}"):
        model = saved.load(source)
        data = saved.read_data(model, "representative_data")
        with command_errors(ValueError, RuntimeError, ImportError, OSError):
            report = export_litert(
                model,
                output,
                quantize=FLAGS.quantize,
                representative_data=data,
                input_shapes=shapes,
                unroll=FLAGS.unroll,
                quantize_io=FLAGS.quantize_io,
                tolerance=FLAGS.tolerance,
            )
    console.print_table(report.table())


def _input_shapes(texts: list[str] | None) -> tuple | dict[str, tuple] | None:
    """The argument `input_shapes` of `export_litert` from the values of the flag."""
    if not texts:
        return None
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        try:
            shapes[name] = tuple(int(size) for size in sizes.split(","))
        except ValueError:
            raise CommandError(
                f"--input_shape must be numbers with commas between them, not {sizes!r}"
            ) from None
    return shapes.pop("") if list(shapes) == [""] else shapes
