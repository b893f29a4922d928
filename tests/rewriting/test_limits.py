"""Plans that are solved again, and plans that keep to several limits."""

import time

import keras
import model_kinds
import numpy as np
import pytest
from keras import layers

from keras_bilinear import RewritePlan, plan_rewrite, rewrite_model


def mlp(*widths):
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(w, name=f"dense_{i}") for i, w in enumerate(widths[1:])]
    return keras.Sequential([keras.Input((widths[0],)), *hidden])


def choices(plan):
    return {path: layer.choice for path, layer in plan.items()}


def data(width, examples=300):
    return np.random.default_rng(0).normal(size=(examples, width)).astype("float32")


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("limit", [{"budget": 0.2}, {"max_params": 4000}, {"budget": 0.5}])
def test_a_plan_is_solved_again_as_if_it_were_made_anew(limit, calibrated):
    model = mlp(64, 100, 64, 48)
    x = data(64) if calibrated else None
    plan = plan_rewrite(model, 0.5, calibration_data=x)
    before = str(plan)
    again = RewritePlan.from_json(plan.to_json()).with_budget(**limit)
    new = plan_rewrite(model, **limit, calibration_data=x)
    assert choices(again) == choices(new)
    assert again.parameters == new.parameters
    assert [x.reason for x in again.values()] == [x.reason for x in new.values()]
    assert str(plan) == before


def test_recurrent_layers_are_solved_again():
    model, x = model_kinds.recurrent()
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
    plan = plan_rewrite(mlp(*[48] * 40), 0.5)
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
