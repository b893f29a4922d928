"""The inputs of a LiteRT file, and examples of their values."""

import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_bilinear.data import is_one_for_each_input, model_batches, shape_of
from keras_bilinear.keras_private.graph import all_layers

# The most given examples that are used, and how many are drawn if none are given.
MOST, DRAWN = 256, 8
# Names that Keras makes up for inputs, by numbers that count up in each process.
_UNNAMED = re.compile(r"^((keras_tensor|input_layer)(_\d+)?)?$")


def input_specs(model: keras.Model, shapes: Sequence | Mapping | None) -> list:
    """Describes the arguments of a model's call in a LiteRT file.

    Args:
        model: a built model.
        shapes: the argument `input_shapes` of `export_litert`: a tuple for a single input, a list
            of tuples, or a dictionary of tuples by the names of the inputs, each with the batch
            size. `None` takes the shapes that the model knows and a batch size of 1.

    Returns:
        The positional arguments of the call, each a `keras.layers.InputSpec` or nested
        `InputSpec`s. Each `InputSpec` has the name that the user gave to the input, or
        `input_1`, `input_2` and so on.

    Raises:
        ValueError: if a size is unknown, if `shapes` do not fit the model, or if an input takes
            strings.
    """
    arguments = _known_arguments(model)
    specs = keras.tree.flatten(arguments)
    names = _argument_names(
        _UNNAMED.sub(f"input_{number}", spec.name) for number, spec in enumerate(specs, 1)
    )
    specs = [_spec(name, spec.shape, spec.dtype) for name, spec in zip(names, specs, strict=True)]
    if shapes is not None:
        by_name = _shapes_by_name(shapes, [spec.name for spec in specs])
        specs = [_spec(spec.name, _given_shape(spec, by_name), spec.dtype) for spec in specs]
    for spec in specs:
        if not all(isinstance(size, int) and size > 0 for size in spec.shape):
            raise ValueError(
                "LiteRT files have inputs of fixed sizes: `input_shapes` must say the sizes of "
                f"{spec.name!r}. Received: shape={tuple(spec.shape)}"
            )
        if spec.dtype == "string":
            raise ValueError(
                "LiteRT files take numbers: give `export_litert` the part of the model behind "
                f"its layer for texts. Received: strings as the input {spec.name!r}"
            )
    return keras.tree.pack_sequence_as(arguments, specs)


def _known_arguments(model):
    """The arguments of a model's call, with the shapes that the model knows."""
    if getattr(model, "inputs", None):
        tensors = model.inputs if isinstance(model, keras.Sequential) else [model.input]
        return keras.tree.map_structure(
            lambda tensor: _spec(
                tensor.name, (tensor.shape[0] or 1, *tensor.shape[1:]), tensor.dtype
            ),
            tensors,
        )
    # A subclassed model knows the shapes of its first call.
    built = model.get_build_config() or {}
    known = [*(built.get("shapes_dict") or {"": built.get("input_shape")}).values()]
    if None in known:
        raise ValueError(
            "The shapes of the model's inputs must be known: call it on data first. "
            f"Received: model={model!r}"
        )
    return keras.tree.map_shape_structure(
        lambda shape: _spec("", (1, *shape[1:]), "float32"), known
    )


def _spec(name, shape, dtype):
    return keras.layers.InputSpec(shape=shape, dtype=dtype, name=name)


def _argument_names(names: Iterable[str]) -> list[str]:
    """Different names that arguments of a function can have; valid names stay."""
    found: list[str] = []
    for name in names:
        name = re.sub(r"[^0-9A-Za-z_]", "_", name)
        if not name.isidentifier() or keyword.iskeyword(name) or name == "self":
            name = f"input_{name}"
        count, different = 1, name
        while different in found:
            count += 1
            different = f"{name}_{count}"
        found.append(different)
    return found


def _shapes_by_name(shapes, names):
    """`input_shapes` as a dictionary by the names of inputs."""
    if not isinstance(shapes, Mapping):
        single = not shapes or not isinstance(shapes[0], Sequence)
        shapes = [shapes] if single else shapes
        if len(shapes) != len(names):
            raise ValueError(
                f"`input_shapes` must have a shape for each of the {len(names)} inputs. "
                f"Received: input_shapes={shapes}"
            )
        shapes = dict(zip(names, shapes, strict=True))
    unknown = shapes.keys() - {*names}
    if unknown:
        raise ValueError(
            f"`input_shapes` must be by the names of inputs: {', '.join(names)}. "
            f"Received: {', '.join(sorted(unknown))}"
        )
    return shapes


