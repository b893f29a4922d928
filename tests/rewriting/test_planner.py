import itertools
import pathlib
import re

import keras
import model_kinds
import numpy as np
import pytest
from keras import layers

import keras_bilinear
from keras_bilinear import RewritePlan, plan_rewrite
from keras_bilinear.kronecker.factorization import Factorization, choose_factors
from keras_bilinear.kronecker.nearest import nearest_kronecker_sum, remaining_energies


def mlp(*widths):
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(w, name=f"dense_{i}") for i, w in enumerate(widths[1:])]
    return keras.Sequential([keras.Input((widths[0],)), *hidden])


@pytest.fixture(scope="module")
def model_and_choices():
    """A model, and for each of its layers `(error, parameters)` of all that it may become."""
    model, tables = mlp(64, 100, 64, 48), []
    for path, layer in plan_rewrite(model, budget=1.0).items():
        kernel = keras.ops.convert_to_numpy(model.get_layer(path).kernel)
        tables.append([(0.0, layer.full_parameters)])
        low_rank = (kernel.shape[0], 1), (1, kernel.shape[1])
        assert {factors for factors, _ in layer.errors} == {
            low_rank,
            (choose_factors(kernel.shape[0]), choose_factors(kernel.shape[1])),
        }
        for (inputs, outputs), rank in layer.errors:
            one = keras_bilinear.BilinearDense.from_full(
                model.get_layer(path), rank, inputs, outputs
            )
            assert one.count_params() < layer.full_parameters
            rest = kernel - keras.ops.convert_to_numpy(one.kernel)
            share = np.sum(rest**2) / np.sum(kernel**2)
            tables[-1].append((share, one.count_params()))
    return model, tables


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.25, 0.6, 1.0])
def test_the_plan_is_the_best_within_the_budget(budget, model_and_choices):
    model, tables = model_and_choices
    plan = plan_rewrite(model, budget=budget)
    assert plan.parameters <= budget * plan.full_parameters
    assert plan.full_parameters == model.count_params()
    best = min(
        sum(error for error, _ in choice)
        for choice in itertools.product(*tables)
        if sum(size for _, size in choice) <= budget * plan.full_parameters
    )
    assert sum(layer.error**2 for layer in plan.values()) == pytest.approx(best, rel=1e-3, abs=1e-6)


def with_kernels(*kernels):
    """A model of dense layers with these kernels."""
    model = mlp(len(kernels[0]), *(kernel.shape[1] for kernel in kernels))
    for layer, kernel in zip(model.layers, kernels, strict=True):
        layer.set_weights([kernel, np.zeros(kernel.shape[1])])
    return model


@pytest.mark.parametrize("calibrated", [False, True])
def test_each_layer_gets_the_factors_that_its_kernel_is_made_of(calibrated):
    rng = np.random.default_rng(0)
    product = rng.normal(size=(64, 3)) @ rng.normal(size=(3, 64))
    kronecker = sum(np.kron(*rng.normal(size=(2, 8, 8))) for _ in range(3))
    model = with_kernels(product, kronecker)
    x = rng.normal(size=(500, 64)).astype("float32") if calibrated else None
    plan = plan_rewrite(model, budget=0.12, calibration_data=x)
    assert plan["dense_0"].factors == ((64, 1), (1, 64))
    assert plan["dense_1"].factors == ((8, 8), (8, 8))
    for layer in plan.values():
        assert layer.rank == 3
        assert layer.error == pytest.approx(0, abs=1e-3)
    small = keras_bilinear.rewrite_model(model, plan, x)
    y = rng.normal(size=(50, 64)).astype("float32")
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(small(y)),
        keras.ops.convert_to_numpy(model(y)),
        rtol=0.05,
        atol=1,
    )


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("calibrated", [False, True])
def test_no_plan_of_near_square_factors_alone_is_better(budget, calibrated):
    model = mlp(64, 100, 64, 48)
    x = np.random.default_rng(0).normal(size=(300, 64)) * np.linspace(0, 2, 64)
    x = x.astype("float32") if calibrated else None
    plan = plan_rewrite(model, budget=budget, calibration_data=x)
    square = plan_rewrite(model, budget=budget, calibration_data=x, low_rank=False)
    assert any(layer.factors[0][1] == 1 for layer in plan.values())
    assert not any(layer.factors[0][1] == 1 for layer in square.values())
    errors = [sum(layer.error**2 for layer in one.values()) for one in (plan, square)]
    assert errors[0] <= errors[1] + 1e-9


