"""Copies models with their weights, and with the flags that freeze their layers.

Below Keras' public interface: a `.keras` file is a zip archive whose `config.json` holds the nested
configurations of all layers. Keras 3.13 to 3.15.
"""

import json
import pathlib
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

import keras

from keras_bilinear.keras_private.graph import all_layers, sublayers


def copy_model(
    model: keras.Model, change: Callable[[dict[str, Any]], None] | None = None
) -> keras.Model:
    """Copies a model, with its configuration, weights and flags. The copy is not compiled.

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
