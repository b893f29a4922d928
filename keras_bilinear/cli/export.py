"""`keras-bilinear export`: writes a saved model as a LiteRT file."""

from absl import flags

from keras_bilinear.cli import console, saved
from keras_bilinear.cli.errors import command_errors
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
    shapes = saved.input_shapes()
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