def test_near_square_kernels_are_fitted_only_where_they_may_be_ahead():
    rng = np.random.default_rng(0)
    product = rng.normal(size=(64, 4)) @ rng.normal(size=(4, 64))
    kronecker = sum(np.kron(*rng.normal(size=(2, 8, 8))) for _ in range(12))
    model = with_kernels(kronecker, product)
    x = rng.normal(size=(500, 64)).astype("float32")
    plan = plan_rewrite(model, budget=0.5, calibration_data=x)
    square = (8, 8), (8, 8)
    found = [
        [rank for factors, rank in layer.errors if factors == square] for layer in plan.values()
    ]
    assert found == [[1, 16, 23], []]
    assert plan["dense_0"].factors == square


def test_convolutions_and_embeddings_of_low_rank():
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [
            keras.Input((4, 4), dtype="int32"),
            layers.Embedding(60, 16, name="table"),
            layers.Conv2D(32, 3, name="conv"),
            layers.Conv2D(32, 1, groups=2, name="grouped"),
        ]
    )
    table = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 16))
    kernel = rng.normal(size=(144, 3)) @ rng.normal(size=(3, 32))
    model.get_layer("table").set_weights([table])
    model.get_layer("conv").set_weights([kernel.reshape(3, 3, 16, 32), np.ones(32)])
    x = rng.integers(0, 60, (200, 4, 4)).astype("int32")
    for data in (None, x):
        plan = plan_rewrite(model, max_error=0.01, calibration_data=data)
        assert plan["table"].factors == ((60, 1), (1, 16))
        assert plan["table"].rank == 2
        assert plan["conv"].factors == ((1, 16), (32, 1))
        assert plan["conv"].rank == 3
        assert {factors for factors, _ in plan["grouped"].errors} == {plan["grouped"].factors}
        small = keras_bilinear.rewrite_model(model, plan, data)
        assert small.get_layer("conv").right_kernel.shape == (3, 3, 3, 16, 1)
        outputs = [keras.ops.convert_to_numpy(one(x)) for one in (model, small)]
        np.testing.assert_allclose(*outputs, rtol=1e-2, atol=1e-2 * np.abs(outputs[0]).max())


@pytest.mark.parametrize("kind", ["SimpleRNN", "GRU", "LSTM"])
def test_recurrent_layers_have_both_kernels_near_square_or_of_low_rank(kind):
    rng = np.random.default_rng(0)
    full = getattr(layers, kind)(36, name="recurrent")
    model = keras.Sequential([keras.Input((5, 16)), full])
    gates = full.cell.kernel.shape[1] // 36
    kernels = [
        np.concatenate(
            [rng.normal(size=(width, 2)) @ rng.normal(size=(2, 36)) / 9 for _ in range(gates)], 1
        )
        for width in (16, 36)
    ]
    full.set_weights([*kernels, *full.get_weights()[2:]])
    x = rng.normal(size=(50, 5, 16)).astype("float32")
    for data in (None, x):
        plan = plan_rewrite(model, max_error=0.01, calibration_data=data)
        layer = plan["recurrent"]
        assert {one for one, _ in layer.errors} == {((4, 4), (6, 6)), ((16, 1), (1, 36))}
        assert (layer.factors, layer.rank) == (((16, 1), (1, 36)), 2)
        assert layer.error == pytest.approx(0, abs=1e-3)
        small = keras_bilinear.rewrite_model(model, plan, data)
        assert small.count_params() == plan.parameters
        outputs = [keras.ops.convert_to_numpy(one(x)) for one in (model, small)]
        np.testing.assert_allclose(*outputs, rtol=1e-2, atol=1e-2)
    layer.factors = (2, 8), (4, 9)
    assert layer.factorizations[1].input_factors == (4, 9)
    plan = RewritePlan([layer])
    small = keras_bilinear.rewrite_model(model, plan)
    assert small.count_params() == plan.parameters


