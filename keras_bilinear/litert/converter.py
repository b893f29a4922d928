"""Converts a model into a LiteRT file with TensorFlow's converter.

The converter runs in this process, or, if Keras runs on another backend, in a second Python process
with TensorFlow. That process runs this module as a script.
"""

import importlib
import itertools
import json
import operator
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_bilinear.keras_private.graph import all_layers
from keras_bilinear.kronecker.target import exporting
from keras_bilinear.litert.inputs import input_specs
from keras_bilinear.litert.symmetric_tables import centre_tables
from keras_bilinear.messages import reason


def convert(
    model: keras.Model,
    file: pathlib.Path,
    arguments: list,
    examples: dict[str, np.ndarray],
    quantize: str | None,
    quantize_io: bool,
) -> None:
    """Writes a model as a LiteRT file of built-in operations.

    Args:
        model: a model that computes in float32.
        file: the file to write.
        arguments: the nested specs of the model's arguments, as `input_specs` gives them.
        examples: for each input, by name, the values of some runs, as `read_examples` gives them.
            Only `"int8"` uses them.
        quantize: `None`, `"float16"`, `"dynamic_int8"` or `"int8"`.
        quantize_io: whether the inputs and outputs of an `"int8"` file are integers.

    Raises:
        ValueError: if LiteRT has no built-in operation for a part of the model.
    """
    options = {"quantize": quantize, "quantize_io": quantize_io}
    if keras.config.backend() == "tensorflow":
        _convert(model, file, arguments, examples, **options)
    else:
        _convert_in_subprocess(model, file, arguments, examples, options)


def _convert(model, file, arguments, examples, quantize, quantize_io):
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save_traced(model, arguments, folder, integers=quantize == "int8")
            content = bytearray(_converter(folder, examples, quantize, quantize_io).convert())
            if quantize == "int8":
                centre_tables(content)
            file.write_bytes(content)
    except Exception as error:  # the converter's own class has no public name
        raise ValueError(
            "The model cannot be exported with built-in LiteRT operations only: "
            f"{_reason(model, str(error))}"
        ) from error


def _save_traced(model, arguments, folder, integers):
    """Traces an inference call of a model and writes it as a SavedModel."""
    import tensorflow as tf

    # `keras.export.ExportArchive` would do, but some versions of it forget the batch size.
    specs = keras.tree.flatten(arguments)

    def serve(**tensors):
        inputs = keras.tree.pack_sequence_as(arguments, [tensors[spec.name] for spec in specs])
        with exporting(integers=integers):
            return named_outputs(model(*inputs, training=False))

    function = tf.function(serve, autograph=False).get_concrete_function(
        **{spec.name: tf.TensorSpec(spec.shape, spec.dtype, spec.name) for spec in specs}
    )
    module: Any = tf.Module()
    # A SavedModel holds the variables that an attribute of the module leads to.
    module.model, module.all_variables = model, [variable.value for variable in model.variables]
    tf.saved_model.save(module, folder, signatures=function)


def _converter(folder, examples, quantize, quantize_io):
    """The converter of the SavedModel in a folder."""
    import tensorflow as tf

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
    return converter


def named_outputs(outputs: Any) -> dict[str, Any]:
    """The outputs of a model by their names in a file.

    Args:
        outputs: the outputs of a call of the model: a tensor, or nested tensors.

    Returns:
        A flat dictionary of outputs as it is; other outputs as `output_0`, `output_1` and so on.
    """
    if isinstance(outputs, dict) and not any(map(keras.tree.is_nested, outputs.values())):
        return outputs
    return {f"output_{i}": output for i, output in enumerate(keras.tree.flatten(outputs))}


def _runs(examples) -> Iterator[dict]:
    """For each run, the value of each input by its name."""
    for values in zip(*examples.values(), strict=True):
        yield dict(zip(examples, values, strict=True))


def _reason(model, message):
    """The first error in the converter's message, with the layer where it occurred."""
    lines = message.strip().splitlines()
    if message.lstrip().startswith("in user code:"):  # a traceback, and then its error
        return reason(message.rsplit("Error: ", 1)[-1])
    line = ([line for line in lines if "error: " in line] or lines or ["unknown error"])[0]
    text = line.rsplit("): ", 1)[-1].rsplit("error: ", 1)[-1]
    place = re.search(r'"([^"]+)@__inference', line)
    if not place:
        return text
    layers = {layer.name: layer for layer in all_layers(model) if layer is not model}
    # TensorFlow numbers the scopes that it enters again.
    scopes = [(scope, re.sub(r"_\d+$", "", scope)) for scope in place[1].split("/")]
    found = [layers[name] for name in itertools.chain(*scopes) if name in layers]
    if not found:
        return text
    return f"layer {found[-1].name!r} ({type(found[-1]).__name__}): {text}"


def _convert_in_subprocess(model, file, arguments, examples, options):
    source, inputs = file.with_suffix(".keras"), file.with_suffix(".npz")
    model.save(source)
    np.savez(inputs, **{f"input:{name}": values for name, values in examples.items()})
    order = {
        "shapes": [spec.shape for spec in keras.tree.flatten(arguments)],
        # Where the classes and functions of the model are defined.
        "custom_objects": {
            name: (custom_object.__module__, custom_object.__qualname__)
            for name, custom_object in keras.saving.get_custom_objects().items()
        },
        "options": options,
    }
    command = [sys.executable, "-m", __name__, *map(str, (source, file, inputs)), json.dumps(order)]
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("ValueError: "))


def _main(source, file, inputs, order):
    """Converts what `_convert_in_subprocess` wrote, in the second process."""
    order = json.loads(order)
    custom_objects = keras.saving.get_custom_objects()
    for name, (module, qualified_name) in order["custom_objects"].items():
        if module != "__main__":
            defining = importlib.import_module(module)
            if name not in custom_objects and "<locals>" not in qualified_name:
                custom_objects[name] = operator.attrgetter(qualified_name)(defining)
    model: Any = keras.models.load_model(source, compile=False, safe_mode=False)
    with np.load(inputs) as arrays:
        examples = {name.removeprefix("input:"): values for name, values in arrays.items()}
    arguments = input_specs(model, order["shapes"])
    _convert(model, pathlib.Path(file), arguments, examples, **order["options"])


if __name__ == "__main__":
    _main(*sys.argv[1:])
