"""Loads `.h5` and `.hdf5` files of Keras 2 that Keras 3 refuses, with small repairs.

A file of a whole model has the model's configuration, as JSON, beside its weights. Keras 3 still
reads such files, but stops at a few arguments and names that it no longer knows.
`load_legacy_h5` copies the file, changes the configuration in the copy and loads the copy:

    model = load_legacy_h5(path, [drop_arguments("time_major"), integer_inputs])

A repair is a function that changes a configuration in place. The repairs here are all that the
models of `real_models.py` need:

- `drop_arguments`: a layer has an argument that Keras 3 removed.
- `replace_activation`: an activation was a function without a name, saved as `<lambda>`.
- `add_input_layer`: a Sequential model tells its input shape in its first layer only.
- `integer_inputs`: a model takes indices as floats, which an 8-bit file would round.

A file of weights alone needs no repair: build the model of stock layers with the names of the
file, and call `model.load_weights(path, by_name=True)`. `read_weights` gives the arrays where
they have to be changed first, and `lstm_of_cudnn` changes those of a `CuDNNLSTM`.
"""

import json
import pathlib
import shutil
import tempfile

import h5py
import keras
import numpy as np


def load_legacy_h5(path, repairs=(), custom_objects=None):
    """Loads a model of Keras 2 for inference, with repairs of its configuration.

    Args:
        path: an `.h5` or `.hdf5` file of a whole model. It is left as it is.
        repairs: functions that change the configuration of the model in place, a dictionary with
            `"class_name"` and `"config"`. They are called in this order.
        custom_objects: classes and functions by the names that the configuration has for them, as
            for `keras.models.load_model`.

    Returns:
        The model, not compiled.

    Raises:
        ValueError: if the file has weights only, or if Keras cannot load the repaired model.

    Example:

        leaky = keras.saving.register_keras_serializable()(lambda x: keras.ops.leaky_relu(x, 0.1))
        model = load_legacy_h5("model.hdf5", [replace_activation("<lambda>", leaky)])
    """
    path = pathlib.Path(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, path.with_suffix(".h5").name)
        shutil.copyfile(path, copy)
        with h5py.File(copy, "r+") as file:
            if "model_config" not in file.attrs:
                raise ValueError(
                    "The file has weights only: build the model and call `load_weights` with "
                    f"`by_name=True`. Received: path={str(path)!r}"
                )
            config = json.loads(file.attrs["model_config"])
            for repair in repairs:
                repair(config)
            file.attrs["model_config"] = json.dumps(config)
        return keras.models.load_model(copy, custom_objects, compile=False)


def layers_of(config):
    """The configurations of a model's layers, with those of models among them."""
    for layer in _layer_list(config):
        if isinstance(layer["config"], list) or "layers" in layer["config"]:
            yield from layers_of(layer)
        else:
            yield layer


def _layer_list(config):
    # Before Keras 2.2.3 the configuration of a Sequential model was the list of its layers.
    inner = config["config"]
    return inner if isinstance(inner, list) else inner["layers"]


def drop_arguments(*names):
    """A repair that drops arguments of layers, such as `time_major` of recurrent layers.

    Keras 3 reports an argument that it does not know, whatever its value. Drop only arguments
    that have no effect at the value that they have.
    """

    def repair(config):
        for layer in layers_of(config):
            for name in names:
                layer["config"].pop(name, None)

    return repair


def replace_activation(name, function):
    """A repair that replaces an activation, such as `<lambda>`, by a registered function.

    A model with an anonymous function as its activation has the name `<lambda>` in its file. With
    `custom_objects={"<lambda>": function}` alone Keras loads it once, but neither copies it nor
    loads it again after it was saved.

    Args:
        name: the name of the activation in the file.
        function: a function that is registered with `keras.saving.register_keras_serializable`.

    Raises:
        ValueError: if the function is not registered.
    """
    registered = keras.saving.get_registered_name(function)
    if keras.saving.get_registered_object(registered) is not function:
        raise ValueError(f"`function` must be registered. Received: function={function!r}")

    def repair(config):
        for layer in layers_of(config):
            for argument in ("activation", "recurrent_activation"):
                if layer["config"].get(argument) == name:
                    layer["config"][argument] = registered

    return repair


def add_input_layer(config):
    """A repair that puts an `InputLayer` in front of a Sequential model without one.

    Its first layer then has the input shape as an argument, `batch_input_shape`. Keras 3 builds no
    model from that, so that the weights of the file find no place.
    """
    layers = _layer_list(config)
    if config["class_name"] != "Sequential" or layers[0]["class_name"] == "InputLayer":
        return
    first = layers[0]["config"]
    inputs = {"batch_shape": first.pop("batch_input_shape"), "dtype": first.get("dtype")}
    layers.insert(0, {"class_name": "InputLayer", "config": {"name": "input", **inputs}})


def integer_inputs(config):
    """A repair that makes the inputs of a model int32, for a model that takes indices only.

    Keras 2 saved the inputs of an `Embedding` as float32. A file with 8-bit numbers stores such an
    input as one of 256 values, and so looks up the wrong rows of a larger table.
    """
    for layer in layers_of(config):
        if layer["class_name"] == "InputLayer":
            layer["config"]["dtype"] = "int32"


def read_weights(path):
    """The weights in a file of Keras 2: `{layer: [array, ...]}`, in the order of the layer."""
    with h5py.File(path) as file:
        group = file.get("model_weights", file)
        return {
            name: [np.array(layer[weight]) for weight in layer.attrs["weight_names"]]
            for name, layer in group.items()
            if "weight_names" in layer.attrs
        }


def lstm_of_cudnn(kernel, recurrent_kernel, bias):
    """Makes the weights of `keras.layers.LSTM` from those of a `CuDNNLSTM` of Keras 2.

    cuDNN reads the numbers of each gate as a matrix of shape `(units, inputs)`, which multiplies
    the inputs from the left. It also adds two biases, one for each kernel, where Keras has their
    sum.

    Args:
        kernel: an array of shape `(inputs, 4 * units)`.
        recurrent_kernel: an array of shape `(units, 4 * units)`.
        bias: an array of shape `(8 * units,)`.

    Returns:
        `[kernel, recurrent_kernel, bias]` with `bias` of shape `(4 * units,)`.
    """
    units = len(recurrent_kernel)

    def transposed(kernel):
        gates = np.split(kernel, 4, axis=1)
        return np.concatenate([gate.reshape(units, -1).T for gate in gates], axis=1)

    return [transposed(kernel), transposed(recurrent_kernel), bias.reshape(2, -1).sum(axis=0)]
