"""Writes a saved model as a LiteRT file, for phones and small devices.

keras-bilinear export MODEL.keras MODEL.tflite --quantize=dynamic_int8
keras-bilinear export MODEL.keras MODEL.tflite --quantize=int8 --representative_data=inputs.npy
"""

from absl import flags

from keras_bilinear.cli import saved
from keras_bilinear.cli.errors import CommandError, command_errors
from keras_bilinear.litert.export import TOLERANCES, export_litert
from keras_bilinear.messages import require
from keras_bilinear.progress import shown, working

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of `keras-bilinear export`."""
    saved.define_model_flags()
    saved.define_output_flags()
    saved.define_data_flags("representative_data", "to find the ranges of int8, and to compare on")
    flags.DEFINE_enum(
        "quantize",
        None,
        [kind for kind in TOLERANCES if kind],
        "How to store numbers; in float32 if it is not given.",
    )
    flags.DEFINE_multi_string(
        "input_shape",
        None,
        "Shape of an input with its batch size: 1,28,28 for a single input, NAME=1,28,28 for each "
        "of several. If it is not given: the shape that the model knows, and a batch of 1.",
    )
    flags.DEFINE_bool(
        "unroll",
        None,
        "Repeat the operations of recurrent layers for each time step instead of running a loop. "
        "If it is not given: with --quantize=int8 only.",
    )
    flags.DEFINE_bool(
        "quantize_io", False, "With --quantize=int8, make inputs and outputs integers as well."
    )
    flags.DEFINE_float(
        "tolerance",
        None,
        "Largest relative difference from the model's outputs. If it is not given: "
        + ", ".join(f"{value:g} for {kind or 'float32'}" for kind, value in TOLERANCES.items())
        + ".",
    )


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
    print(report, end="")


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
