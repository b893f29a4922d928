"""Writes a saved model as a LiteRT file, for phones and small devices.

keras-bilinear export MODEL.keras MODEL.tflite --quantize=dynamic_int8
keras-bilinear export MODEL.keras MODEL.tflite --quantize=int8 --representative_data=inputs.npy
"""

from absl import flags

from keras_bilinear.cli import saved
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.litert.export import TOLERANCES, export_litert
from keras_bilinear.messages import require

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of `keras-bilinear export`."""
    saved.define_model_flags()
    saved.define_output_flags()
    saved.define_data_flags("representative_data", "to quantize with, and to compare on")
    flags.DEFINE_enum(
        "quantize", None, [kind for kind in TOLERANCES if kind], "How to store numbers; float32."
    )
    flags.DEFINE_multi_string(
        "input_shape",
        None,
        "Shape of an input with its batch size, as 1,28,28 or, of one of several inputs, as "
        "NAME=1,28,28. By default that of the model, and a batch of one.",
    )
    flags.DEFINE_bool(
        "unroll",
        None,
        "Repeat the operations of recurrent layers for each time step; by default with int8 only.",
    )
    flags.DEFINE_bool("quantize_io", False, "With int8: inputs and outputs are integers as well.")
    flags.DEFINE_float("tolerance", None, "Largest relative difference from the model's outputs.")


def main(argv: list[str]) -> None:
    """Exports with the flags as they are.

    Raises:
        CommandError: if a file cannot be read or written, or if the model cannot
            be exported as asked.
    """
    source, output = saved.arguments(argv, "MODEL.keras", "MODEL.tflite")
    saved.check_output(output, ".tflite")
    with command_errors(ImportError):
        require("ai_edge_litert", "tensorflow", extra="litert")
    shapes = _input_shapes(FLAGS.input_shape)
    with saved.progress(f"exporting {source}") as bar:
        model = saved.load(source)
        data = saved.read_data(model, bar, "representative_data")
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
    print(report, end="")


def _input_shapes(texts):
    """`input_shapes` of `export_litert` from what the flag says."""
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
