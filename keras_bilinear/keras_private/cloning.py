"""Models copied with their weights."""

import json
import pathlib
import tempfile
import zipfile
from collections.abc import Callable

import keras


def copy_model(model: keras.Model, change: Callable | None = None) -> keras.Model:
    """A model of its own with the same configuration and weights, not compiled.

    Args:
        model: the model.
        change: a function that is called with each dictionary in the
            configuration, and may change it; `None` changes nothing.

    Raises:
        ValueError: if the model cannot be saved and loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "model.keras")
        try:
            model.save(file)
            if change is not None:
                file = _changed(file, change)
            # Whatever code there is in it is in this process already.
            return keras.models.load_model(file, compile=False, safe_mode=False)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"The model {model.name!r} cannot be copied, as Keras cannot save and load it. "
                "Has each class of its own a `get_config`, and is it registered with "
                f"`keras.saving.register_keras_serializable`? {type(error).__name__}: {error}"
            ) from error


def _changed(file, change):
    """A `.keras` file beside another one, with a changed configuration."""

    def visit(value):
        if isinstance(value, dict):
            change(value)
        for one in value.values() if isinstance(value, dict) else value:
            if isinstance(one, dict | list):
                visit(one)

    new = file.with_name("changed.keras")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(new, "w") as archive:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                visit(config)
                content = json.dumps(config)
            archive.writestr(name, content)
    return new