def test_limits_on_parameters_and_on_errors():
    model = mlp(64, 100, 64)
    plan = plan_rewrite(model, max_params=2000)
    assert plan.parameters <= 2000
    plan = plan_rewrite(model, max_error=0.5)
    for layer in plan.values():
        assert layer.error <= 0.5
        smaller = [
            error
            for (factors, rank), error in layer.errors.items()
            if layer.parameters_at(rank, factors) < layer.parameters
        ]
        assert smaller
        assert min(smaller) > 0.5
    assert plan_rewrite(model, max_error=1e-6).parameters == model.count_params()


def test_the_default_budget_is_a_tenth():
    model = mlp(64, 100, 64)
    assert str(plan_rewrite(model)) == str(plan_rewrite(model, budget=0.1))


def test_with_calibration_the_errors_are_those_of_the_outputs():
    model = mlp(64, 100)
    x = np.random.default_rng(0).normal(size=(300, 64)) * np.linspace(0, 2, 64) + 1
    x = x.astype("float32")
    (plan,) = plan_rewrite(model, rank=2, calibration_data=x).values()
    small = keras_bilinear.rewrite_model(model, rank=2, calibration_data=x)
    full, output = (keras.ops.convert_to_numpy(one(x)) for one in (model, small))
    error = np.linalg.norm(full - output) / np.linalg.norm(full - full.mean(0))
    assert plan.error == pytest.approx(error, rel=0.02)
    (without,) = plan_rewrite(model, rank=2).values()
    assert plan.error < without.error


@pytest.mark.parametrize("layers", [["dense_1"], {"dense_0": None, "dense_2": None}])
def test_layers_can_be_chosen(layers):
    plan = plan_rewrite(mlp(64, 64, 64, 64), budget=0.75, layers=layers)
    assert plan["dense_0"].reason == plan["dense_2"].reason == "on request"
    assert plan["dense_1"].rank is not None


@pytest.mark.parametrize(
    "choice",
    [
        "dense_1",
        "sequential/dense_1",
        re.compile("e_1$"),
        lambda model: model.layers[1],
        lambda model: lambda layer: layer is model.layers[1],
        lambda model: (path for path in ["dense_1"]),
    ],
)
def test_layers_are_chosen_and_excluded_alike(choice):
    model = mlp(64, 64, 64, 64)
    model = keras.Sequential([keras.Input((64,)), *model.layers], name="sequential")
    model.layers[1]._path = "sequential/dense_1"
    for name, chosen in (("layers", [None, 2, None]), ("exclude", [2, None, 2])):
        value = choice(model) if callable(choice) else choice
        plan = plan_rewrite(model, rank=2, **{name: value})
        assert [layer.rank for layer in plan.values()] == chosen
        assert {layer.reason for layer in plan.values() if not layer.rank} == {"on request"}


def test_the_first_and_the_last_layer_are_kept():
    model = mlp(64, 64, 64, 64)
    plan = plan_rewrite(model, rank=2, exclude=[model.layers[0], model.layers[-1]])
    assert [layer.rank for layer in plan.values()] == [None, 2, None]
    small = keras_bilinear.rewrite_model(model, rank=2, exclude=[model.layers[0], "dense_2"])
    assert small.count_params() == plan.parameters
    plan = plan_rewrite(model, layers={"dense_0": 2, "dense_1": 3}, exclude="dense_0")
    assert [layer.rank for layer in plan.values()] == [None, 3, None]


def test_a_layer_without_weights_is_excluded_in_vain():
    inputs = keras.Input((64,))
    model = keras.Model(inputs, layers.ReLU()(layers.Dense(64)(inputs)))
    plan = plan_rewrite(model, rank=2, exclude=[model.layers[0], model.layers[-1]])
    assert [layer.rank for layer in plan.values()] == [2]
    with pytest.raises(ValueError, match=r"`layers` must choose.*Received: the InputLayer"):
        plan_rewrite(model, rank=2, layers=[model.layers[0]])
    with pytest.raises(ValueError, match=r"`exclude` must choose.*Received: the Dense"):
        plan_rewrite(model, rank=2, exclude=[layers.Dense(3)])


