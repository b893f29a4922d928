"""Plans that are solved again, and plans that keep to several limits."""

import itertools
import time

import keras
import model_kinds
import numpy as np
import pytest
from keras import layers

from keras_bilinear import RewritePlan, exporting, plan_rewrite, rewrite_model
from keras_bilinear.reports.summary import count_macs


def mlp(*widths):
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(w, name=f"dense_{i}") for i, w in enumerate(widths[1:])]
    return keras.Sequential([keras.Input((widths[0],)), *hidden])


def choices(plan):
    return {path: layer.choice for path, layer in plan.items()}


def data(width, examples=300):
    return np.random.default_rng(0).normal(size=(examples, width)).astype("float32")


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("limit", [{"budget": 0.2}, {"max_params": 1500}, {"budget": 0.5}])
def test_a_plan_is_solved_again_as_if_it_were_made_anew(limit, calibrated):
    model = mlp(32, 48, 32)
    x = data(32) if calibrated else None
    plan = plan_rewrite(model, 0.5, calibration_data=x)
    before = str(plan)
    again = RewritePlan.from_json(plan.to_json()).with_budget(**limit)
    new = plan_rewrite(model, **limit, calibration_data=x)
    assert choices(again) == choices(new)
    assert again.parameters == new.parameters
    assert [x.reason for x in again.values()] == [x.reason for x in new.values()]
    assert str(plan) == before


def test_recurrent_layers_are_solved_again():
    model, _ = model_kinds.recurrent()
    plan = plan_rewrite(model, budget=0.6)
    small = plan.with_budget(0.3)
    assert str(small) == str(plan_rewrite(model, budget=0.3))
    assert str(small.with_budget(0.6)) == str(plan)
    assert rewrite_model(model, small).count_params() == small.parameters


def test_a_larger_budget_has_all_kernels_of_low_rank_to_choose_from():
    model, x = mlp(64, 100, 64, 48), data(64)
    plan = plan_rewrite(model, 0.1, calibration_data=x)
    larger = plan.with_budget(0.6)
    assert 0.5 * plan.full_parameters < larger.parameters <= 0.6 * plan.full_parameters
    assert larger.predicted_loss < 0.5 * plan.predicted_loss


def test_an_error_can_be_the_new_limit():
    model = mlp(64, 100, 64)
    plan = plan_rewrite(model, 0.1).with_budget(max_error=0.5)
    assert choices(plan) == choices(plan_rewrite(model, max_error=0.5))


def test_what_is_not_left_to_the_search_stays():
    model = mlp(64, 64, 64, 64, 64)
    plan = plan_rewrite(model, 0.6, layers={"dense_0": 2, "dense_1": None})
    plan["dense_2"].rank = 5
    small = plan.with_budget(0.4)
    assert small["dense_0"].rank == 2
    assert small["dense_1"].reason == "on request"
    assert small["dense_2"].rank == 5
    assert small["dense_3"].choice != plan["dense_3"].choice
    plan["dense_2"].skip()
    assert plan.with_budget(0.55)["dense_2"].rank is None


def test_scaled_layers_are_solved_again():
    model = mlp(64, 64, 64)
    plan = plan_rewrite(model, 0.5, scale=2)
    assert plan["dense_0"].scale == 2
    small = plan.with_budget(0.3)
    assert small.parameters <= 0.3 * plan.full_parameters
    assert choices(small) == choices(plan_rewrite(model, 0.3, scale=2))
    assert small["dense_0"].scale == 2


def test_plans_of_an_earlier_version_are_solved_again():
    model = mlp(64, 64, 64)
    plan = plan_rewrite(model, 0.9, exclude=["dense_1"])
    text = plan.to_json()
    for field in ('"pinned": true', '"pinned": false'):
        text = text.replace(f"   {field},\n", "")
    assert "pinned" not in text
    small = RewritePlan.from_json(text).with_budget(0.6)
    assert choices(small) == choices(plan.with_budget(0.6))
    assert small["dense_1"].reason == "on request"


def test_many_layers_are_solved_again_in_less_than_a_second():
    plan = plan_rewrite(mlp(*[24] * 30), 0.5)
    start = time.process_time()
    plan.with_budget(0.2)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("make", "limits", "text"),
    [
        ({"rank": 2}, {"budget": 0.5}, "nothing to choose from"),
        ({"budget": 0.5}, {"budget": 0.001}, "No plan keeps to the limit"),
        ({"budget": 0.5}, {"budget": 2.0}, "`budget` must be above 0 and at most 1"),
        ({"budget": 0.5}, {"budget": 0.2, "max_params": 100}, "At most one of"),
        ({"budget": 0.5}, {"budget": {"macs": 0.5}}, "does not know the MACs of the layer"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(make, limits, text):
    plan = plan_rewrite(mlp(64, 64), **make)
    with pytest.raises(ValueError, match=text):
        plan.with_budget(**limits)


def cnn():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((12, 12, 8)),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="conv"),
            layers.DepthwiseConv2D(3, padding="same", name="depthwise"),
            layers.Conv2D(48, 3, strides=2, padding="same", name="strided"),
            layers.Flatten(),
            layers.Dense(64, name="dense"),
        ]
    )


