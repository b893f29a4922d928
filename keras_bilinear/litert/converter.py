"""TensorFlow's converter to LiteRT files, in this process or in one of its own.

Where Keras runs on another backend, a second Python process with TensorFlow converts
the model; running this module as a script is that process.
"""

import importlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

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
        model: the model, which computes in float32.
        file: the file to write.
        arguments: what `input_specs` says of the model.
        examples: what `read_examples` has for them.
        quantize: as of `export_litert`, and
        quantize_io: likewise.

    Raises:
        ValueError: if LiteRT has no built-in operation for a part of the model.
    """
    options = {"quantize": quantize, "quantize_io": quantize_io}
    if keras.config.backend() == "tensorflow":
        _convert(model, file, arguments, examples, **options)
    else:
        _convert_in_subprocess(model, file, arguments, examples, options)


def _convert(model, file, arguments, examples, quantize, quantize_io):
    import tensorflow as tf

    # `keras.export.ExportArchive` would do, but some versions of it forget the batch size.
    specs = keras.tree.flatten(arguments)

    def serve(**tensors):
        inputs = keras.tree.pack_sequence_as(arguments, [tensors[one.name] for one in specs])
        with exporting(integers=quantize == "int8"):
            return named_outputs(model(*inputs, training=False))

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


def named_outputs(outputs) -> dict:
    """The outputs of a model by the names that they have in a file."""
    if isinstance(outputs, dict) and not any(map(keras.tree.is_nested, outputs.values())):
        return outputs
    return {f"output_{i}": one for i, one in enumerate(keras.tree.flatten(outputs))}


def _runs(examples) -> Iterator[dict]:
    for values in zip(*examples.values(), strict=True):
        yield dict(zip(examples, values, strict=True))


def _reason(model, message):
    """The first error in what the converter says, with the layer that it is about."""
    lines = message.strip().splitlines()
    if message.lstrip().startswith("in user code:"):  # a traceback, and then what it is about
        return reason(message.rsplit("Error: ", 1)[-1])
    line = ([line for line in lines if "error: " in line] or lines or ["unknown error"])[0]
    said = line.rsplit("): ", 1)[-1].rsplit("error: ", 1)[-1]
    place = re.search(r'"([^"]+)@__inference', line)
    if not place:
        return said
    names = {layer.name: layer for layer in all_layers(model) if layer is not model}
    # TensorFlow numbers the scopes that it enters again.
    parts = [re.sub(r"_\d+$", "", part) for part in place[1].split("/")]
    parts = [*itertools.chain(*zip(place[1].split("/"), parts, strict=True))]
    found = [names[part] for part in parts if part in names]
    if not found:
        return said
    return f"layer {found[-1].name!r} ({type(found[-1]).__name__}): {said}"


def _convert_in_subprocess(model, file, arguments, examples, options):
    source, inputs = file.with_suffix(".keras"), file.with_suffix(".npz")
    model.save(source)
    np.savez(inputs, **{f"input:{name}": values for name, values in examples.items()})
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
        "CUDA_VISIBLE_DEVICES": "",
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
        examples = {name.removeprefix("input:"): values for name, values in arrays.items()}
    arguments = input_specs(model, order["shapes"])
    _convert(model, pathlib.Path(file), arguments, examples, **order["options"])


if __name__ == "__main__":
    _main(*sys.argv[1:])