def test_a_layer_that_holds_others_stands_for_them():
    inputs = keras.Input((6, 16))
    attention = layers.MultiHeadAttention(2, 8, name="attention")
    inner = keras.Sequential([keras.Input((6, 16)), layers.Dense(16, name="d")], name="inner")
    model = keras.Model(inputs, layers.Dense(16, name="last")(inner(attention(inputs, inputs))))
    both = {"attention", "inner"}
    for choice, expected in (
        (["attention", "inner"], both),
        ([layers.MultiHeadAttention, inner], both),
        (inner.layers, {"inner"}),
    ):
        plan = plan_rewrite(model, rank=1, exclude=choice)
        left = {path.split("/")[0] for path, layer in plan.items() if layer.rank is None}
        assert left == expected


def test_ranks_can_be_pinned():
    plan = plan_rewrite(mlp(64, 64, 64, 64), budget=0.5, layers={"dense_1": 5})
    assert plan["dense_1"].rank == 5
    assert plan["dense_0"].rank != 5
    assert plan.parameters <= 0.5 * plan.full_parameters


def test_reasons():
    model, _ = model_kinds.convolutional()
    reasons = {layer.type: layer.reason for layer in plan_rewrite(model, rank=40).values()}
    assert "depthwise" in reasons["DepthwiseConv2D"]
    assert reasons["Dense"] == "too small to gain at this rank"
    model, _ = model_kinds.sequential()
    reasons = [layer.reason for layer in plan_rewrite(model, budget=0.99).values()]
    assert "no projection in it that a bilinear layer stands for" in reasons
    dense, inputs = layers.Dense(24), keras.Input((24,))
    spectral = layers.SpectralNormalization(layers.Dense(24))
    model = keras.Model(inputs, spectral(dense(inputs)))
    twin = layers.Dense(24)
    model = keras.Model(inputs, twin(spectral(dense(inputs))))
    twin._tracker.unlock()
    twin._kernel = dense._kernel
    first, second, third = plan_rewrite(model, rank=1).values()
    assert second.reason == "SpectralNormalization works on its kernel"
    assert first.reason == third.reason == "shares a variable with another layer"


def test_the_table_marks_large_errors_and_explains_them():
    plan = plan_rewrite(mlp(64, 64, 64), layers={"dense_0": 1, "dense_1": 15})
    plan["dense_1"].errors[plan["dense_1"].factors, 15] = 0.25
    first, second = (line for line in str(plan).splitlines() if "Dense" in line)
    assert "! " in first
    assert "0.250" in second
    assert "!" not in second
    assert "0 is exact, at 1 nothing is kept. ! marks errors above 0.5" in " ".join(
        str(plan).split()
    )


def test_plans_are_edited_and_kept_as_json(tmp_path):
    model, x = model_kinds.recurrent()
    plan = plan_rewrite(model, budget=0.5, calibration_data=x)
    path = next(path for path, layer in plan.items() if layer.type == "LSTM")
    plan[path].rank = 3
    size = plan.parameters
    plan[path].skip()
    assert plan[path].parameters == plan[path].full_parameters
    assert plan.parameters > size
    plan[path].rank = 3
    assert plan.parameters == size
    again = RewritePlan.from_json(plan.to_json())
    assert str(again) == str(plan)
    assert again.to_json() == plan.to_json()
    assert keras_bilinear.rewrite_model(model, again).count_params() == size
    assert again[path].errors == plan[path].errors
    assert again[path].factors == plan[path].factors
    with pytest.raises(AttributeError, match="has no 'ranks'"):
        plan[path].ranks = 3