def sequences():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((7,), dtype="int32"),
            layers.Embedding(100, 24),
            layers.GRU(32, return_sequences=True),
            layers.Conv1DTranspose(24, 3),
            layers.SeparableConv1D(48, 3),
            layers.EinsumDense("abc,cd->abd", output_shape=(None, 32)),
        ]
    )


@pytest.mark.parametrize("make", [cnn, sequences])
@pytest.mark.parametrize("budget", [{"macs": 0.3}, {"parameters": 0.25, "macs": 0.5}])
def test_all_shares_are_kept_as_they_are_counted_in_the_rewritten_model(make, budget):
    model = make()
    plan = plan_rewrite(model, budget)
    assert plan.full_macs == count_macs(model)
    assert plan.macs <= budget["macs"] * plan.full_macs
    assert plan.parameters <= budget.get("parameters", 1.0) * plan.full_parameters
    small = rewrite_model(model, plan)
    with exporting():
        assert (small.count_params(), count_macs(small)) == (plan.parameters, plan.macs)
    assert f"{plan.full_macs:,} -> {plan.macs:,} MACs" in str(plan)


def test_the_best_plan_within_both_shares_is_found():
    model = mlp(32, 48, 24, 16)
    budget = {"parameters": 0.5, "macs": 0.4}
    plan = plan_rewrite(model, budget)
    tables = [
        [(0.0, layer.full_parameters, layer.full_macs)]
        + [
            (error**2, layer.size("parameters", choice), layer.macs_of[choice])
            for choice, error in layer.errors.items()
        ]
        for layer in plan.values()
    ]
    best = min(
        error
        for error, size, macs in (np.sum(x, axis=0) for x in itertools.product(*tables))
        if size <= 0.5 * plan.full_parameters and macs <= 0.4 * plan.full_macs
    )
    assert sum(layer.error**2 for layer in plan.values()) == pytest.approx(best, rel=1e-3)


def test_shares_are_solved_again():
    model = cnn()
    plan = RewritePlan.from_json(plan_rewrite(model, {"macs": 1.0}).to_json())
    again = plan.with_budget({"parameters": 0.3, "macs": 0.6})
    assert str(again) == str(plan_rewrite(model, {"parameters": 0.3, "macs": 0.6}))
    assert again.macs <= 0.6 * plan.full_macs


def test_calibration_data_tell_the_shape_of_an_example():
    model = keras.Sequential([keras.Input((None, 16)), layers.Conv1D(32, 3)])
    with pytest.raises(ValueError, match="needs the shape of an example"):
        plan_rewrite(model, {"macs": 0.5})
    x = np.random.default_rng(0).normal(size=(40, 10, 16)).astype("float32")
    plan = plan_rewrite(model, {"macs": 0.5}, calibration_data=x)
    assert plan.full_macs == 8 * 3 * 16 * 32
    assert plan.macs <= 0.5 * plan.full_macs


def test_given_ranks_count_in_shares():
    model = mlp(64, 64, 64)
    plan = plan_rewrite(model, {"macs": 0.5}, layers={"dense_0": 2})
    assert plan["dense_0"].rank == 2
    with exporting():
        assert plan.macs == count_macs(rewrite_model(model, plan))


class Own(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 8))

    def call(self, x):
        return x @ self.kernel


@pytest.mark.parametrize(
    ("budget", "options", "text"),
    [
        ({"bytes": 0.5}, {}, "must have shares of 'parameters' and 'macs'. Received: .*'bytes'"),
        ({}, {}, "must have shares of 'parameters' and 'macs'"),
        ({"macs": 1.5}, {}, "The share of 'macs' in `budget` must be above 0 and at most 1"),
        ({"macs": 0.5}, {"scale": 2}, "A `scale` and a share of the MACs exclude each other"),
        ({"macs": 0.001}, {}, r"still has \d+ MACs"),
        ({"macs": 0.5}, {"max_params": 100}, "At most one of"),
        ({"x": np.ones((5, 64))}, {}, "given as calibration_data="),
    ],
)
def test_bad_shares_are_refused(budget, options, text):
    with pytest.raises(ValueError, match=text):
        plan_rewrite(mlp(64, 64, 64), budget, **options)


def test_layers_whose_operations_are_unknown_are_named():
    model = keras.Sequential([keras.Input((64,)), layers.Dense(64), Own(name="own")])
    with pytest.raises(ValueError, match=r"cannot be counted.*Received: own"):
        plan_rewrite(model, {"macs": 0.5})
