import doctest
import importlib
import pathlib
import pkgutil
import re

import keras
import numpy as np
import pytest

import keras_bilinear

MODULES = [
    module.name
    for module in pkgutil.walk_packages(keras_bilinear.__path__, "keras_bilinear.")
    if not module.name.endswith("__main__")
]


def examples(module):
    names = {"keras": keras, "np": np, "keras_bilinear": keras_bilinear, **vars(keras_bilinear)}
    found = doctest.DocTestFinder().find(module, extraglobs={**names, **vars(module)})
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    failures = []
    for test in examples(importlib.import_module(name)):
        runner.run(test, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("name", [n for n in keras_bilinear.__all__ if n.startswith("Bilinear")])
def test_every_layer_has_an_example(name):
    module = importlib.import_module(getattr(keras_bilinear, name).__module__)
    assert any(test.name.endswith(f".{name}") for test in examples(module))


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="the layers are tested on this backend; this takes a minute",
)
def test_examples_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = pathlib.Path(__file__).parents[1] / "README.md"
    names = {}
    for example in re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL):
        exec(example, names)
    assert names["logits"].shape == (1, 3, 20_000)