# What version 0.1.0 wrote for the network below, with rank 1.
OLD_PLAN = """{
 "other_parameters": 0,
 "layers": [
  {"path": "conv", "type": "Conv2D", "full_parameters": 440, "factorizations": [
    {"input_dim": 6, "output_dim": 4, "input_factors": [3, 2], "output_factors": [2, 2],
     "rank": 1, "left_window": [1, 1], "right_window": [3, 3], "groups": 2, "gates": 0}],
   "rank": 1, "reason": "", "errors": [[[3, 2], [2, 2], 1, 0.9140115133251144]],
   "scale": 1, "input_scale": 1},
  {"path": "lstm", "type": "LSTM", "full_parameters": 1600, "factorizations": [
    {"input_dim": 8, "output_dim": 16, "input_factors": [2, 4], "output_factors": [4, 4],
     "rank": 1, "left_window": [], "right_window": [], "groups": 1, "gates": 4},
    {"input_dim": 16, "output_dim": 16, "input_factors": [4, 4], "output_factors": [4, 4],
     "rank": 1, "left_window": [], "right_window": [], "groups": 1, "gates": 4}],
   "rank": 1, "reason": "", "errors": [[[2, 4], [4, 4], 1, 0.8761262098472442]],
   "scale": 1, "input_scale": 1},
  {"path": "rnn", "type": "SimpleRNN", "full_parameters": 528, "factorizations": [
    {"input_dim": 16, "output_dim": 16, "input_factors": [4, 4], "output_factors": [4, 4],
     "rank": 1, "left_window": [], "right_window": [], "groups": 1, "gates": 1},
    {"input_dim": 16, "output_dim": 16, "input_factors": [4, 4], "output_factors": [4, 4],
     "rank": 1, "left_window": [], "right_window": [], "groups": 1, "gates": 1}],
   "rank": 1, "reason": "", "errors": [[[4, 4], [4, 4], 1, 0.8661262098472442]],
   "scale": 1, "input_scale": 1},
  {"path": "dense", "type": "Dense", "full_parameters": 170, "factorizations": [
    {"input_dim": 16, "output_dim": 10, "input_factors": [4, 4], "output_factors": [2, 5],
     "rank": 1, "left_window": [], "right_window": [], "groups": 1, "gates": 0}],
   "rank": 1, "reason": "", "errors": [[[4, 4], [2, 5], 1, 0.865362083636579]],
   "scale": 1, "input_scale": 1}
 ]
}"""


def test_plans_that_told_groups_and_gates_apart_are_read():
    model = keras.Sequential(
        [
            keras.Input((6, 8, 12)),
            layers.Conv2D(8, 3, groups=2, name="conv"),
            layers.Reshape((-1, 8)),
            layers.LSTM(16, return_sequences=True, name="lstm"),
            layers.SimpleRNN(16, name="rnn"),
            layers.Dense(10, name="dense"),
        ]
    )
    old, new = RewritePlan.from_json(OLD_PLAN), plan_rewrite(model, rank=1)
    for path in ("conv", "lstm", "rnn", "dense"):
        assert old[path].factorizations == new[path].factorizations
    assert old.parameters == new.parameters
    assert old["lstm"].error == 0.8761262098472442
    assert RewritePlan.from_json(old.to_json()).to_json() == old.to_json()
    assert keras_bilinear.rewrite_model(model, old).count_params() == old.parameters


def test_factors_are_edited():
    model = mlp(64, 100, 64)
    plan = plan_rewrite(model, budget=0.3)
    layer = plan["dense_0"]
    layer.rank = 6
    layer.factors = (16, 4), (4, 25)
    assert layer.parameters == 6 * (16 * 4 + 4 * 25) + 100
    assert "16x4 -> 4x25" in str(plan)
    layer.rank = 5
    assert layer.factors == ((16, 4), (4, 25))
    assert layer.error is None
    small = keras_bilinear.rewrite_model(model, RewritePlan.from_json(plan.to_json()))
    assert small.get_layer("dense_0").factorization.input_factors == (16, 4)
    assert small.count_params() == plan.parameters
    clone = keras.models.clone_model(model, clone_function=keras_bilinear.Rewriter(plan))
    assert clone.get_layer("dense_0").factorization.output_factors == (4, 25)
    assert clone.count_params() == plan.parameters


@pytest.mark.parametrize(
    ("factors", "text"),
    [
        (3, "must be a pair of pairs"),
        ("ab", "must be a pair of pairs"),
        ((8, 8), "`input_factors` must be a pair of positive integers. Received: input_factors=8"),
        (((8, 7), (10, 10)), "product of `input_factors` must be at least 64"),
        (((8, 8), (10, 11)), "`output_factors` must fit the size 100 tightly"),
        (((8, 8), None), "must be two pairs"),
        (None, "must be two pairs"),
    ],
)
def test_factors_that_do_not_fit_are_refused(factors, text):
    layer = plan_rewrite(mlp(64, 100), budget=0.3)["dense_0"]
    before = layer.factors
    with pytest.raises(ValueError, match=text):
        layer.factors = factors
    assert layer.factors == before


