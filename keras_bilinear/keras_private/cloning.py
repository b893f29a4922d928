"""Copies models with their weights.

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


def copy_model(
    model: keras.Model, change: Callable[[dict[str, Any]], None] | None = None
) -> keras.Model:
    """Copies a model, with its configuration and weights. The copy is not compiled.

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
            if change is not None:
                file = _changed(file, change)
            # Any code in the file comes from this process, so loading it is safe.
            copy: Any = keras.models.load_model(file, compile=False, safe_mode=False)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"The model {model.name!r} cannot be copied, as Keras cannot save and load it. "
                "Each class of your own needs a `get_config` and must be registered with "
                f"`keras.saving.register_keras_serializable`. {type(error).__name__}: {error}"
            ) from error
    return copy


def _changed(file, change):
    """Writes a copy of a `.keras` file with a changed configuration; returns its path."""

    def visit(value):
        if isinstance(value, dict):
            change(value)
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, dict | list):
                visit(item)

    changed = file.with_name("changed.keras")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "config.json":
                config = json.loads(content)
                visit(config)
                content = json.dumps(config)
            target.writestr(name, content)
    return changed
