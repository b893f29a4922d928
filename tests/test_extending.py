"""The guide on layers of one's own: its code runs, and its layer takes part everywhere."""

import pathlib
import re
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from keras_bilinear import (
    BilinearDense,
    BilinearRewrite,
    RewritePlan,
    Rewriter,
    compare,
    expand_model,
    export_litert,
    plan_rewrite,
    register,
    rewrite_model,
    summarize,
)
from keras_bilinear.layers.converter import Converter, full_converter

GUIDE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"
FULL, BILINEAR, USE = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
X = np.random.default_rng(0).normal(size=(200, 36)).astype("float32")
X *= np.linspace(0.05, 2, 36, dtype="float32")  # inputs that a fit can learn something from


@pytest.fixture(scope="module")
def guide():
    names = {}
    for code in (FULL, BILINEAR, USE):
        exec(code, names)
    return SimpleNamespace(**names)


@pytest.fixture
def model(guide):
    model = keras.Sequential([keras.Input((36,)), guide.GLU(48, name="glu"), keras.layers.Dense(2)])
    model.compile("adam", "mse", jit_compile=False)
    return model


def outputs(model):
    return keras.ops.convert_to_numpy(model(X))


def test_the_layer_fits_into_few_lines():
    assert len(BILINEAR.splitlines()) < 60


def test_the_guide_prints_what_it_says(guide):
    assert f"# {guide.small.layers[0]!r}".startswith("# <BilinearGLU name=glu")
    assert guide.small.count_params() <= 0.2 * guide.model.count_params()
    assert type(guide.full.layers[0]) is guide.GLU


def test_plans_rewrites_and_expands(model, guide):
    plan = plan_rewrite(model, budget=0.4, calibration_data=X)
    assert plan["glu"].rank
    assert 0 < plan["glu"].error < 1
    small = rewrite_model(model, RewritePlan.from_json(plan.to_json()), calibration_data=X)
    assert small.count_params() == plan.parameters <= 0.4 * model.count_params()
    assert type(small.layers[0]) is guide.BilinearGLU
    without_data = rewrite_model(model, plan)
    errors = [np.square(outputs(one) - outputs(model)).sum() for one in (small, without_data)]
    assert errors[0] < errors[1]
    full = expand_model(small)
    assert type(full.layers[0]) is guide.GLU
    np.testing.assert_allclose(outputs(full), outputs(small), rtol=1e-4, atol=1e-5)


def test_low_rank_factors_of_both_kernels_are_alike(model):
    plan = plan_rewrite(model, rank=2)
    plan["glu"].factors = (36, 1), (1, 48)
    small = rewrite_model(model, plan)
    for kernel in small.layers[0].kernels.values():
        assert (kernel.factorization.input_factors, kernel.factorization.output_factors) == (
            (36, 1),
            (1, 48),
        )


def test_is_exact_at_the_sufficient_rank(model, guide):
    glu = guide.BilinearGLU.from_full(model.layers[0], rank=36)
    expected = keras.ops.convert_to_numpy(model.layers[0](X))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(glu(X)), expected, rtol=1e-3, atol=1e-4)


def test_clones_trains_saves_and_counts(model, guide, tmp_path):
    clone = keras.models.clone_model(model, clone_function=Rewriter(2))
    assert type(clone.layers[0]) is guide.BilinearGLU
    summary = summarize(clone)
    assert summary.not_counted == ()
    assert summarize(model).layers[0].macs == 2 * 36 * 48
    assert summary.layers[0].macs == sum(
        kernel.factorization.macs for kernel in clone.layers[0].kernels.values()
    )
    assert "BilinearGLU" in str(compare(model, clone))
    callback = BilinearRewrite(at_epoch=1, budget=0.4)
    model.fit(X, np.zeros((200, 2)), epochs=2, callbacks=[callback], verbose=0)
    assert type(model.layers[0]) is guide.BilinearGLU
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(outputs(loaded), outputs(model), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="exports are tested with it")
def test_exports(model, tmp_path):
    pytest.importorskip("ai_edge_litert")
    report = export_litert(rewrite_model(model, rank=2), tmp_path / "model.tflite")
    assert report.bytes < 4 * model.count_params()


def test_a_subclass_that_adds_something_is_left_alone_until_it_is_registered():
    @keras.saving.register_keras_serializable("tests")
    class Twice(keras.layers.Dense):
        def call(self, inputs):
            return 2 * super().call(inputs)

    model = keras.Sequential([keras.Input((36,)), Twice(48, name="twice")])
    assert "no projection" in plan_rewrite(model, rank=1)["twice"].reason

    @register(Twice)
    @keras.saving.register_keras_serializable("tests")
    class BilinearTwice(BilinearDense):
        def call(self, inputs):
            return 2 * super().call(inputs)

    assert full_converter(Twice).bilinear_class is BilinearTwice
    assert BilinearDense.full_class is keras.layers.Dense
    assert type(rewrite_model(model, rank=2).layers[0]) is BilinearTwice
    exact = BilinearTwice.from_full(model.layers[0], rank=36)
    expected = outputs(model)
    np.testing.assert_allclose(outputs(exact), expected, rtol=1e-3, atol=1e-4)


def test_register_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match=r"`full_class` must be a class of Keras layers.*'Dense'"):
        register("Dense", BilinearDense)
    with pytest.raises(TypeError, match=r"`bilinear_class` must be a `BilinearLayer`.*kernels"):
        register(keras.layers.Dense, keras.layers.Dense)
    with pytest.raises(TypeError, match="`converter` must be a `Converter` class"):
        register(keras.layers.Dense, BilinearDense, converter=Converter(None, None))