def test_factors_of_a_scale_stay():
    plan = plan_rewrite(mlp(64, 64, 64), rank=1, scale=2)
    with pytest.raises(ValueError, match="scale of the layer 'dense_0' decides its factors"):
        plan["dense_0"].factors = (64, 1), (1, 64)


def test_tables_show_every_layer():
    model, _ = model_kinds.nested()
    plan = plan_rewrite(model, rank=1)
    for text in (str(plan), plan._repr_html_()):
        assert "middle/inner/dense" in text
        assert f"{plan.full_parameters:,} -&gt; {plan.parameters:,}" in text.replace("->", "-&gt;")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"budget": 0}, "`budget` must be above 0 and at most 1. Received: budget=0"),
        ({"budget": 1.5}, "`budget` must be above 0 and at most 1"),
        ({"budget": True}, "`budget` must be above 0 and at most 1"),
        ({"budget": "a"}, "`budget` must be above 0 and at most 1"),
        ({"max_params": -3}, "`max_params` must be a positive number. Received: max_params=-3"),
        ({"max_error": float("nan")}, "`max_error` must be a positive number"),
        ({"budget": 0.1, "max_params": 9}, "At most one of"),
        ({"budget": 0.1, "rank": 2}, "At most one of"),
        ({"rank": 0}, "`rank` must be a positive integer"),
        ({"layers": 3}, "`layers` must be paths, compiled regular .* Received: 3 of type int"),
        ({"layers": ["dense"]}, "with weights: dense_0, dense_1. Received: 'dense', which matches"),
        ({"layers": {"dense": 2}}, "Received: 'dense', which matches none"),
        ({"exclude": {"dense_0": 2}}, "`exclude` must be paths, .* of type dict"),
        ({"exclude": ["dense_0", 0.5]}, "Received: 0.5 of type float"),
        ({"exclude": re.compile("^hidden")}, r"Received: re.compile\('\^hidden'\), which matches"),
        ({"exclude": layers.Dense(3, name="own")}, "the Dense 'own', which matches none of them"),
        ({"exclude": layers.LSTM}, "`exclude` must choose .* Received: LSTM, which matches none"),
        ({"exclude": lambda layer: False}, "Received: .*lambda.*, which matches none"),
        ({"layers": {"dense_0": 0}}, "`rank` must be a positive integer"),
        ({"budget": 0.001}, r"still has \d+ parameters"),
    ],
)
def test_bad_arguments_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        plan_rewrite(mlp(64, 64, 64), **arguments)


def test_ranks_of_some_layers_need_no_budget():
    model = mlp(64, 64, 64, 64)
    plan = plan_rewrite(model, layers={"dense_1": 2, "dense_2": None})
    assert [layer.rank for layer in plan.values()] == [None, 2, None]
    assert plan["dense_0"].reason == "on request"
    assert plan["dense_1"].error > 0
    with pytest.raises(ValueError, match=r"Received: budget=0.1 \(none was given\)"):
        plan_rewrite(model, layers={"dense_2": None})


def test_a_layer_shows_itself_in_a_line():
    plan = plan_rewrite(mlp(64, 64, 64), layers={"dense_1": 2})
    assert repr(plan["dense_0"]) == (
        "<LayerPlan of Dense 'dense_0': 4,160 parameters, left alone: on request>"
    )
    assert repr(plan["dense_1"]).startswith(
        "<LayerPlan of Dense 'dense_1': 4,160 -> 320 parameters, rank=2, "
        "factors=((8, 8), (8, 8)), error=0."
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.ones((30, 64)), r"given as calibration_data=\. Received: an array of shape \(30, 64\)"),
        ([np.ones((30, 64))], r"calibration_data=\. Received: a list of \(30, 64\)"),
        (2000, "Received: budget=2000. A number of parameters is given as max_params="),
        (RewritePlan([]), "has a plan already: give it to `rewrite_model`"),
    ],
)
def test_what_is_no_budget_is_refused(value, text):
    with pytest.raises(ValueError, match=text):
        plan_rewrite(mlp(64, 64), value)