def _given_shape(spec, shapes):
    """The shape that `shapes` give to an input; the known shape if they give none."""
    shape = tuple(shapes.get(spec.name, spec.shape))
    fits = len(shape) == len(spec.shape) and all(
        known in (None, size) for known, size in zip(spec.shape[1:], shape[1:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"`input_shapes` must fit the input {spec.name!r} of shape {tuple(spec.shape)}. "
            f"Received: shape={shape}"
        )
    return shape


def read_examples(
    model: keras.Model,
    arguments: list,
    data: Any,
    name: str = "representative_data",
    most: int = MOST,
) -> dict[str, np.ndarray]:
    """The values of each input in some runs of a file.

    Args:
        model: the model.
        arguments: the nested specs of the model's arguments, as `input_specs` gives them.
        data: inputs of the model: an array, a dictionary of arrays, a list with an array for each
            of several inputs, or an iterable of batches. Of arrays with more than `most`
            examples, some that lie anywhere in them are read; of batches the first. `None` draws
            random inputs.
        name: name of the argument that holds `data`, for error texts.
        most: how many examples are read at most.

    Returns:
        By the name of each input, an array of shape `(runs, *shape)`, where `shape` is that of
        the input in the file.

    Raises:
        TypeError: if `data` is of another type.
        ValueError: if the data do not fit the model.
    """
    specs = keras.tree.flatten(arguments)
    if data is None:
        return _random_examples(model, specs)
    batches = _read_batches(model, specs, _draw(model, data, most), name, most)
    if len(batches[0]) != len(specs):
        raise ValueError(f"`{name}` must have {len(specs)} inputs. Received: {len(batches[0])}")
    examples = {}
    for spec, *parts in zip(specs, *batches, strict=True):
        values = np.concatenate(parts)[:most]
        runs = len(values) // spec.shape[0]
        if values.shape[1:] != tuple(spec.shape[1:]) or not runs:
            raise ValueError(
                f"`{name}` must fit the input {spec.name!r} of shape "
                f"{tuple(spec.shape)}. Received: an array of shape {values.shape}"
            )
        values = values[: runs * spec.shape[0]].reshape(runs, *spec.shape)
        examples[spec.name] = values.astype(spec.dtype)
    return examples


def _draw(model, data, most):
    """Some examples of arrays that hold more than `most`, always the same; batches as they are.

    Arrays may be in an order, such as that of their labels.
    """
    if isinstance(data, tuple) and data:
        data, *_ = data
    if hasattr(data, "shape"):
        arrays = [data]
    elif isinstance(data, Mapping):
        arrays = [*data.values()]
    elif is_one_for_each_input(data, model):
        arrays = data
    else:
        return data
    lengths = {shape_of(values)[:1] for values in arrays}
    length, *_ = *lengths.pop(), 0
    if lengths or length <= most:  # Arrays that differ in length are refused elsewhere.
        return data
    chosen = np.sort(np.random.default_rng(0).choice(length, most, replace=False))
    return keras.tree.map_structure(
        # Not every kind of array takes an array of indices.
        lambda values: np.stack([keras.ops.convert_to_numpy(values[index]) for index in chosen]),
        data,
    )


def _read_batches(model, specs, data, name, most) -> list[list[np.ndarray]]:
    """For each batch, until there are enough examples, a list with an array for each input."""
    batches, count = [], 0
    for batch in model_batches(data, model, name):
        inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        if isinstance(inputs, Mapping) and {spec.name for spec in specs} <= inputs.keys():
            inputs = [inputs[spec.name] for spec in specs]
        arrays = [
            np.asarray(keras.ops.convert_to_numpy(array)) for array in keras.tree.flatten(inputs)
        ]
        batches.append(arrays)
        count += len(arrays[0])
        if count >= most:
            break
    return batches


def _random_examples(model, specs):
    """Random values: normal floats, and integers that are valid in the model's tables."""
    rng = np.random.default_rng(0)
    tables = [getattr(layer, "input_dim", None) for layer in all_layers(model)]
    rows = min((size for size in tables if isinstance(size, int)), default=2)

    def random(spec):
        shape = (DRAWN, *spec.shape)
        if "float" in spec.dtype:
            return rng.normal(size=shape).astype(spec.dtype)
        return rng.integers(0, 2 if spec.dtype == "bool" else rows, shape).astype(spec.dtype)

    return {spec.name: random(spec) for spec in specs}
