import ast
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys

import keras
import pytest

import keras_bilinear

SCRIPT = """
import json
import sys

import keras
import numpy

before = {*sys.modules}
import keras_bilinear

print(json.dumps([sorted(before), sorted({*sys.modules} - before)]))
"""
OPTIONAL = {
    "absl",
    "ai_edge_litert",
    "hypothesis",
    "matplotlib",
    "rich",
    "sklearn",
    "tensorflow_datasets",
}
BACKENDS = {"tensorflow", "jax", "torch"}
# Packages whose modules have another name.
PACKAGES = {"absl": "absl-py", "sklearn": "scikit-learn"}


def roots(modules):
    return {module.partition(".")[0] for module in modules}


@pytest.fixture(scope="module")
def imported():
    """Modules that Keras imports, and those that the package adds, in a fresh process."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    return [{*modules} for modules in json.loads(result.stdout.splitlines()[-1])]


def test_import_adds_only_the_package_itself(imported):
    _, added = imported
    assert "keras_bilinear.layers.dense" in added
    allowed = {"keras_bilinear", "keras", "numpy", *sys.stdlib_module_names}
    assert roots(added) <= allowed


def test_import_adds_no_optional_dependency_and_no_backend(imported):
    assert not roots(imported[1]) & (OPTIONAL | BACKENDS)


def test_command_line_is_not_imported(imported):
    names = {f"keras_bilinear.{name}" for name in ("cli", "errors", "__main__")}
    assert not names & imported[1]


def imported_packages(source):
    """The packages that a source imports, at once or in a function."""
    for node in ast.walk(ast.parse(source.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        own = {"keras_bilinear", "keras_bilinear_cli"}
        for module in roots(modules) - {*own, *sys.stdlib_module_names}:
            yield PACKAGES.get(module, module.replace("_", "-"))


def test_every_import_is_declared():
    declared = set()
    for requirement in importlib.metadata.requires("keras-bilinear"):
        # What documents and tests the package is not there for all users.
        if not re.search(r"extra == .(dev|docs|test)\b", requirement):
            declared.add(re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-"))
    sources = pathlib.Path(keras_bilinear.__file__).parent.rglob("*.py")
    found = {package for source in sources for package in imported_packages(source)}
    assert {"keras", "torch", "scikit-learn"} <= found
    assert found <= declared


def test_public_names():
    assert len({*keras_bilinear.__all__}) == len(keras_bilinear.__all__)
    for name in keras_bilinear.__all__:
        assert getattr(keras_bilinear, name) is not None
    layers = [v for v in vars(keras_bilinear).values() if isinstance(v, type)]
    for layer in layers:
        if issubclass(layer, keras.Layer) and layer is not keras_bilinear.BilinearLayer:
            assert layer.__name__ in keras_bilinear.__all__
            assert keras.saving.get_registered_name(layer) == f"keras_bilinear>{layer.__name__}"


def test_version():
    assert keras_bilinear.__version__ == importlib.metadata.version("keras-bilinear")


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="Keras itself imports it")
def test_other_backends_import_no_tensorflow(imported):
    assert "tensorflow" not in roots(imported[0] | imported[1])
