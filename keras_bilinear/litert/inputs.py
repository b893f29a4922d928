"""The inputs that a LiteRT file has, and examples of them."""

import keyword
import re
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from keras_bilinear.data import model_batches
from keras_bilinear.keras_private.graph import all_layers

# Most examples that count, and how many are drawn where none are given.
MOST, DRAWN = 256, 8
# Names of inputs that Keras counts up in each process.
_UNNAMED = re.compile(r"^((keras_tensor|input_layer)(_\d+)?)?$")


def input_specs(model: keras.Model, shapes: Sequence | Mapping | None) -> list:
    """The arguments of a model as the file is to have them: a list of nested `InputSpec`s.

    Each of them has a name: that which the user gave it, or `input_1` and so on.

    Args:
        model: a built model.
        shapes: `input_shapes` of `export_litert`.

    Raises:
        ValueError: if a size is not known, `shapes` do not fit the model, or an
            input is one of strings.
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
    specs = keras.tree.flatten(arguments)
    names = _argument_names(
        _UNNAMED.sub(f"input_{number}", one.name) for number, one in enumerate(specs, 1)
    )
    specs = [_spec(name, one.shape, one.dtype) for name, one in zip(names, specs, strict=True)]
    if shapes is not None:
        specs = [_spec(one.name, _given_shape(one, specs, shapes), one.dtype) for one in specs]
    for one in specs:
        if not all(isinstance(size, int) and size > 0 for size in one.shape):
            raise ValueError(
                f"LiteRT files have inputs of fixed sizes: `input_shapes` must say those of "
                f"{one.name!r}. Received: shape={tuple(one.shape)}"
            )
        if one.dtype == "string":
            raise ValueError(
                "LiteRT files take numbers: give `export_litert` the part of the model behind "
                f"its layer for texts. Received: strings as the input {one.name!r}"
            )
    return keras.tree.pack_sequence_as(arguments, specs)


def _spec(name, shape, dtype):
    return keras.layers.InputSpec(shape=shape, dtype=dtype, name=name)


def _argument_names(names):
    """Names that arguments of a function can have, each another; as they are where that goes."""
    found = []
    for name in names:
        name = re.sub(r"[^0-9A-Za-z_]", "_", name)
        if not name.isidentifier() or keyword.iskeyword(name) or name == "self":
            name = f"input_{name}"
        count, again = 1, name
        while again in found:
            count += 1
            again = f"{name}_{count}"
        found.append(again)
    return found


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


def read_examples(model: keras.Model, arguments: list, data) -> dict[str, np.ndarray]:
    """For each input, by name, the values of some runs: `(runs, *shape)`.

    Args:
        model: the model.
        arguments: what `input_specs` says of it.
        data: `representative_data` of `export_litert`; `None` draws some.

    Raises:
        ValueError: if the data do not fit the model.
        TypeError: if they are none.
    """
    specs = keras.tree.flatten(arguments)
    if data is None:
        return _random_examples(model, specs)
    parts, count = [], 0
    for batch in model_batches(data, model, "representative_data"):
        inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        if isinstance(inputs, Mapping) and {one.name for one in specs} <= inputs.keys():
            inputs = [inputs[one.name] for one in specs]
        leaves = [keras.ops.convert_to_numpy(leaf) for leaf in keras.tree.flatten(inputs)]
        parts.append(leaves)
        count += len(leaves[0])
        if count >= MOST:
            break
    if len(parts[0]) != len(specs):
        raise ValueError(
            f"`representative_data` must have {len(specs)} inputs. Received: {len(parts[0])}"
        )
    examples = {}
    for spec, *leaves in zip(specs, *parts, strict=True):
        values = np.concatenate(leaves)[:MOST]
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
    tables = [getattr(layer, "input_dim", None) for layer in all_layers(model)]
    rows = min((size for size in tables if isinstance(size, int)), default=2)

    def random(spec):
        shape = (DRAWN, *spec.shape)
        if "float" in spec.dtype:
            return rng.normal(size=shape).astype(spec.dtype)
        return rng.integers(0, 2 if spec.dtype == "bool" else rows, shape).astype(spec.dtype)

    return {one.name: random(one) for one in specs}
