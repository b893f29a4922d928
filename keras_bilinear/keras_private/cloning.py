"""Copies models with their weights, the flags that freeze their layers, and their attributes.

Below Keras' public interface: a `.keras` file is a zip archive whose `config.json` holds the nested
configurations of all layers; and which attributes Keras sets after a layer is made. Keras 3.13 to
3.15.
"""

import contextlib
import json
import pathlib
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from absl import logging

from keras_bilinear.keras_private.graph import all_layers, sublayers
from keras_bilinear.keras_private.training import traced_functions

# Public attributes that nobody sets by hand: those of `compile` and `fit`, those that Keras sets
# where it loads a layer, those that any copy has anew, and those of owners of replaced layers.
_NOT_BY_HAND = {
    *("compiled", "history", "loss", "optimizer", "steps_per_execution", "stop_training"),
    *("is_awq_calibrated", "is_gptq_calibrated"),
    *("build", "built", "name", "quantize"),
    "replaced",
}
_KERAS_STATE = (
    keras.KerasTensor,
    keras.Layer,
    keras.Loss,
    keras.Metric,
    keras.Variable,
    keras.optimizers.Optimizer,
)


def copy_model(
    model: keras.Model, change: Callable[[dict[str, Any]], None] | None = None
) -> keras.Model:
    """Copies a model: configuration, weights, flags and attributes. The copy is not compiled.

    A layer that is frozen when it makes its variables may never train them, even after it is
    unfrozen. So the copy is made with all layers trainable, and gets its flags afterwards.

    Args:
        model: the model.
        change: called with each dictionary in the configuration of the model, from the outermost
            to the innermost. It may change the dictionary in place. `None` changes nothing.

    Raises:
        ValueError: if Keras cannot save or load the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "model.keras")
        try:
            model.save(file)
            if change is not None or not all(layer.trainable for layer in all_layers(model)):
                file = _changed(file, change)
            # Any code in the file comes from this process, so loading it is safe.
            copy: Any = keras.models.load_model(file, compile=False, safe_mode=False)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"The model {model.name!r} cannot be copied, as Keras cannot save and load it. "
                "Each class of your own needs a `get_config` and must be registered with "
                f"`keras.saving.register_keras_serializable`. {type(error).__name__}: {error}"
            ) from error
    copy_flags(model, copy)
    # What `change` has changed stays so.
    carry_over(model, copy, missing=change is not None)
    return copy


def copy_layer(layer: keras.Layer) -> keras.Layer:
    """A layer with the configuration of another layer, all of it trainable, without its weights."""
    config = keras.layers.serialize(layer)
    _visit(config, _unfreeze)
    return keras.layers.deserialize(config)


def copy_flags(source: keras.Layer, target: keras.Layer) -> None:
    """Makes a layer trainable where another layer is, in each layer in it and each variable.

    Args:
        source: the layer.
        target: a copy of it, in which some layers may be of other classes.
    """
    pairs = list(_pairs(source, target, set()))
    # A flag that is set reaches all layers in the layer, so those inside follow. A layer that
    # several layers share may need another round.
    for _ in pairs:
        different = [(a, b) for a, b in pairs if a.trainable != b.trainable]
        if not different:
            break
        for a, b in different:
            b.trainable = a.trainable
    for a, b in pairs:
        if type(a) is type(b):
            for variable, copy in zip(a._trainable_variables, b._trainable_variables, strict=False):
                copy.trainable = variable.trainable


def carry_over(source: keras.Layer, target: keras.Layer, missing: bool = False) -> None:
    """Gives a copy the attributes that were set by hand, in each layer, or warns of them.

    Args:
        source: the layer.
        target: a copy of it, made from its configuration.
        missing: see `carry_attributes`.
    """
    lost = {}
    for a, b in _pairs(source, target, set()):
        if names := carry_attributes(a, b, missing):
            lost[a.name] = names
    if lost:
        logging.warning(
            "Attributes that were set by hand are missing in the copy of %r, as only plain values "
            "and objects with a configuration can be copied. Set them again: %s",
            source.name,
            "; ".join(f"{', '.join(names)} of {name!r}" for name, names in lost.items()),
        )


def carry_attributes(source: keras.Layer, target: keras.Layer, missing: bool = False) -> list[str]:
    """Gives a copy of a layer the public attributes that its configuration does not have.

    They are plain values (numbers, texts, arrays, and lists, tuples, sets and dictionaries of
    them), and objects of other packages that Keras can save, such as the sampler of a model of
    KerasHub.

    Args:
        source: the layer.
        target: a copy of it.
        missing: whether only attributes that the copy lacks count, and not those that differ.

    Returns:
        The names of the attributes that cannot be copied.
    """
    lost = []
    added = by_hand(source, target)
    present = {} if missing else vars(target)
    for name, value in added.items():
        try:
            setattr(target, name, _copied(value))
        except Exception:  # whatever objects of the user raise
            lost.append(name)
    for name in public_names(source) & present.keys():
        with contextlib.suppress(Exception):
            value = vars(source)[name]
            copy = _copied(value)
            if _text(copy) != _text(_copied(present[name])) and not _names_a_layer(copy, source):
                setattr(target, name, copy)
    return lost


def by_hand(layer: keras.Layer, fresh: keras.Layer) -> dict[str, Any]:
    """The public attributes of a layer that a fresh one of the same configuration lacks."""
    names = public_names(layer) - vars(fresh).keys()
    return {name: value for name, value in vars(layer).items() if name in names}


def public_names(layer: keras.Layer) -> set[str]:
    """The names of the attributes of a layer that Keras does not care for itself."""
    own = {*_NOT_BY_HAND, *traced_functions(layer)}
    return {name for name in vars(layer) if not name.startswith("_") and name not in own}


def _copied(value):
    """A copy of a plain value, or of an object that Keras can save.

    Raises:
        TypeError: if the value is neither.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        return value
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    for kind in (list, tuple, set, frozenset):
        # Keras tracks lists and sets as classes of its own.
        if isinstance(value, kind):
            return kind(map(_copied, value))
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, _KERAS_STATE) or package == "keras" or not hasattr(value, "get_config"):
        raise TypeError(f"{value!r} cannot be copied")
    return keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(value))


