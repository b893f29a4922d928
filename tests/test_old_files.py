"""Files that version 0.1.0 saved before its modules moved load, and compute the same.

`files/version_0.keras` has a layer of every kind that existed then,
`files/version_0_attention.keras` a layer of Keras in which layers were replaced,
`files/version_0_plan.json` a plan of recurrent and dense kernels. The outputs beside them were
computed by that version.
"""

import pathlib

import keras
import numpy as np
import pytest

from keras_bilinear import RewritePlan, expand_model, rewrite_model

SAVED_BY = (3, 15)  # Keras loads no files of a later version
version = tuple(int(part) for part in keras.__version__.split(".")[:2])
of_later_keras = pytest.mark.skipif(version < SAVED_BY, reason="the files are of a later Keras")

FILES = pathlib.Path(__file__).parent / "files"


@pytest.fixture(scope="module")
def arrays():
    return dict(np.load(FILES / "version_0.npz"))


def outputs(model, inputs):
    return keras.ops.convert_to_numpy(model(inputs))


@of_later_keras
def test_layers_of_every_kind_load(arrays):
    model = keras.models.load_model(FILES / "version_0.keras")
    inputs = {name: arrays[name] for name in ("numbers", "tokens", "images")}
    np.testing.assert_allclose(outputs(model, inputs), arrays["outputs"], rtol=1e-4, atol=1e-5)
    expanded = expand_model(model)
    np.testing.assert_allclose(outputs(expanded, inputs), arrays["outputs"], rtol=1e-4, atol=1e-4)


@of_later_keras
def test_replaced_layers_load(arrays):
    model = keras.models.load_model(FILES / "version_0_attention.keras")
    actual = outputs(model, arrays["sequences"])
    np.testing.assert_allclose(actual, arrays["attention"], rtol=1e-4, atol=1e-5)


def test_plans_load():
    plan = RewritePlan.from_json((FILES / "version_0_plan.json").read_text())
    layers = [keras.layers.LSTM(16, name="lstm"), keras.layers.Dense(32, name="dense")]
    model = keras.Sequential([keras.Input((5, 8)), *layers])
    small = rewrite_model(model, plan)
    assert small.count_params() == plan.parameters < model.count_params()