@pytest.mark.parametrize(
    ("data", "received"),
    [
        (np.arange(500), r"\(128,\)"),
        (np.ones((5, 9)), r"\(5, 9\)"),
        ([np.ones((5, 64)), np.arange(5)], r"\(5,\)"),
        ({"x": np.ones((5, 9))}, r"\(5, 9\)"),
        (iter([np.ones((5, 64)), np.ones((5, 64, 2))]), r"\(5, 64, 2\)"),
    ],
)
def test_shapes_of_calibration_data_are_checked_first(data, received, monkeypatch):
    monkeypatch.setattr("keras_bilinear.rewriting.prediction.collect", None)
    model = keras.Sequential([keras.Input((64,), name="x"), layers.Dense(8)])
    text = rf"must fit the input 'x' of shape \(None, 64\) of .* of shape {received}$"
    with pytest.raises(ValueError, match=text):
        plan_rewrite(model, rank=1, calibration_data=data)


def test_shapes_of_several_inputs_are_checked():
    inputs = {"b": keras.Input((8,), name="b"), "a": keras.Input((1,), name="a")}
    outputs = layers.Dense(8)(layers.Concatenate()([inputs["a"], inputs["b"]]))
    model = keras.Model(inputs, outputs)
    plan_rewrite(model, rank=1, calibration_data={"a": np.ones(5), "b": np.ones((5, 8))})
    data = {"a": np.ones((5, 8)), "b": np.ones((5, 8))}
    with pytest.raises(ValueError, match=r"inputs 'a' of shape .* of shape \(5, 8\), \(5, 8\)"):
        plan_rewrite(model, rank=1, calibration_data=data)


@pytest.mark.parametrize("data", [np.ones((5, 64)).tolist(), "x" * 1000])
def test_calibration_data_of_another_type_are_not_printed(data):
    with pytest.raises((TypeError, ValueError), match="Received: ") as caught:
        plan_rewrite(mlp(64, 64), rank=1, calibration_data=data)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("path", ["model.keras", pathlib.Path("model.keras")])
def test_a_path_is_no_model(path):
    with pytest.raises(ValueError, match=r"Load it first: keras.models.load_model\('model.keras'"):
        plan_rewrite(path)


def test_models_that_are_not_built_are_refused():
    with pytest.raises(ValueError, match="must be a built Keras model"):
        plan_rewrite(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(ValueError, match="must be a built Keras model"):
        plan_rewrite(layers.Dense(3))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"layers": [{}], "other_parameters": 0}'])
def test_texts_that_are_no_plans_are_refused(text):
    with pytest.raises(ValueError, match="The text is no plan"):
        RewritePlan.from_json(text)


def test_layers_that_cannot_be_rewritten_take_no_rank():
    model, _ = model_kinds.sequential()
    plan = plan_rewrite(model, rank=1)
    path = next(path for path, layer in plan.items() if layer.type == "BatchNormalization")
    with pytest.raises(ValueError, match="cannot be rewritten: no projection"):
        plan[path].rank = 2
    with pytest.raises(ValueError, match="cannot be rewritten: no projection"):
        plan[path].factors = (2, 2), (2, 2)
    with pytest.raises(KeyError, match="no layer 'nothing' in the plan"):
        plan["nothing"]


@pytest.mark.parametrize("gates", [0, 3])
@pytest.mark.parametrize("large", [8, 10**6])
def test_remaining_energies_are_those_of_the_nearest_sums(gates, large, monkeypatch):
    monkeypatch.setattr("keras_bilinear.kronecker.nearest.LARGE", large)
    rng = np.random.default_rng(0)
    options = {"blocks": gates, "share_right": False} if gates else {}
    plan = Factorization.create(input_dim=64, output_dim=100, rank=1, **options)
    # Singular values that fall, as those of trained kernels do.
    scales = np.exp(-np.arange(64) / 8)[:, None]
    blocks = [np.linalg.qr(rng.normal(size=(64, 64)))[0] @ (scales * rng.normal(size=(64, 100)))]
    blocks *= max(1, gates)
    energies = remaining_energies(blocks, plan, 6)
    for rank in range(1, 7):
        one = Factorization.create(input_dim=64, output_dim=100, rank=rank)
        left, right = nearest_kronecker_sum(blocks[0], one)
        rest = blocks[0] - sum(np.kron(a, b) for a, b in zip(left, right, strict=True))
        expected = len(blocks) * np.sum(rest**2)
        np.testing.assert_allclose(energies[rank], expected, rtol=1e-2)
    np.testing.assert_allclose(energies[0], sum(np.sum(block**2) for block in blocks))
