"""Writing a model as a LiteRT file, `.tflite`, small, fast and without custom operations."""

import functools
import importlib.util
import numbers
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from keras_bilinear.keras_private.cloning import copy_model
from keras_bilinear.keras_private.graph import all_layers, stateful_layers
from keras_bilinear.kronecker.target import on_gpu
from keras_bilinear.litert.converter import convert, named_outputs
from keras_bilinear.litert.inputs import input_specs, read_examples
from keras_bilinear.litert.report import LiteRTReport, inspect_litert, run_litert
from keras_bilinear.rewriting.sites import check_built

# The largest difference from the model that a kind of quantization may make.
TOLERANCES = {None: 1e-4, "float16": 1e-2, "dynamic_int8": 0.1, "int8": 0.2}
# Examples on which a file is compared with its model.
COMPARED = 8
_NOT_FLOAT32 = ("float16", "bfloat16", "mixed_float16", "mixed_bfloat16", "float64")


def export_litert(
    model: keras.Model,
    path: str | os.PathLike,
    quantize: str | None = None,
    representative_data=None,
    input_shapes: Sequence | Mapping | None = None,
    unroll: bool | None = None,
    quantize_io: bool = False,
    tolerance: float | None = None,
) -> LiteRTReport:
    """Writes a model as a `.tflite` file, which the stock LiteRT interpreter runs.

    The file has built-in operations only, and of every bilinear layer the
    factors, not the kernel. It is for inputs of fixed sizes, and for one example
    at a time if nothing else is said; those of a subclassed model are float32. A
    model of another dtype policy is exported as in float32. The file is run and
    compared with the model before it gets its name; whatever fails, nothing is
    left of it.

    Args:
        model: a built model, of any backend.
        path: the file to write; one that is there is replaced.
        quantize: `None` for float32; `"float16"` for weights of half the size;
            `"dynamic_int8"` for weights of a quarter, of 1,024 numbers or more,
            with which integers are multiplied; `"int8"` for integers in all of
            the model.
        representative_data: inputs of the model, as `plan_rewrite` takes them:
            `"int8"` needs some 100 to know how large values get. For any file, the
            first of them are those on which it is compared with the model;
            `None` takes random ones.
        input_shapes: shapes of the inputs, batch size included: a tuple for a
            single input, a list, or a dictionary by the names of the inputs, which
            are `input_1` and so on where the model has none. `None` takes what the
            model says, and one example.
        unroll: whether recurrent layers repeat their operations for each time
            step, instead of a loop. `None` does so for `"int8"` only, for which
            LiteRT has no loops. A loop is the smaller, but for a few time steps.
        quantize_io: whether the inputs and outputs of an `"int8"` model are
            integers as well, and not converted on the way.
        tolerance: the largest root mean square difference from the outputs of the
            model, relative to their root mean square; `None` allows 1e-4 in
            float32, 1e-2 with `"float16"`, 0.1 with `"dynamic_int8"`, 0.2 with
            `"int8"`.

    Returns:
        A `LiteRTReport`: size, operations, latency, memory and difference.

    Raises:
        ValueError: if an argument is not valid, if the model is not built or has
            a size that is not known, if LiteRT has no built-in operation for a
            part of the model, or if the file's outputs differ too much.
        ImportError: if TensorFlow or `ai-edge-litert` is missing.
        OSError: if the file cannot be written.
        RuntimeError: if LiteRT cannot run the file.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), BilinearDense(256, rank=2)])
    >>> path = os.path.join(tempfile.mkdtemp(), "model.tflite")
    >>> report = export_litert(model, path)
    >>> report.ops["FULLY_CONNECTED"], report.bytes < 10_000
    (2, True)
    """
    path = pathlib.Path(path)
    _check(model, path, quantize, representative_data, unroll, quantize_io, tolerance)
    inputs = input_specs(model, input_shapes)
    if unroll is None:
        unroll = quantize == "int8"
    if tolerance is None:
        tolerance = TOLERANCES[quantize]
    examples = read_examples(model, inputs, representative_data)
    compared = {name: values[:COMPARED] for name, values in examples.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
        file = pathlib.Path(folder, path.name)
        model = inference_twin(model, unroll)
        convert(model, file, inputs, examples, quantize, quantize_io)
        run = run_litert(file, compared)
        difference = _difference(run.outputs, _expected(model, inputs, compared))
        if not difference <= tolerance:
            raise ValueError(
                f"The outputs of the LiteRT file differ from the model's by {difference:.2g}, more "
                f"than the tolerance. Received: quantize={quantize!r}, tolerance={tolerance:g}"
            )
        report = LiteRTReport(
            path=str(path),
            **inspect_litert(file),
            memory_bytes=run.memory_bytes,
            latency_us=run.latency_us,
            difference=difference,
            tolerance=tolerance,
        )
        os.replace(file, path)
    return report


def _check(model, path, quantize, representative_data, unroll, quantize_io, tolerance):
    check_built(model)
    if quantize not in TOLERANCES:
        raise ValueError(
            f"`quantize` must be one of {', '.join(map(repr, TOLERANCES))}. "
            f"Received: quantize={quantize!r}"
        )
    if quantize == "int8" and representative_data is None:
        raise ValueError("`quantize='int8'` needs `representative_data`. Received: None")
    if quantize == "int8" and unroll is False and _recurrent(model):
        raise ValueError(
            "LiteRT has no integer loops: with `quantize='int8'` the recurrent layers of the "
            "model must be unrolled. Received: unroll=False"
        )
    if stateful_layers(model):
        raise ValueError(
            "A LiteRT file keeps no states from call to call: make the recurrent layers without "
            f"`stateful`. Received: model={model!r}"
        )
    if quantize_io and quantize != "int8":
        raise ValueError(f"`quantize_io` needs `quantize='int8'`. Received: quantize={quantize!r}")
    if tolerance is not None and (not isinstance(tolerance, numbers.Real) or not tolerance >= 0):
        raise ValueError(
            "`tolerance` must be `None` or a number that is not negative. "
            f"Received: tolerance={tolerance!r}"
        )
    if path.suffix != ".tflite":
        raise ValueError(f"`path` must end with .tflite. Received: path={str(path)!r}")
    for module, package in (("tensorflow", "tensorflow"), ("ai_edge_litert", "ai-edge-litert")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"The export to LiteRT needs {package}: run `pip install {package}`")
    if path.is_dir():
        raise OSError(f"cannot write {str(path)!r}: it is a folder")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise OSError(f"cannot write into {str(path.parent)!r}: it is no writable folder")


def _recurrent(model):
    return any(isinstance(layer, keras.layers.RNN) for layer in all_layers(model))


def _expected(model, arguments, examples):
    """For each output of the model, by its name in the file, its values, runs first."""
    runs = []
    for values in zip(*examples.values(), strict=True):
        inputs = keras.tree.pack_sequence_as(
            arguments, list(map(keras.ops.convert_to_tensor, values))
        )
        outputs = named_outputs(model(*inputs, training=False))
        runs.append({name: keras.ops.convert_to_numpy(one) for name, one in outputs.items()})
    return {name: np.stack([run[name] for run in runs]) for name in runs[0]}


def _difference(outputs, expected):
    """Root mean square difference of all outputs, relative to the root mean square."""
    pairs = [
        (outputs[name].astype("float64"), values.astype("float64"))
        for name, values in expected.items()
    ]
    squares = sum(np.square(one - other).sum() for one, other in pairs)
    size = sum(np.square(other).sum() for _, other in pairs)
    return float(np.sqrt(squares / (size or 1.0)))


def inference_twin(model: keras.Model, unroll: bool = False) -> keras.Model:
    """A copy of the model, with its weights, as it is exported.

    It computes in float32, and without cuDNN. The model itself, if it does so and
    nothing is to be unrolled.

    Args:
        model: the model.
        unroll: whether recurrent layers are unrolled.

    Raises:
        ValueError: if the model cannot be saved and loaded.
    """
    recurrent = _recurrent(model)
    unroll = unroll and recurrent
    changes = unroll or (recurrent and on_gpu())
    if not changes and all(layer.compute_dtype == "float32" for layer in all_layers(model)):
        return model
    twin = copy_model(model, functools.partial(_for_inference, unroll=unroll))
    for layer in all_layers(twin):
        if hasattr(layer, "use_cudnn"):  # which no configuration holds
            layer.use_cudnn = False
    return twin


def _for_inference(config, unroll):
    """Changes the configuration of a layer, in place."""
    if config.get("class_name") == "DTypePolicy" and config["config"]["name"] in _NOT_FLOAT32:
        config["config"]["name"] = "float32"
    if unroll and "unroll" in config:
        config["unroll"] = True
