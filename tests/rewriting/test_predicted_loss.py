"""Predicted rises of the loss, against those that are measured."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_bilinear import plan_rewrite, rewrite_model
from keras_bilinear.rewriting.plan import RewritePlan


def softmax(values):
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def divergence(full, small):
    return np.mean(np.sum(full * np.log(full / small), -1))


def relative_error(full, small):
    return np.mean((full - small) ** 2) / full.reshape(-1, full.shape[-1]).var(0).mean()


def model_of(last, loss=None):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((32,)), layers.Dense(48, activation="tanh"), layers.Dense(8, activation=last)]
    )
    if loss:
        model.compile(loss=loss)
    return model


CASES = {
    "probabilities": (lambda: model_of("softmax"), divergence),
    "logits": (
        lambda: model_of(None, keras.losses.CategoricalCrossentropy(from_logits=True)),
        lambda full, small: divergence(softmax(full), softmax(small)),
    ),
    "binary": (
        lambda: model_of("sigmoid"),
        lambda full, small: np.mean(
            divergence(np.stack([full, 1 - full], -1), np.stack([small, 1 - small], -1))
        ),
    ),
    "numbers": (lambda: model_of(None), relative_error),
}


@pytest.mark.parametrize("case", CASES)
def test_small_errors_raise_the_loss_as_predicted(case):
    make, measure = CASES[case]
    model = make()
    x = np.random.default_rng(0).normal(size=(2000, 32)).astype("float32")
    plan = plan_rewrite(model, 0.8, calibration_data=x)
    small = rewrite_model(model, plan, calibration_data=x)
    full, rewritten = (one.predict(x, verbose=0).astype("float64") for one in (model, small))
    measured = measure(full, rewritten)
    assert 0 < measured < 0.1
    np.testing.assert_allclose(plan.predicted_loss, measured, rtol=0.5)


def test_what_the_outputs_do_not_feel_is_left_out():
    keras.utils.set_random_seed(0)
    first = layers.Dense(32, name="first")
    last = layers.Dense(32, name="last")
    model = keras.Sequential([keras.Input((32,)), first, last])
    kernel = np.array(ops.convert_to_numpy(last.kernel))
    kernel[16:] *= 1e-3  # half of the hidden units do almost nothing
    last.kernel.assign(kernel)
    x = np.random.default_rng(0).normal(size=(500, 32)).astype("float32")
    plan = plan_rewrite(model, layers=["first"], max_params=1800, calibration_data=x)
    small = rewrite_model(model, plan, calibration_data=x)
    outputs = [ops.convert_to_numpy(one.layers[0](x)) for one in (model, small)]
    error = np.square(outputs[0] - outputs[1]).mean(0)
    assert np.mean(error[:16]) < 0.3 * np.mean(error[16:])


def test_plans_keep_their_predictions():
    x = np.random.default_rng(0).normal(size=(200, 32)).astype("float32")
    plan = plan_rewrite(model_of("softmax"), 0.5, calibration_data=x)
    assert RewritePlan.from_json(plan.to_json()).predicted_loss == plan.predicted_loss
    assert f"{plan.predicted_loss:.2g}" in str(plan)
    assert plan_rewrite(model_of("softmax"), 0.5).predicted_loss is None


def test_integer_outputs_have_no_gradients():
    inputs = keras.Input((32,))
    outputs = keras.ops.argmax(layers.Dense(16)(inputs), axis=-1)
    model = keras.Model(inputs, outputs)
    x = np.random.default_rng(0).normal(size=(100, 32)).astype("float32")
    plan = plan_rewrite(model, 0.5, calibration_data=x)
    assert plan.predicted_loss is None
    assert rewrite_model(model, plan, calibration_data=x).count_params() == plan.parameters


def test_layers_that_cannot_be_fitted_count_as_others_do(monkeypatch):
    """They have no losses, and errors of another unit must not outweigh them."""
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(64, activation="tanh", name=name) for name in ("first", "second")]
    model = keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(8, activation="softmax")])
    x = np.random.default_rng(0).normal(size=(300, 64)).astype("float32")
    exclude = [model.layers[-1]]
    both = plan_rewrite(model, 0.5, calibration_data=x, exclude=exclude)
    monkeypatch.setattr(
        "keras_bilinear.layers.converter.Converter.can_calibrate",
        lambda self, full: full.name != "first",
    )
    plan = plan_rewrite(model, 0.5, calibration_data=x, exclude=exclude)
    assert not plan["first"].losses
    assert plan.predicted_loss is None
    assert plan["first"].parameters < 1.5 * both["first"].parameters


def test_layers_that_no_gradient_reaches_count_as_others_do():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    stopped = ops.stop_gradient(layers.Dense(64, activation="tanh", name="first")(inputs))
    hidden = layers.Dense(64, activation="tanh", name="second")(stopped)
    model = keras.Model(inputs, layers.Dense(8, activation="softmax", name="last")(hidden))
    x = np.random.default_rng(0).normal(size=(300, 64)).astype("float32")
    plan = plan_rewrite(model, 0.5, calibration_data=x)
    assert not plan["first"].losses
    assert plan["second"].losses
    assert 0.2 < plan["first"].parameters / plan["second"].parameters < 5


def test_losses_that_are_tiny_are_minimized_as_others_are():
    model = model_of("softmax")
    x = np.random.default_rng(0).normal(size=(500, 32)).astype("float32")
    plan = plan_rewrite(model, 0.6, calibration_data=x)
    text = RewritePlan.from_json(plan.to_json())
    for layer in text.values():
        layer.losses = {choice: 1e-6 * loss for choice, loss in layer.losses.items()}
    tiny = text.with_budget(0.6)
    assert [layer.rank for layer in tiny.values()] == [layer.rank for layer in plan.values()]
