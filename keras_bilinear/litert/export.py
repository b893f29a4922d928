"""Writes a model as a small LiteRT file, `.tflite`, of built-in operations."""

import functools
import importlib.util
import numbers
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_bilinear.keras_private.cloning import copy_model
from keras_bilinear.keras_private.graph import all_layers, stateful_layers
from keras_bilinear.kronecker.target import on_gpu
from keras_bilinear.litert.comparison import compare_with_model
from keras_bilinear.litert.contents import inspect_litert
from keras_bilinear.litert.converter import convert
from keras_bilinear.litert.inputs import input_specs, read_examples
from keras_bilinear.litert.report import LiteRTReport
from keras_bilinear.litert.tolerances import TOLERANCES
from keras_bilinear.progress import check_verbose, shown, working
from keras_bilinear.rewriting.sites import check_built

_NOT_FLOAT32 = ("float16", "bfloat16", "mixed_float16", "mixed_bfloat16", "float64")


def export_litert(
    model: keras.Model,
    path: str | os.PathLike,
    quantize: str | None = None,
    representative_data: Any = None,
    input_shapes: Sequence | Mapping | None = None,
    unroll: bool | None = None,
    quantize_io: bool = False,
    tolerance: float | None = None,
    verbose: int | str = "auto",
) -> LiteRTReport:
    """Writes a model as a `.tflite` file, which the stock LiteRT interpreter runs.

    The file has built-in operations only. It holds the factors of every bilinear layer, not the
    kernel. Its inputs have fixed sizes: one example at a time, unless `input_shapes` says
    otherwise. A model of another dtype policy is exported as if it computed in float32. Inputs of
    a subclassed model are float32.

    Before the file gets its name, LiteRT runs it, and its outputs are compared with the outputs of
    the model. If anything fails, no file is left and an older file stays.

    Args:
        model: a built model, of any backend.
        path: the file to write, with the suffix `.tflite`. An older file is replaced.
        quantize: how to store and multiply numbers. `None` stores float32. `"float16"` stores
            weights in half the bytes. `"dynamic_int8"` stores each weight of 1,024 numbers or
            more in a quarter of the bytes and multiplies integers. `"int8"` stores and computes
            everything with integers.
        representative_data: inputs of the model without labels: an array, a dictionary of
            arrays, a list with an array for each of several inputs, or an iterable of batches. Of
            a tuple, only the first element counts. At most 256 examples are used: of arrays with
            more, 256 that are drawn from all of them, always the same; of batches, the first.
            `"int8"` needs about 100 examples to find the range of each value. The file is
            compared with the model on all examples that are used. `None` compares on 8 random
            inputs.
        input_shapes: shapes of the inputs, with the batch size, such as `(1, 28, 28)`. A tuple
            for a single input, a list of tuples, or a dictionary of tuples by the names of the
            inputs. An input without a name of its own is `input_1`, `input_2` and so on. `None`
            takes the shapes that the model knows and a batch size of 1.
        unroll: whether recurrent layers repeat their operations for each time step (`True`) or
            run in a loop (`False`). A loop makes the smaller file, except for a few time steps.
            `None` unrolls for `"int8"` only, for which LiteRT has no loops.
        quantize_io: whether the inputs and outputs of an `"int8"` file are integers as well.
            `False` keeps them floats, which the file converts.
        tolerance: the largest relative difference from the outputs of the model: the root mean
            square, over all examples, of the norm of an output's difference, divided by the root
            mean square of the output's norm, or by 0.01 if that is larger. Each output must be
            within the tolerance. `None` allows 1e-4 in float32, 1e-2 with `"float16"`, 0.1 with
            `"dynamic_int8"` and 0.2 with `"int8"`.
        verbose: 1 shows on stderr, or in a notebook, what is done; 0 shows nothing.
            `"auto"` is 1 in a terminal and in a notebook, 0 elsewhere.

    Returns:
        A `LiteRTReport`: size, operations, latency, memory and difference of the file.

    Raises:
        ValueError: if an argument is not valid, if the model is not built or has a size that is
            unknown, if LiteRT has no built-in operation for a part of the model, or if the
            outputs differ by more than `tolerance`.
        TypeError: if `representative_data` is neither an array nor an iterable of arrays.
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
    _check_arguments(model, quantize, representative_data, unroll, quantize_io, tolerance)
    check_verbose(verbose)
    _check_path(path)
    arguments = input_specs(model, input_shapes)
    if unroll is None:
        unroll = quantize == "int8"
    if tolerance is None:
        tolerance = TOLERANCES[quantize]
    examples = read_examples(model, arguments, representative_data)
    with (
        shown(verbose),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder,
    ):
        file = pathlib.Path(folder, path.name)
        with working("converting the model"):
            convert(inference_twin(model, unroll), file, arguments, examples, quantize, quantize_io)
        with working("comparing the LiteRT file with the model"):
            comparison = compare_with_model(file, inference_twin(model), arguments, examples)
        if not comparison.difference <= tolerance:
            raise ValueError(
                f"The outputs of the LiteRT file differ from the model's by "
                f"{comparison.difference:.2g}, more than the tolerance. "
                f"Received: quantize={quantize!r}, tolerance={tolerance:g}"
            )
        report = LiteRTReport(
            path=str(path),
            **inspect_litert(file),
            **vars(comparison),
            tolerance=tolerance,
        )
        os.replace(file, path)
    return report


def _check_arguments(model, quantize, representative_data, unroll, quantize_io, tolerance):
    check_built(model)
    if quantize not in TOLERANCES:
        raise ValueError(
            f"`quantize` must be one of {', '.join(map(repr, TOLERANCES))}. "
            f"Received: quantize={quantize!r}"
        )
    if quantize == "int8" and representative_data is None:
        raise ValueError(
            "`quantize='int8'` needs `representative_data`. Received: representative_data=None"
        )
    if quantize == "int8" and unroll is False and _has_recurrent(model):
        raise ValueError(
            "LiteRT has no integer loops: with `quantize='int8'` the recurrent layers of the "
            "model must be unrolled. Received: unroll=False"
        )
    check_stateless(model)
    if quantize_io and quantize != "int8":
        raise ValueError(f"`quantize_io` needs `quantize='int8'`. Received: quantize={quantize!r}")
    if tolerance is not None and (
        not isinstance(tolerance, numbers.Real) or not float(tolerance) >= 0
    ):
        raise ValueError(
            "`tolerance` must be `None` or a number that is not negative. "
            f"Received: tolerance={tolerance!r}"
        )


def _check_path(path):
    """Checks that a file can be made and written."""
    if path.suffix != ".tflite":
        raise ValueError(f"`path` must end with .tflite. Received: path={str(path)!r}")
    check_packages()
    if path.is_dir():
        raise OSError(f"cannot write {str(path)!r}: it is a folder")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise OSError(f"cannot write into {str(path.parent)!r}: it is no writable folder")


def check_stateless(model: keras.Model) -> None:
    """Checks that a model keeps no states from call to call.

    Raises:
        ValueError: if it does.
    """
    if stateful_layers(model):
        raise ValueError(
            "A LiteRT file keeps no states from call to call: make the recurrent layers without "
            f"`stateful`. Received: model={model!r}"
        )


def check_packages() -> None:
    """Checks that the packages that an export needs are installed, without importing them.

    Raises:
        ImportError: if a package is missing.
    """
    for module, package in (("tensorflow", "tensorflow"), ("ai_edge_litert", "ai-edge-litert")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"The export to LiteRT needs {package}: run `pip install {package}`")


def _has_recurrent(model):
    return any(isinstance(layer, keras.layers.RNN) for layer in all_layers(model))


def inference_twin(model: keras.Model, unroll: bool = False) -> keras.Model:
    """A copy of a model, with its weights, that computes in float32 and without cuDNN.

    Args:
        model: the model.
        unroll: whether the recurrent layers of the copy repeat their operations for each time
            step instead of running in a loop.

    Returns:
        The copy; the model itself if the copy would not differ.

    Raises:
        ValueError: if Keras cannot save or load the model.
    """
    recurrent = _has_recurrent(model)
    unroll = unroll and recurrent
    changes = unroll or (recurrent and on_gpu())
    if not changes and all(layer.compute_dtype == "float32" for layer in all_layers(model)):
        return model
    twin = copy_model(model, functools.partial(_for_inference, unroll=unroll))
    for layer in all_layers(twin):
        if hasattr(layer, "use_cudnn"):  # no configuration holds it
            layer.use_cudnn = False
    return twin


def _for_inference(config, unroll):
    """Changes the configuration of a layer or a dtype policy, in place."""
    if config.get("class_name") == "DTypePolicy" and config["config"]["name"] in _NOT_FLOAT32:
        config["config"]["name"] = "float32"
    if unroll and "unroll" in config:
        config["unroll"] = True
