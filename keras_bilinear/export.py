"""Writing a model as a LiteRT file, `.tflite`, small, fast and without custom operations.

TensorFlow's converter does the work. Where Keras runs on another backend, a
second Python process with TensorFlow does it; running this module as a script
is that process.
"""

import functools
import importlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import keras
import numpy as np

from keras_bilinear.calibration import model_batches
from keras_bilinear.centering import centre_tables
from keras_bilinear.litert import LiteRTReport, inspect_litert, run_litert
from keras_bilinear.rewrite import copy_model
from keras_bilinear.runtime import exporting
from keras_bilinear.sites import check_built

# The largest difference from the model that a kind of quantization may make.
TOLERANCES = {None: 1e-4, "float16": 1e-2, "dynamic_int8": 0.1, "int8": 0.2}
# Examples on which a file is compared with its model, and quantized.
COMPARED, REPRESENTATIVE = 8, 256
# Names of inputs that Keras counts up in each process.
_UNNAMED = re.compile(r"^((keras_tensor|input_layer)(_\d+)?)?$")
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

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), BilinearDense(256, rank=2)])
    >>> path = os.path.join(tempfile.mkdtemp(), "model.tflite")
    >>> report = export_litert(model, path)
    >>> report.ops["FULLY_CONNECTED"], report.bytes < 10_000
    (2, True)
    """
    path = pathlib.Path(path)
    _check(model, path, quantize, representative_data, unroll, quantize_io)
    inputs = _input_specs(model, input_shapes)
    if unroll is None:
        unroll = quantize == "int8"
    if tolerance is None:
        tolerance = TOLERANCES[quantize]
    examples = _examples(model, inputs, representative_data)
    compared = {name: values[:COMPARED] for name, values in examples.items()}
    options = {"quantize": quantize, "quantize_io": quantize_io}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
        file = pathlib.Path(folder, path.name)
        model = inference_twin(model, unroll)
        if keras.config.backend() == "tensorflow":
            _convert(model, file, inputs, examples, **options)
        else:
            _convert_in_subprocess(model, file, inputs, examples, options)
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


def _check(model, path, quantize, representative_data, unroll, quantize_io):
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
    if quantize_io and quantize != "int8":
        raise ValueError(f"`quantize_io` needs `quantize='int8'`. Received: quantize={quantize!r}")
    if path.suffix != ".tflite":
        raise ValueError(f"`path` must end with .tflite. Received: path={str(path)!r}")
    for module, package in (("tensorflow", "tensorflow"), ("ai_edge_litert", "ai-edge-litert")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"The export to LiteRT needs {package}: run `pip install {package}`")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise OSError(f"cannot write into {str(path.parent)!r}: it is no writable folder")


def _recurrent(model):
    return any(isinstance(layer, keras.layers.RNN) for layer in model._flatten_layers())


def _input_specs(model, shapes):
    """The arguments of the model as the file is to have them: a list of nested `InputSpec`s.

    Each of them has a name: that which the user gave it, or `input_1` and so on.
    """
    if getattr(model, "inputs", None):
        tensors = model.inputs if isinstance(model, keras.Sequential) else [model.input]
        arguments = keras.tree.map_structure(
            lambda one: _spec(one.name, (one.shape[0] or 1, *one.shape[1:]), one.dtype), tensors
        )
    else:  # subclassed: it knows the shapes of its first call
        built = model.get_build_config() or {}
        known = [*(built.get("shapes_dict") or {"": built.get("input_shape")}).values()]
        if None in known:
            raise ValueError(
                "The shapes of the model's inputs must be known: call it on data first. "
                f"Received: model={model!r}"
            )
        arguments = keras.tree.map_shape_structure(
            lambda shape: _spec("", (1, *shape[1:]), "float32"), known
        )
    specs = [
        _spec(_UNNAMED.sub(f"input_{number}", one.name), one.shape, one.dtype)
        for number, one in enumerate(keras.tree.flatten(arguments), 1)
    ]
    if shapes is not None:
        specs = [_spec(one.name, _given_shape(one, specs, shapes), one.dtype) for one in specs]
    for one in specs:
        if not all(isinstance(size, int) and size > 0 for size in one.shape):
            raise ValueError(
                f"LiteRT files have inputs of fixed sizes: `input_shapes` must say those of "
                f"{one.name!r}. Received: shape={tuple(one.shape)}"
            )
    return keras.tree.pack_sequence_as(arguments, specs)


def _spec(name, shape, dtype):
    return keras.layers.InputSpec(shape=shape, dtype=dtype, name=re.sub(r"\W", "_", name))


def _given_shape(spec, specs, shapes):
    if not isinstance(shapes, Mapping):
        single = not shapes or not isinstance(shapes[0], Sequence)
        shapes = [shapes] if single else shapes
        if len(shapes) != len(specs):
            raise ValueError(
                f"`input_shapes` must have a shape for each of the {len(specs)} inputs. "
                f"Received: input_shapes={shapes}"
            )
        shapes = {one.name: shape for one, shape in zip(specs, shapes, strict=True)}
    unknown = shapes.keys() - {one.name for one in specs}
    if unknown:
        raise ValueError(
            f"`input_shapes` must be by the names of inputs: "
            f"{', '.join(one.name for one in specs)}. Received: {', '.join(sorted(unknown))}"
        )
    shape = tuple(shapes.get(spec.name, spec.shape))
    fits = len(shape) == len(spec.shape) and all(
        known in (None, size) for known, size in zip(spec.shape[1:], shape[1:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"`input_shapes` must fit the input {spec.name!r} of shape {tuple(spec.shape)}. "
            f"Received: {shape}"
        )
    return shape


def _examples(model, arguments, data):
    """For each input, by name, the values of some runs: `(runs, *shape)`."""
    specs = keras.tree.flatten(arguments)
    if data is None:
        return _random_examples(model, specs)
    parts, count = [], 0
    for batch in model_batches(data, "representative_data"):
        inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        if isinstance(inputs, Mapping) and {one.name for one in specs} <= inputs.keys():
            inputs = [inputs[one.name] for one in specs]
        leaves = [keras.ops.convert_to_numpy(leaf) for leaf in keras.tree.flatten(inputs)]
        parts.append(leaves)
        count += len(leaves[0])
        if count >= REPRESENTATIVE:
            break
    if len(parts[0]) != len(specs):
        raise ValueError(
            f"`representative_data` must have {len(specs)} inputs. Received: {len(parts[0])}"
        )
    examples = {}
    for spec, *leaves in zip(specs, *parts, strict=True):
        values = np.concatenate(leaves)[:REPRESENTATIVE]
        runs = len(values) // spec.shape[0]
        if values.shape[1:] != tuple(spec.shape[1:]) or not runs:
            raise ValueError(
                f"`representative_data` must fit the input {spec.name!r} of shape "
                f"{tuple(spec.shape)}. Received: an array of shape {values.shape}"
            )
        values = values[: runs * spec.shape[0]].reshape(runs, *spec.shape)
        examples[spec.name] = values.astype(spec.dtype)
    return examples


def _random_examples(model, specs):
    rng = np.random.default_rng(0)
    tables = [getattr(layer, "input_dim", None) for layer in model._flatten_layers()]
    rows = min((size for size in tables if isinstance(size, int)), default=2)

    def random(spec):
        shape = (COMPARED, *spec.shape)
        if "float" in spec.dtype:
            return rng.normal(size=shape).astype(spec.dtype)
        return rng.integers(0, 2 if spec.dtype == "bool" else rows, shape).astype(spec.dtype)

    return {one.name: random(one) for one in specs}


def _expected(model, arguments, examples):
    """For each output of the model its values, runs first."""
    runs = []
    for values in zip(*examples.values(), strict=True):
        inputs = keras.tree.pack_sequence_as(
            arguments, list(map(keras.ops.convert_to_tensor, values))
        )
        outputs = keras.tree.flatten(model(*inputs, training=False))
        runs.append([keras.ops.convert_to_numpy(one) for one in outputs])
    return [np.stack(values) for values in zip(*runs, strict=True)]


def _difference(outputs, expected):
    """Root mean square difference of all outputs, relative to the root mean square."""
    # They are numbered, or have the names of a dictionary, in its sorted order.
    numbered = all(re.fullmatch(r"output_\d+", name) for name in outputs)
    names = sorted(outputs, key=lambda name: int(name.split("_")[1]) if numbered else name)
    pairs = [
        (outputs[name].astype("float64"), values.astype("float64"))
        for name, values in zip(names, expected, strict=True)
    ]
    squares = sum(np.square(one - other).sum() for one, other in pairs)
    size = sum(np.square(other).sum() for _, other in pairs)
    return float(np.sqrt(squares / (size or 1.0)))


def inference_twin(model: keras.Model, unroll: bool = False) -> keras.Model:
    """A copy of the model, with its weights, as it is exported.

    It computes in float32. The model itself, if it does so and nothing is to be
    unrolled.

    Args:
        model: the model.
        unroll: whether recurrent layers are unrolled.

    Raises:
        ValueError: if the model cannot be saved and loaded.
    """
    unroll = unroll and _recurrent(model)
    layers = list(model._flatten_layers())
    if not unroll and all(layer.compute_dtype == "float32" for layer in layers):
        return model
    return copy_model(model, functools.partial(_for_inference, unroll=unroll))


def _for_inference(config, unroll):
    """Changes the configuration of a layer, in place."""
    if config.get("class_name") == "DTypePolicy" and config["config"]["name"] in _NOT_FLOAT32:
        config["config"]["name"] = "float32"
    if unroll and "unroll" in config:
        config["unroll"] = True


def _convert(model, file, arguments, examples, quantize, quantize_io):
    import tensorflow as tf

    # `keras.export.ExportArchive` would do, but some versions of it forget the batch size.
    specs = keras.tree.flatten(arguments)

    def serve(**tensors):
        inputs = keras.tree.pack_sequence_as(arguments, [tensors[one.name] for one in specs])
        with exporting():
            outputs = model(*inputs, training=False)
        if isinstance(outputs, dict):
            return outputs
        return {f"output_{i}": one for i, one in enumerate(keras.tree.flatten(outputs))}

    module = tf.Module()
    module.model, module.all_variables = model, [variable.value for variable in model.variables]
    try:
        with tempfile.TemporaryDirectory() as folder:
            function = tf.function(serve, autograph=False).get_concrete_function(
                **{one.name: tf.TensorSpec(one.shape, one.dtype, one.name) for one in specs}
            )
            tf.saved_model.save(module, folder, signatures=function)
            converter = tf.lite.TFLiteConverter.from_saved_model(folder)
            # Operations that LiteRT cannot run must not pass silently.
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
            converter.experimental_enable_resource_variables = True
            if quantize:
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if quantize == "float16":
                converter.target_spec.supported_types = [tf.float16]
            if quantize == "int8":
                converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
                converter.representative_dataset = lambda: _runs(examples)
            if quantize_io:
                converter.inference_input_type = converter.inference_output_type = tf.int8
            content = bytearray(converter.convert())
            if quantize == "int8":
                centre_tables(content)
            file.write_bytes(content)
    except Exception as error:  # the converter's own class has no public name
        raise ValueError(
            "The model cannot be exported with built-in LiteRT operations only: "
            f"{_reason(model, str(error))}"
        ) from error


def _runs(examples) -> Iterator[dict]:
    for values in zip(*examples.values(), strict=True):
        yield dict(zip(examples, values, strict=True))


def _reason(model, message):
    """The first error in what the converter says, with the layer that it is about."""
    errors = [line for line in message.strip().splitlines() if "error: " in line]
    line = (errors or message.strip().splitlines() or ["unknown error"])[0]
    reason = line.rsplit("): ", 1)[-1].rsplit("error: ", 1)[-1]
    place = re.search(r'"([^"]+)@__inference', line)
    if not place:
        return reason
    names = {layer.name: layer for layer in model._flatten_layers() if layer is not model}
    # TensorFlow numbers the scopes that it enters again.
    parts = [re.sub(r"_\d+$", "", part) for part in place[1].split("/")]
    parts = [*itertools.chain(*zip(place[1].split("/"), parts, strict=True))]
    found = [names[part] for part in parts if part in names]
    if not found:
        return reason
    return f"layer {found[-1].name!r} ({type(found[-1]).__name__}): {reason}"


def _convert_in_subprocess(model, file, arguments, examples, options):
    source, inputs = file.with_suffix(".keras"), file.with_suffix(".npz")
    model.save(source)
    np.savez(inputs, **examples)
    specs = keras.tree.flatten(arguments)
    order = {
        "shapes": [one.shape for one in specs],
        # Where the classes of the model are.
        "modules": sorted({one.__module__ for one in keras.saving.get_custom_objects().values()}),
        "options": options,
    }
    command = [sys.executable, "-m", __name__, *map(str, (source, file, inputs)), json.dumps(order)]
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("ValueError: "))


def _main(source, file, inputs, order):
    order = json.loads(order)
    for module in order["modules"]:
        if module != "__main__":
            importlib.import_module(module)
    model = keras.models.load_model(source, compile=False, safe_mode=False)
    with np.load(inputs) as arrays:
        examples = dict(arrays)
    arguments = _input_specs(model, order["shapes"])
    _convert(model, pathlib.Path(file), arguments, examples, **order["options"])


if __name__ == "__main__":
    _main(*sys.argv[1:])
