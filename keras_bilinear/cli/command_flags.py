"""The flags of all commands, and their help. Nothing here needs Keras."""

import math

from absl import flags

from keras_bilinear.benchmark.choices import COLUMNS, SUITES
from keras_bilinear.litert.tolerances import TOLERANCES


def demo() -> None:
    """Trains a full and a bilinear network the same way and compares them.

    Both networks have the same layers, optimizer, learning rate, batches and seed.
    The bilinear network stores each kernel and each embedding table as two small factors.
    The demo prints a table and writes these files into --output_dir: full.keras,
    bilinear.keras, full.tflite, bilinear.tflite, results.json and results.png.
    """
    flags.DEFINE_string(
        "dataset",
        "digits",
        "digits, the handwritten digits of scikit-learn, or an image or text classification set of "
        "TensorFlow Datasets, such as fashion_mnist or imdb_reviews.",
    )
    _define_data_dir()
    flags.DEFINE_string("output_dir", "demo_output", "Folder to write the results into.")
    flags.DEFINE_integer("width", 512, "Units of each hidden layer.", lower_bound=1)
    flags.DEFINE_integer("depth", 2, "Number of hidden layers.", lower_bound=1)
    flags.DEFINE_integer(
        "rank", 4, "Number of Kronecker terms of each bilinear layer.", lower_bound=1
    )
    flags.DEFINE_integer(
        "scale",
        1,
        "Number by which both output factors of every hidden layer of the bilinear network are "
        "multiplied. The layer then has scale**2 times as many units.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "epochs",
        None,
        "Passes over the training data. If it is not given: 40 for digits, 5 for other data sets.",
        lower_bound=1,
    )
    flags.DEFINE_integer("batch_size", 64, "Examples in each training step.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 1e-3, "Learning rate of Adam, for both networks.")
    flags.register_validator(
        "learning_rate", lambda value: 0 < value < math.inf, "must be above zero and finite"
    )
    flags.DEFINE_integer(
        "seed",
        0,
        "Seed of all random numbers. The same seed gives the same accuracy.",
        lower_bound=0,
        upper_bound=2**32 - 1,
    )
    flags.DEFINE_bool("mixed_precision", False, "Compute in bfloat16, keep weights in float32.")
    flags.DEFINE_bool("quick", False, "One epoch on few examples, to see that everything runs.")


def inspect() -> None:
    """Shows what a saved model costs, layer by layer, or two saved models side by side.

    keras-bilinear inspect MODEL.keras [SMALL.keras] --dataset=NAME --output=costs.json
    """
    _define_model_flags()
    _define_overwrite()
    flags.DEFINE_string(
        "dataset",
        None,
        "Image or text classification set of TensorFlow Datasets, or digits; shows the accuracy on "
        "its test split.",
    )
    _define_data_dir()
    flags.DEFINE_string("output", None, "Also write the result to this .json, .png or .svg file.")


def plan() -> None:
    """Shows which layers of a saved model would become bilinear; --output writes the plan.

    keras-bilinear plan MODEL.keras --budget=0.1 --output=plan.json
    """
    _define_model_flags()
    _define_plan_flags()
    _define_overwrite()
    flags.DEFINE_string("output", None, "Also write the plan to this .json file.")


def rewrite() -> None:
    """Makes a smaller model from a saved model.

    keras-bilinear rewrite MODEL.keras SMALL.keras --budget=0.1 --calibration=inputs.npy
    keras-bilinear rewrite MODEL.keras SMALL.keras --plan=plan.json
    """
    _define_model_flags()
    _define_plan_flags()
    _define_overwrite()
    flags.DEFINE_string("plan", None, "A .json file that `keras-bilinear plan` wrote.")
    flags.DEFINE_integer(
        "recover",
        0,
        "Number of epochs for which the new model learns the outputs of the model, from the inputs "
        "of --calibration and without labels.",
        lower_bound=0,
    )


def expand() -> None:
    """Turns the bilinear layers of a saved model into stock Keras layers.

    keras-bilinear expand SMALL.keras FULL.keras
    """
    _define_model_flags()
    _define_overwrite()


def export() -> None:
    """Writes a saved model as a LiteRT file, for phones and small devices.

    keras-bilinear export MODEL.keras MODEL.tflite --quantize=dynamic_int8
    keras-bilinear export MODEL.keras MODEL.tflite --quantize=int8 --representative_data=inputs.npy
    """
    _define_model_flags()
    _define_overwrite()
    _define_data_flags("representative_data", "to find the ranges of int8, and to compare on")
    flags.DEFINE_enum(
        "quantize",
        None,
        [kind for kind in TOLERANCES if kind],
        "How to store numbers; in float32 if it is not given.",
    )
    _define_input_shape()
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


def tradeoff() -> None:
    """Measures which LiteRT file of a saved model to ship: its own, or a smaller model's.

    keras-bilinear tradeoff MODEL.keras --data=inputs.npy --labels=labels.npy --max_drop=0.01
    keras-bilinear tradeoff MODEL.keras --data=digits --max_bytes=50000 --output=tradeoff.png

    The command writes the files, and what was measured, into --output_dir. If it was stopped, it
    goes on there. On examples that are held out it measures the accuracy, or without labels the
    agreement with the model. The labels of a data set are read with it.
    """
    _define_model_flags()
    _define_overwrite()
    _define_data_flags("data", "to fit smaller models to, and to hold out in part")
    flags.DEFINE_string("labels", None, "Labels of --data: a .npy file.")
    flags.DEFINE_multi_float(
        "budget", [0.5, 0.25, 0.1], "Share of the parameters to keep; may be repeated."
    )
    flags.DEFINE_integer(
        "recover",
        3,
        "Number of epochs for which smaller models learn the outputs of the model; 0 for none.",
        lower_bound=0,
    )
    _define_input_shape()
    flags.DEFINE_integer("max_bytes", None, "The most bytes of the file to ship.", lower_bound=0)
    flags.DEFINE_float(
        "max_drop",
        None,
        "By how much the accuracy or agreement may drop; 0.01 if no limit is given.",
        lower_bound=0.0,
    )
    flags.DEFINE_string("output_dir", "tradeoff_output", "Folder for the files and the results.")
    flags.DEFINE_string("output", None, "Also write the result to this .json, .png or .svg file.")


def benchmark() -> None:
    """Times the bilinear layers beside the full layers and beside the limits of the hardware.

    Each backend runs in a process of its own, one after the other. There, every full layer and its
    bilinear counterpart take turns, so that a machine whose speed drifts slows both down. The times
    are medians; read them as ratios. The floor is a time that no implementation of the same
    mathematics can beat on this machine: the larger of the MACs over the measured rate of matrix
    products, and the bytes that must move over the measured rate of copies.
    """
    flags.DEFINE_multi_enum(
        "suite",
        SUITES,
        SUITES,
        "Layers to measure; may be repeated. conv_memory and recurrent_memory measure the memory "
        "of a training step; huge measures the memory of a process that trains an embedding of "
        "10^9 words; the others measure time.",
    )
    flags.DEFINE_multi_enum(
        "backend",
        ["tensorflow"],
        list(COLUMNS),
        "Backends to measure, each in a process of its own; may be repeated.",
    )
    flags.DEFINE_string("output", None, "Also write the results to OUTPUT.json and OUTPUT.md.")


def _define_model_flags() -> None:
    """Defines the flags of every command that reads a model."""
    flags.DEFINE_bool(
        "unsafe",
        False,
        "Load code that is stored in the file, such as the code of a Lambda layer. Such code can "
        "do anything on this machine.",
    )
    flags.DEFINE_multi_string(
        "import",
        [],
        "Module that defines classes or functions of the model, found as Python finds it or in the "
        "current folder; may be repeated.",
    )


def _define_overwrite() -> None:
    """Defines the flag of every command that writes a file."""
    flags.DEFINE_bool("overwrite", False, "Replace an output file that exists.")


def _define_input_shape() -> None:
    flags.DEFINE_multi_string(
        "input_shape",
        None,
        "Shape of an input with its batch size: 1,28,28 for a single input, NAME=1,28,28 for each "
        "of several. If it is not given: the shape that the model knows, and a batch of 1.",
    )


def _define_data_dir() -> None:
    flags.DEFINE_string("data_dir", None, "Folder of TensorFlow Datasets.")


def _define_plan_flags() -> None:
    """Defines the flags that decide a plan."""
    flags.DEFINE(
        _BudgetParser(),
        "budget",
        None,
        "Share of the parameters to keep, or shares that are all kept, such as "
        "parameters=0.25,macs=0.5; 0.1 if no other limit is given.",
    )
    flags.DEFINE_integer("max_params", None, "Number of parameters to keep.")
    flags.DEFINE_float("max_error", None, "Largest predicted relative error of a layer.")
    flags.DEFINE_integer("rank", None, "Number of Kronecker terms of every layer.")
    flags.DEFINE_integer(
        "scale",
        None,
        "Number by which both output factors of every hidden layer are multiplied; 1 if it is not "
        "given.",
    )
    flags.DEFINE_bool(
        "low_rank",
        None,
        "Whether a layer may become a product of two matrices (low rank); it may if it is not "
        "given.",
    )
    _define_data_flags("calibration", "to fit the layers to")


class _BudgetParser(flags.ArgumentParser):
    """Parses a budget: a number, or a dictionary of numbers from `NAME=NUMBER,NAME=NUMBER`."""

    syntactic_help = "a number, or NAME=NUMBER,..."

    def parse(self, argument: str) -> float | dict[str, float]:
        try:
            if "=" not in argument:
                return float(argument)
            shares = [part.split("=") for part in argument.split(",")]
            budget = {name.strip(): float(share) for name, share in shares}
        except ValueError:
            raise ValueError("it must be a number, or NAME=NUMBER,NAME=NUMBER") from None
        if len(budget) < len(shares):
            raise ValueError("a name is given twice")
        return budget


def _define_data_flags(name: str, use: str) -> None:
    """Defines the flags that name inputs of the model.

    Args:
        name: name of the flag for the inputs themselves.
        use: what the inputs are for, such as `"to fit the layers to"`.
    """
    flags.DEFINE_string(
        name,
        None,
        f"Inputs of the model {use}: a .npy file, a .npz file with an array for each input, or "
        "the name of an image or text classification set of TensorFlow Datasets, or digits.",
    )
    flags.DEFINE_integer(
        "examples", 1024, f"How many examples of --{name} to use at most.", lower_bound=1
    )
    _define_data_dir()
