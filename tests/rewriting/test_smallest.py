"""The smallest plan whose measured metric keeps to a drop."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_bilinear import rewrite_model, smallest_plan
from keras_bilinear.rewriting import smallest

RNG = np.random.default_rng(0)
# Points around 4 centers, which a network of low rank tells apart.
CENTERS = RNG.normal(size=(4, 16))
Y = RNG.integers(0, 4, 400)
X = (CENTERS[Y] + 0.8 * RNG.normal(size=(400, 16))).astype("float32")
TRAINING, VALIDATION = (X[200:], Y[200:]), (X[:200], Y[:200])


@pytest.fixture(autouse=True)
def few_budgets(monkeypatch):
    monkeypatch.setattr(smallest, "_NEAR", 1.9)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(48, activation="relu", name="hidden"),
            layers.Dense(48, activation="relu", name="middle"),
            layers.Dense(4, activation="softmax", name="last"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*TRAINING, epochs=8, verbose=0)
    return model


def answers(model, x):
    return model.predict(x, verbose=0).argmax(-1)


def mean_of_wrong(y, outputs):
    return np.mean(outputs.argmax(-1) != y)


# Each metric with a function of the outputs that says how much worse a model is.
METRICS = {
    "compiled": ({}, lambda y, full, small: np.mean(full == y) - np.mean(small == y)),
    "metric": (
        {"metric": keras.metrics.SparseCategoricalAccuracy()},
        lambda y, full, small: np.mean(full == y) - np.mean(small == y),
    ),
    "function": (
        {"metric": mean_of_wrong, "mode": "min"},
        lambda y, full, small: np.mean(full == y) - np.mean(small == y),
    ),
    "agreement": ({"labels": False}, lambda y, full, small: np.mean(full != small)),
}


@pytest.mark.parametrize("case", METRICS)
def test_the_measured_drop_is_kept_to(case, model):
    options, drop = METRICS[case]
    options = dict(options)
    data = VALIDATION if options.pop("labels", True) else VALIDATION[0]
    before = model.get_weights()
    plan = smallest_plan(model, data, 0.05, calibration_data=TRAINING[0], **options)
    assert plan.parameters < 0.8 * plan.full_parameters
    small = rewrite_model(model, plan, calibration_data=TRAINING[0])
    x, y = VALIDATION
    assert drop(y, answers(model, x), answers(small, x)) <= 0.05 + 1e-6
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_larger_drop_allows_a_smaller_plan(model):
    function = {"metric": lambda y, outputs: np.mean(outputs.argmax(-1) == y)}
    strict, loose = (smallest_plan(model, VALIDATION, most, **function) for most in (0.01, 0.6))
    assert loose.parameters < strict.parameters


def test_losses_are_metrics_that_should_be_small(model):
    plan = smallest_plan(model, VALIDATION, 0.1, "loss", calibration_data=TRAINING[0])
    small = rewrite_model(model, plan, calibration_data=TRAINING[0])
    assert plan.parameters < plan.full_parameters
    losses = [one.evaluate(*VALIDATION, verbose=0, return_dict=True) for one in (model, small)]
    assert losses[1]["loss"] <= losses[0]["loss"] + 0.1 + 1e-5


def test_batches_of_inputs_and_labels(model):
    x, y = VALIDATION
    batches = [(x[:150], y[:150]), (x[150:], y[150:])]
    found = [smallest_plan(model, data, 0.5) for data in (iter(batches), VALIDATION)]
    assert found[0].parameters == found[1].parameters < found[0].full_parameters


def test_without_a_smaller_model_that_does_well_all_layers_stay(model):
    # A metric that tells the slightest change.
    full = model.predict(VALIDATION[0], verbose=0)
    plan = smallest_plan(
        model, VALIDATION[0], 0, lambda y, outputs: float(np.allclose(outputs, full, atol=1e-6))
    )
    assert plan.parameters == plan.full_parameters
    assert plan["hidden"].reason == "kept full: within the budget"
    assert plan.with_budget(0.3).parameters <= 0.3 * plan.full_parameters


def test_excluded_layers_stay(model):
    plan = smallest_plan(model, VALIDATION, 0.5, exclude="middle")
    assert plan["middle"].rank is None
    assert plan.parameters < plan.full_parameters


def test_probabilities_agree_by_their_side_of_a_half():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((16,)), layers.Dense(32), layers.Dense(1, activation="sigmoid")]
    )
    plan = smallest_plan(model, X, 0.1, calibration_data=X)
    small = rewrite_model(model, plan, X)
    sides = [one.predict(X, verbose=0) > 0.5 for one in (model, small)]
    assert plan.parameters < plan.full_parameters
    assert np.mean(sides[0] != sides[1]) <= 0.1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_drop": -1}, "`max_drop` must be 0 or more. Received: max_drop=-1"),
        ({"mode": "best"}, "`mode` must be"),
        ({"metric": "f1"}, "The compiled metrics are 'accuracy', 'loss'. Received: metric='f1'"),
        ({"metric": lambda y, outputs: "much"}, "`metric` must give a number"),
        ({"metric": lambda y, outputs: np.nan}, "The metric of the full model must be finite"),
        ({"validation_data": None}, "`validation_data` must be given"),
        ({"validation_data": (X, Y[:7])}, "must have an array with a label for each of the 400"),
        ({"validation_data": X[:, :3]}, "`validation_data` must fit the input"),
    ],
)
def test_bad_arguments_are_refused(options, text, model):
    with pytest.raises(ValueError, match=text):
        smallest_plan(model, **{"validation_data": VALIDATION, **options})


def test_outputs_without_answers_need_a_metric():
    model = keras.Sequential([keras.Input((16,)), layers.Dense(32), layers.Dense(1)])
    with pytest.raises(ValueError, match=r"give a `metric`. Received: outputs of shape \(128, 1\)"):
        smallest_plan(model, X)
    plan = smallest_plan(model, X, 0.5, "mean_squared_error", calibration_data=X)
    small = rewrite_model(model, plan, X)
    error = np.mean((model.predict(X, verbose=0) - small.predict(X, verbose=0)) ** 2)
    assert error <= 0.5
    assert plan.parameters < plan.full_parameters