def _text(value):
    """Bytes that differ for copies of values that differ."""
    if hasattr(value, "get_config"):
        value = type(value), value.get_config()
    return pickle.dumps(value)


def _names_a_layer(value, source):
    """Whether a value has the name of a layer in it, which may be another one in a copy."""
    names = {layer.name for layer in all_layers(source)}
    leaves = keras.tree.flatten(value)
    return any(isinstance(leaf, str) and leaf in names for leaf in leaves)


def _pairs(source, target, seen):
    """Each layer in a layer with its copy, from the outermost to the innermost."""
    if (id(source), id(target)) not in seen:
        seen.add((id(source), id(target)))
        yield source, target
        for a, b in zip(sublayers(source), sublayers(target), strict=False):
            yield from _pairs(a, b, seen)


def _unfreeze(value):
    """Makes a configuration that belongs to a layer the one of a trainable layer."""
    if value.get("trainable") is False and "name" in value:
        value["trainable"] = True


def _visit(value, change):
    """Calls a function with each dictionary in a configuration, from the outside in."""
    if isinstance(value, dict):
        change(value)
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            _visit(item, change)


def _changed(file, change):
    """Writes a copy of a `.keras` file, unfrozen and then changed; returns its path."""
    changed = file.with_name("changed.keras")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "config.json":
                config = json.loads(content)
                _visit(config, _unfreeze)
                if change is not None:
                    _visit(config, change)
                content = json.dumps(config)
            target.writestr(name, content)
    return changed
