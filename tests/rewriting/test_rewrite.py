import pathlib
import pickle
import subprocess
import sys

import keras
import model_kinds
import numpy as np
import pytest
from keras import layers, ops, tree

import keras_bilinear
from keras_bilinear import (
    BilinearRewrite,
    Rewriter,
    expand_model,
    plan_rewrite,
    rewrite_model,
    summarize,
)
from keras_bilinear.keras_private.cloning import copy_flags, copy_model, public_names
from keras_bilinear.keras_private.graph import all_layers, sublayers
from keras_bilinear.layers.converter import is_bilinear
from keras_bilinear.rewriting import calls
from keras_bilinear.rewriting.calls import check_calls
from keras_bilinear.rewriting.sites import walk

BILINEAR = tuple(vars(keras_bilinear.layers).values())


def outputs(model, x):
    return [ops.convert_to_numpy(y) for y in tree.flatten(model(x, training=False))]


def assert_same(actual, expected, atol=1e-5):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)


def types(model):
    return [type(site.layer) for site in walk(model)]


@pytest.fixture(params=model_kinds.KINDS, ids=lambda make: make.__name__)
def kind(request):
    keras.utils.set_random_seed(0)
    return request.param()


def test_every_kind_of_model_is_rewritten_saved_and_expanded(kind, tmp_path):
    model, x = kind
    before, expected = model.get_weights(), outputs(model, x)
    plan = plan_rewrite(model, rank=1)
    small = rewrite_model(model, plan)
    for layer_type, rank in zip(types(small), (plan[path].rank for path in plan), strict=True):
        assert (layer_type in BILINEAR) == (rank is not None)
    assert small.count_params() == plan.parameters < model.count_params()
    assert small.name == model.name
    actual = outputs(small, x)

    for values, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(values, now)
    assert_same(outputs(model, x), expected, atol=0)

    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    assert types(loaded) == types(small)
    assert_same(outputs(loaded, x), actual)

    full = expand_model(small)
    assert all(map(issubclass, types(model), types(full)))
    for site, expanded in zip(walk(model), walk(full), strict=True):
        assert public_names(expanded.layer) == public_names(site.layer)
    assert full.count_params() == model.count_params()
    assert_same(outputs(full, x), actual)
    full.save(tmp_path / "full.keras")
    assert_same(outputs(keras.models.load_model(tmp_path / "full.keras"), x), actual)


def test_every_kind_of_model_is_fitted_and_trains(kind):
    model, x = kind
    small = rewrite_model(model, rank=1, calibration_data=[x])
    targets = [y + 1 for y in outputs(small, x)]
    # TensorFlow traces the loops over time for half a minute.
    loops = any(isinstance(layer, layers.RNN) for layer in small.layers)
    eager = keras.config.backend() == "tensorflow" and loops
    losses = ["mse"] * len(targets) if len(targets) > 1 else "mse"
    small.compile("adam", losses, run_eagerly=eager)
    before = [(v.path, ops.convert_to_numpy(v)) for v in small.trainable_variables]
    small.fit(x, targets if len(targets) > 1 else targets[0], batch_size=8, verbose=0)
    for (path, values), variable in zip(before, small.trainable_variables, strict=True):
        if path.endswith("key/bias"):  # it adds the same to all scores, so it has no gradient
            continue
        assert not np.array_equal(values, ops.convert_to_numpy(variable)), path


def trained_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.images / 16).astype("float32").reshape(-1, 64), digits.target
    keras.utils.set_random_seed(0)
    hidden = (layers.Dense(64, activation="relu") for _ in range(2))
    model = keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    model.fit(x[:1500], y[:1500], epochs=15, verbose=0)
    return model, x, y


def test_calibration_keeps_what_a_trained_model_has_learned():
    model, x, y = trained_digits()
    rng = np.random.default_rng(0)

    def accuracy(model):
        return model.evaluate(x[1500:], y[1500:], verbose=0, return_dict=True)["accuracy"]

    full = accuracy(model)
    assert full > 0.85
    nearest = accuracy(rewrite_model(model, rank=4))
    fitted = accuracy(rewrite_model(model, rank=4, calibration_data=x[:1500]))
    assert fitted > nearest + 0.2
    assert fitted > full - 0.15
    # What is no data of the model does worse.
    noise = rng.normal(size=x[:1500].shape).astype("float32")
    assert fitted > accuracy(rewrite_model(model, rank=4, calibration_data=noise))


def test_compile_state_carries_over():
    model, x = model_kinds.sequential()
    model.compile(keras.optimizers.SGD(0.25, momentum=0.5), "mae", metrics=["mse"])
    small = rewrite_model(model, rank=1)
    assert small.optimizer is not model.optimizer
    assert isinstance(small.optimizer, keras.optimizers.SGD)
    assert float(small.optimizer.learning_rate) == 0.25
    assert small.loss == "mae"
    names = small.evaluate(x, np.zeros((40, 30)), return_dict=True, verbose=0)
    assert set(names) == {"loss", "mse"}
    assert not rewrite_model(model_kinds.sequential()[0], rank=1).compiled


@pytest.mark.skipif(keras.config.backend() != "torch", reason="the parameters of PyTorch")
def test_pytorch_sees_the_factors_only():
    model, _ = model_kinds.sequential()
    small = rewrite_model(model, rank=1)
    full = expand_model(small)
    for one in (small, full):
        assert sum(parameter.numel() for parameter in one.parameters()) == one.count_params()
    full.load_state_dict(model.state_dict(), strict=False)
    rewrite_model(model, rank=1).load_state_dict(small.state_dict())


def unregistered(targets, outputs):
    return ops.mean(ops.abs(targets - outputs))


def test_losses_and_metrics_that_keras_cannot_save_carry_over():
    model, x = model_kinds.sequential()
    metrics = [unregistered, keras.metrics.MeanSquaredError(name="own")]
    targets = np.zeros((40, 30))
    for loss in (unregistered, keras.losses.Huber(0.3)):  # whose configuration has no delta
        model.compile("adam", loss, metrics=metrics)
        model.fit(x, targets, verbose=0)
        expected = model.evaluate(x, targets, return_dict=True, verbose=0)
        copy = expand_model(model)
        assert copy.evaluate(x, targets, return_dict=True, verbose=0) == pytest.approx(expected)
        copy.fit(x, targets, verbose=0)
        assert float(metrics[1].result()) == pytest.approx(expected["own"])
        assert rewrite_model(model, rank=1).compiled


def test_what_cannot_be_compiled_alike_is_not_lost(caplog):
    model, _ = model_kinds.sequential()
    model.compile("adam", "mse", metrics=[keras.metrics.MeanMetricWrapper(unregistered)])
    small = rewrite_model(model, rank=1)
    assert not small.compiled
    assert small.count_params() < model.count_params()
    assert "is not compiled, as the optimizer or a metric" in caplog.text


def test_stateful_layers_keep_their_states():
    x = np.ones((2, 5, 16), "float32")
    gru = layers.GRU(16, stateful=True)
    model = keras.Sequential([keras.Input((5, 16), batch_size=2), gru, layers.Dense(16)])
    model.predict(x, verbose=0)
    (state,) = gru.states
    before = ops.convert_to_numpy(state).copy()
    small = rewrite_model(model, budget=0.5, calibration_data=[x, x])
    summarize(model)
    np.testing.assert_array_equal(ops.convert_to_numpy(state), before)
    (state,) = small.layers[0].states
    assert not ops.convert_to_numpy(state).any()


def test_arrays_come_in_batches_of_a_fixed_size():
    model = keras.Sequential([keras.Input((5, 16), batch_size=4), layers.GRU(16, stateful=True)])
    x = np.random.default_rng(0).random((12, 5, 16)).astype("float32")
    batches = np.split(x, 3)
    for function in (plan_rewrite, rewrite_model):
        outcomes = [function(model, rank=1, calibration_data=data) for data in (x, batches)]
        if function is plan_rewrite:
            assert outcomes[0].to_json() == outcomes[1].to_json()
    assert summarize(model, x).latency_ms > 0


def test_a_list_of_arrays_is_for_a_model_of_several_inputs():
    model, x = model_kinds.two_inputs()
    model = keras.Model([*model.input.values()], model.output)
    x = [*x.values()]
    both = [[part[:16] for part in x], [part[16:] for part in x]]
    errors = [
        [layer.error for layer in plan_rewrite(model, rank=1, calibration_data=data).values()]
        for data in (x, (x, "labels"), [(one,) for one in both])
    ]
    assert errors[0] == errors[1]
    np.testing.assert_allclose(errors[0], errors[2], rtol=1e-4)
    assert summarize(model, x).latency_ms > 0


def test_layers_with_a_constraint_are_left_alone():
    dense = layers.Dense(16, kernel_constraint="non_neg", bias_constraint="non_neg", name="dense")
    free = layers.Dense(16, bias_constraint="non_neg", name="free")
    gru = layers.GRU(16, recurrent_constraint="unit_norm", name="gru")
    model = keras.Sequential([keras.Input((5, 16)), dense, free, gru])
    plan = plan_rewrite(model, rank=1)
    assert plan["free"].rank == 1
    for name in ("dense", "gru"):
        assert plan[name].rank is None
        assert plan[name].reason == "has a constraint, which factors do not keep"


def test_owners_can_be_pickled():
    x = np.random.default_rng(0).random((2, 5, 16)).astype("float32")
    attention = layers.MultiHeadAttention(2, 8)
    inputs = keras.Input((5, 16))
    small = rewrite_model(keras.Model(inputs, attention(inputs, inputs)), rank=1)
    loaded = pickle.loads(pickle.dumps(small))
    np.testing.assert_allclose(loaded.predict(x, verbose=0), small.predict(x, verbose=0), rtol=1e-6)
    owner = pickle.loads(pickle.dumps(small.layers[-1]))
    assert type(owner) is type(small.layers[-1])


def test_of_a_tuple_the_inputs_count():
    model, x = model_kinds.sequential()
    expected, actual = (
        [one.error for one in plan_rewrite(model, rank=1, calibration_data=data).values()]
        for data in (x, (x, 1000 * x))
    )
    assert actual == expected


def test_inputs_of_different_lengths_are_refused():
    inputs = {name: keras.Input((8,), name=name) for name in "ab"}
    model = keras.Model(inputs, [layers.Dense(8)(one) for one in inputs.values()])
    data = {"a": np.ones((100, 8)), "b": np.ones((50, 8))}
    with pytest.raises(ValueError, match=r"as many examples each. Received: .*100.*50"):
        rewrite_model(model, rank=1, calibration_data=data)


def test_flags_and_policies_carry_over():
    policy = keras.DTypePolicy("mixed_bfloat16")
    dense = layers.Dense(24, dtype=policy, name="mixed", activation="tanh")
    frozen = layers.Dense(24, trainable=False, kernel_regularizer="l2", name="frozen")
    model = keras.Sequential([keras.Input((24,)), dense, frozen])
    small = rewrite_model(model, rank=1)
    assert small.get_layer("mixed").dtype_policy.name == "mixed_bfloat16"
    assert small.get_layer("mixed").activation is keras.activations.tanh
    assert not small.get_layer("frozen").trainable
    assert isinstance(small.get_layer("frozen").kernel_regularizer, keras.regularizers.L2)
    assert len(small.trainable_variables) == 3


def flags(layer):
    """The flag of each layer in a layer, by its position."""
    found = [layer.trainable]
    return [*found, *(flags(child) for child in sublayers(layer))]


@keras.saving.register_keras_serializable("test")
class FrozenWeight(layers.Layer):
    """Makes a variable that trains only if the layer is trainable at that moment."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(), initializer="ones", trainable=self.trainable)

    def call(self, inputs):
        return inputs * self.scale


def make_frozen():
    """A model of which all but the last layer and the LSTM's bias is frozen after it was built."""
    base = keras.Sequential(
        [
            keras.Input((4, 16)),
            layers.Dense(32, activation="relu"),
            FrozenWeight(),
            keras.Sequential([layers.LSTM(24)]),
        ],
        name="base",
    )
    inputs = keras.Input((4, 16))
    model = keras.Model(inputs, layers.Dense(16)(layers.Dense(24)(base(inputs))))
    base.trainable = False
    model.layers[-2].trainable = False
    return model


def train(model):
    """Trains one step; returns which variables moved."""
    before = [ops.convert_to_numpy(v).copy() for v in model.weights]
    model.compile("sgd", "mse", jit_compile=False)
    model.train_on_batch(np.ones((2, 4, 16), "float32"), np.ones((2, 16), "float32"))
    after = [ops.convert_to_numpy(v) for v in model.weights]
    return [bool(np.any(a != b)) for a, b in zip(after, before, strict=True)]


@pytest.mark.parametrize("way", ["copy", "rewrite", "clone", "expand"])
def test_frozen_layers_stay_frozen_until_they_are_unfrozen(way):
    model = make_frozen()
    small = {
        "copy": lambda: copy_model(model),
        "rewrite": lambda: rewrite_model(model, rank=1),
        "clone": lambda: keras.models.clone_model(model, clone_function=Rewriter(1)),
        "expand": lambda: expand_model(rewrite_model(model, rank=1)),
    }[way]()
    base = small.get_layer("base")
    assert flags(small) == flags(model)
    assert (types(small) == types(model)) == (way in ("copy", "expand"))
    assert not base.trainable_weights
    assert len(small.trainable_weights) < len(small.weights) - len(base.weights)
    moved = dict(zip(map(id, small.weights), train(small), strict=True))
    assert not any(moved[id(v)] for v in base.weights)
    assert any(moved.values())

    base.trainable = True
    assert len(base.trainable_weights) == len(base.weights)
    moved = dict(zip(map(id, small.weights), train(small), strict=True))
    assert sum(moved[id(v)] for v in base.weights) == len(base.weights)

    small.layers[-2].trainable = True
    assert all(train(small))


def test_a_frozen_variable_stays_frozen():
    model = keras.Sequential([keras.Input((64,)), layers.Dense(64)])
    model.layers[0].kernel.trainable = False
    small = rewrite_model(model, rank=1)
    assert [v.trainable for v in small.weights] == [False, False, True]
    assert [v.trainable for v in expand_model(small).weights] == [False, True]


def test_a_trainable_layer_of_several_frozen_owners_keeps_its_flag():
    def make():
        shared = layers.Dense(16)
        owners = [keras.Sequential([keras.Input((16,)), shared]) for _ in range(2)]
        return keras.Sequential(owners)

    model, copy = make(), make()
    model.trainable = False
    model.layers[0].layers[0].trainable = True
    copy_flags(model, copy)
    assert flags(copy) == flags(model)


def test_shared_layers_stay_shared():
    model, x = model_kinds.shared()
    small = rewrite_model(model, rank=1)
    assert len([*walk(small)]) == 2
    name = next(walk(small)).layer.name
    dense = small.get_layer(name)
    once = dense(x)
    expected = small.layers[-1](ops.add(dense(once), x))
    assert_same(outputs(small, x), [ops.convert_to_numpy(expected)])


def test_models_built_from_a_model_keep_working():
    model, x = model_kinds.sequential()
    inner = keras.Model(model.inputs, model.layers[0].output)
    before = outputs(inner, x)
    rewrite_model(model, rank=1)
    assert_same(outputs(inner, x), before, atol=0)
    small = rewrite_model(model, rank=1)
    inner = keras.Model(small.inputs, small.layers[0].output)
    assert_same(outputs(inner, x), [ops.convert_to_numpy(small.layers[0](x))])


SCRIPT = """
import sys
import numpy as np
import keras
import keras_bilinear
sys.path.insert(0, sys.argv[1])
import model_kinds
for path in sys.argv[2:]:
    model = keras.models.load_model(path)
    np.save(path + ".npy", keras.ops.convert_to_numpy(model(model_kinds.VECTORS)))
"""


def test_rewritten_composites_load_in_a_fresh_process(tmp_path):
    models = [make()[0] for make in (model_kinds.composite, model_kinds.subclassed)]
    models = [rewrite_model(model, rank=1) for model in models]
    files = [str(tmp_path / f"{i}.keras") for i, _ in enumerate(models)]
    for model, file in zip(models, files, strict=True):
        model.save(file)
    folder = str(pathlib.Path(model_kinds.__file__).parent)
    subprocess.run([sys.executable, "-c", SCRIPT, folder, *files], check=True)
    for model, file in zip(models, files, strict=True):
        expected = outputs(model, model_kinds.VECTORS)[0]
        np.testing.assert_allclose(np.load(f"{file}.npy"), expected, atol=1e-5)


def test_owners_keep_their_class_name_and_become_plain_again():
    model, _ = model_kinds.composite()
    small = rewrite_model(model, rank=1)
    block = small.layers[1]
    assert type(block).__name__ == "Block"
    assert isinstance(block, model_kinds.Block)
    assert type(block) is not model_kinds.Block
    assert type(expand_model(small).layers[1]) is model_kinds.Block


def test_rewriting_twice_leaves_bilinear_layers_alone():
    model, _ = model_kinds.subclassed()
    small = rewrite_model(model, rank=1)
    plan = plan_rewrite(small, rank=1)
    assert {layer.reason for layer in plan.values()} == {"bilinear already"}
    again = rewrite_model(small, plan)
    for a, b in zip(small.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", [model_kinds.nested, model_kinds.attention, model_kinds.composite])
def test_cloning_with_a_rewriter_is_rewriting(make, tmp_path):
    model, x = make()
    plan = plan_rewrite(model, rank=1)
    for argument in (plan, 1):
        small = keras.models.clone_model(model, clone_function=Rewriter(argument))
        assert small.count_params() == plan.parameters
        assert_same(outputs(small, x), outputs(rewrite_model(model, plan), x))
        small.save(tmp_path / "small.keras")
        loaded = keras.models.load_model(tmp_path / "small.keras")
        assert_same(outputs(loaded, x), outputs(small, x))


def test_rewriters_take_a_plan_or_a_rank():
    with pytest.raises(ValueError, match="`plan` must be a positive integer"):
        Rewriter("everything")


class Unregistered(keras.Model):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.dense = layers.Dense(24)

    def call(self, x):
        return self.function(self.dense(x))


def test_a_model_that_cannot_be_copied_is_refused():
    model = Unregistered(lambda x: x)
    model(np.ones((1, 24), "float32"))
    with pytest.raises(ValueError, match="cannot be copied, as Keras cannot save and load it"):
        rewrite_model(model, rank=1)


def test_what_a_layer_was_adapted_to_is_kept():
    x = 20 + 5 * np.random.default_rng(0).normal(size=(50, 24)).astype("float32")
    normalization = layers.Normalization()
    normalization.adapt(x)
    hidden = layers.Dense(24, "relu", name="hidden")
    model = keras.Sequential([keras.Input((24,)), normalization, hidden, layers.Dense(4)])
    same = keras.models.clone_model(model, clone_function=Rewriter(1000))
    assert_same(outputs(same, x), outputs(model, x))
    wide = rewrite_model(model, rank=4, scale=2, layers={"hidden": 4})
    assert_same(outputs(wide.layers[0], x), outputs(normalization, x))


def test_a_plan_of_another_model_is_refused():
    model, _ = model_kinds.sequential()
    plan = plan_rewrite(model_kinds.convolutional()[0], rank=1)
    with pytest.raises(ValueError, match="not one of the model"):
        rewrite_model(model, plan)
    wider = keras.Sequential([keras.Input((24,)), layers.Dense(40, name="hidden")])
    narrow = keras.Sequential([keras.Input((24,)), layers.Dense(20, name="hidden")])
    plan = plan_rewrite(narrow, rank=1)
    with pytest.raises(ValueError, match="'hidden' has 1,000 parameters, and not 500"):
        rewrite_model(wider, plan)
    plan["hidden"].rank = 10_000
    with pytest.raises(ValueError, match=r"must be at most 16, .* Received: rank=10000"):
        rewrite_model(narrow, plan)


def test_a_plan_and_a_limit_exclude_each_other():
    model, _ = model_kinds.sequential()
    with pytest.raises(ValueError, match="exclude each other"):
        rewrite_model(model, plan_rewrite(model, rank=1), budget=0.5)
    with pytest.raises(ValueError, match="exclude each other"):
        rewrite_model(model, plan_rewrite(model, rank=1), rank=2)
    with pytest.raises(ValueError, match="exclude each other"):
        rewrite_model(model, plan_rewrite(model, rank=1), low_rank=False)


@pytest.mark.parametrize("budget", [0.5, np.float32(0.5)])
def test_a_number_in_place_of_a_plan_is_a_budget(budget):
    model, _ = model_kinds.sequential()
    small = rewrite_model(model, budget)
    assert small.count_params() == rewrite_model(model, budget=0.5).count_params()
    with pytest.raises(ValueError, match="budget is given twice"):
        rewrite_model(model, budget, budget=0.5)
    with pytest.raises(ValueError, match="`budget` must be above 0 and at most 1"):
        rewrite_model(model, True)


def test_what_is_no_plan_is_refused():
    model, x = model_kinds.sequential()
    text = rf"no plan: give it as calibration_data=\. Received: an array of shape \({len(x)}, "
    with pytest.raises(ValueError, match=text):
        rewrite_model(model, x)
    with pytest.raises(ValueError, match=r"no plan: read its text with RewritePlan\.from_json"):
        rewrite_model(model, "plan.json")


def test_an_iterator_is_read_once():
    model, x = model_kinds.sequential()
    batches = np.array_split(x, 4)
    once = rewrite_model(model, rank=1, calibration_data=iter(batches))
    again = rewrite_model(model, rank=1, calibration_data=batches)
    for a, b in zip(once.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_bad_weights_and_data_are_refused_before_anything_changes():
    model, x = model_kinds.sequential()
    with pytest.raises(ValueError, match="must be finite"):
        rewrite_model(model, rank=1, calibration_data=np.full_like(x, np.nan))
    with pytest.raises(ValueError, match="at least one batch"):
        rewrite_model(model, rank=1, calibration_data=[])
    model.layers[0].kernel.assign(np.full((24, 32), np.inf))
    with pytest.raises(ValueError, match="finite weights"):
        rewrite_model(model, rank=1)
    assert type(model.layers[0]) is layers.Dense


def zero_model():
    """A model with zero kernels, and with a zero gate in an LSTM."""
    model = keras.Sequential(
        [
            keras.Input((6, 16)),
            layers.LSTM(12, return_sequences=True, name="lstm"),
            layers.Dense(24, kernel_initializer="zeros", bias_initializer="ones", name="dense"),
            layers.Conv1D(16, 3, groups=2, kernel_initializer="zeros", name="conv"),
        ]
    )
    # One gate, of both kernels, is zero.
    for kernel in (model.layers[0].cell.kernel, model.layers[0].cell.recurrent_kernel):
        values = ops.convert_to_numpy(kernel).copy()
        values[:, 12:24] = 0
        kernel.assign(values)
    return model, np.random.default_rng(0).normal(size=(40, 6, 16)).astype("float32")


@pytest.mark.parametrize("way", ["rewrite", "data", "clone", "callback"])
def test_zero_kernels_are_trained(way):
    model, x = zero_model()
    y = np.random.default_rng(1).normal(size=(40, 4, 16)).astype("float32")
    expected = outputs(model, x)
    small = {
        "rewrite": lambda: rewrite_model(model, rank=2),
        "data": lambda: rewrite_model(model, rank=2, calibration_data=x),
        "clone": lambda: keras.models.clone_model(model, clone_function=Rewriter(2)),
        "callback": lambda: model,
    }[way]()
    callbacks = []
    if way == "callback":
        callbacks = [keras_bilinear.BilinearRewrite(at_epoch=0, budget=0.5)]
    else:
        assert_same(outputs(small, x), expected, atol=0)
        assert not np.any(ops.convert_to_numpy(small.get_layer("dense").kernel))
    small.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=False)
    small.fit(x, y, epochs=6, batch_size=40, verbose=0, callbacks=callbacks)
    rewritten = [layer for layer in small.layers if is_bilinear(layer)]
    assert len(rewritten) == 3
    for layer in rewritten:
        for kernel in layer.kernels.values():
            for factor in kernel.read_factors():
                blocks = factor if not kernel.factorization.share_right else factor[None]
                assert np.all(np.abs(blocks).sum(axis=tuple(range(2, blocks.ndim))) > 0)


def test_terms_beyond_the_rank_of_a_kernel_are_trained():
    full = layers.Dense(24)
    full.build((None, 16))
    full.kernel.assign(np.outer(np.arange(16), np.ones(24)))
    more = keras_bilinear.BilinearDense.from_full(
        full, rank=8, input_factors=(4, 4), output_factors=(4, 6)
    )
    left, right = more.kernels["kernel"].read_factors()
    dead = ~np.any(right, axis=(1, 2))
    assert dead.sum() >= 6
    assert np.all(left[dead])
    assert len({term.tobytes() for term in left}) == 8
    assert_same([ops.convert_to_numpy(more.kernel)], [ops.convert_to_numpy(full.kernel)])


@keras.saving.register_keras_serializable(package="tests")
class Reads(layers.Layer):
    """A layer that reads the kernel of the layer that it holds, by its place."""

    def __init__(self, units, eager=False, **kwargs):
        super().__init__(**kwargs)
        self.units, self.eager = units, eager
        self.dense = layers.Dense(units, name="inner")

    def build(self, input_shape):
        self.dense.build(input_shape)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def call(self, x):
        if self.eager:
            ops.convert_to_numpy(x)
            return self.dense(x)
        return ops.matmul(x, self.dense.weights[0])

    def get_config(self):
        return {**super().get_config(), "units": self.units, "eager": self.eager}


class Holder(keras.Model):
    def __init__(self, first):
        super().__init__()
        self.first, self.reads, self.head = first, Reads(20, name="reads"), layers.Dense(24)

    def call(self, x):
        return self.head(self.reads(self.first(x)))


def reading_model(kind, eager=False):
    if kind == "sequential":
        reads = [Reads(20, eager, name="reads"), layers.Dense(24)]
        return keras.Sequential([keras.Input((24,)), *reads])
    model = Holder(layers.Identity() if kind == "vectors" else layers.Embedding(50, 24))
    model(model_kinds.VECTORS[:1] if kind == "vectors" else model_kinds.TOKENS[:1])
    return model


CALL = "(?s)'reads' cannot be called once layers of .* exclude=.'reads/inner'.*call"


@pytest.mark.parametrize("way", ["rewrite", "data", "clone"])
def test_a_layer_that_reads_the_weights_of_another_is_named(way):
    model, x = reading_model("sequential"), model_kinds.VECTORS
    rewrite = {
        "rewrite": lambda: rewrite_model(model, rank=1),
        "data": lambda: rewrite_model(model, rank=1, calibration_data=x),
        "clone": lambda: keras.models.clone_model(model, clone_function=Rewriter(1)),
    }[way]
    with pytest.raises(ValueError, match=CALL):
        rewrite()
    small = rewrite_model(model, rank=1, exclude=["reads/inner"])
    assert [is_bilinear(site.layer) for site in walk(small)] == [False, True]


@pytest.mark.parametrize("kind", ["sequential", "vectors"])
def test_the_callback_names_it_and_leaves_the_model_as_it_was(kind):
    model, x = reading_model(kind), model_kinds.VECTORS
    model.compile("sgd", "mse")
    ranks = {site.path: 1 for site in walk(model)}
    for options in ({"calibration_data": x}, {}):
        callback = BilinearRewrite(0, 1.0, layers=ranks, **options)
        with pytest.raises(RuntimeError, match=CALL):
            model.fit(x, x, verbose=0, callbacks=[callback])
    assert not any(is_bilinear(site.layer) for site in walk(model))
    assert not any("call" in vars(layer) for layer in all_layers(model))
    model.fit(x, x, verbose=0)


@pytest.mark.parametrize("kind", ["vectors", "tokens"])
def test_subclassed_models_are_called_without_data(kind):
    model = reading_model(kind)
    with pytest.raises(ValueError, match=CALL):
        check_calls(model, plans_of(model))
    check_calls(model, plans_of(model, only="dense"))


def plans_of(model, only=""):
    """The layers of a model with a plan to make them bilinear at rank 1."""
    plan = plan_rewrite(model, rank=1)
    return [(site, plan[site.path]) for site in walk(model) if only in site.path]


def test_a_model_that_takes_no_symbolic_inputs_is_rewritten_all_the_same():
    small = rewrite_model(reading_model("sequential", eager=True), rank=1)
    assert all(is_bilinear(site.layer) for site in walk(small))


def test_models_of_stock_layers_need_no_call(monkeypatch):
    monkeypatch.setattr(calls, "find_failure", None)
    model = model_kinds.attention()[0]
    rewrite_model(rewrite_model(model, rank=1, exclude=[layers.EinsumDense]), rank=1)


@keras.saving.register_keras_serializable(package="tests")
class Sampler:
    """An object with a configuration, as the sampler of a language model of KerasHub."""

    def __init__(self, k=5):
        self.k = k

    def get_config(self):
        return {"k": self.k}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable(package="tests")
class Task(keras.Sequential):
    """A model that gets a sampler where it is compiled, which its configuration does not have."""

    threshold = 0.5

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.sampler, self.generate_function = Sampler(), None

    def compile(self, *arguments, sampler=None, **options):
        super().compile(*arguments, **options)
        self.sampler = sampler or Sampler()

    def make_generate_function(self):
        self.generate_function = self.call


def task():
    model = Task(
        [keras.Input((24,)), layers.Dense(32, name="first"), model_kinds.Block(32, name="block")]
    )
    model.compile("sgd", "mse", sampler=Sampler(9))
    model.fit(model_kinds.VECTORS, np.ones((40, 32)), verbose=0)
    model.make_generate_function()
    model.labels = ["cat", {"dog": np.arange(3)}]
    model.threshold = 0.9
    model.get_layer("first").note = ("kept", 1)
    model.get_layer("block").hidden[1].note = "inside"
    return model


def attributes(model):
    first, block = model.get_layer("first"), model.get_layer("block")
    labels = model.labels[0], {k: list(v) for k, v in model.labels[1].items()}
    return labels, model.threshold, model.sampler.k, first.note, block.hidden[1].note


WAYS = {
    "rewrite": lambda model: rewrite_model(model, rank=1),
    "scale": lambda model: rewrite_model(model, rank=1, scale=2, exclude=["block"]),
    "expand": lambda model: expand_model(rewrite_model(model, rank=1)),
    "uncompiled": lambda model: copy_model(model),
}


@pytest.mark.parametrize("way", WAYS)
def test_attributes_that_were_set_by_hand_are_kept(way, caplog):
    model = task()
    small = WAYS[way](model)
    assert attributes(small) == attributes(model)
    assert small.labels is not model.labels
    assert small.sampler is not model.sampler
    assert small.generate_function is None
    assert not hasattr(small, "history")
    assert not caplog.records


def test_the_callback_keeps_attributes_that_were_set_by_hand():
    model = task()
    expected = attributes(model)
    tag = model.get_layer("first").tag = object()
    schedule, x = {0: 0.5, 1: 0.3}, model_kinds.VECTORS
    callback = BilinearRewrite(schedule=schedule)
    model.fit(x, np.ones((40, 32)), epochs=2, verbose=0, callbacks=[callback])
    assert is_bilinear(model.get_layer("first"))
    assert attributes(model) == expected
    assert model.get_layer("first").tag is tag


def test_attributes_that_cannot_be_copied_are_reported(caplog):
    model = task()
    model.decode, model.get_layer("first").spy = (lambda y: y), open
    model.call = model.call
    small = rewrite_model(model, rank=1)
    (record,) = caplog.records
    assert record.message.endswith(
        f"Set them again: decode, call of {model.name!r}; spy of 'first'"
    )
    assert not hasattr(small, "decode")


def test_clone_model_keeps_the_attributes_of_layers():
    model = task()
    small = keras.models.clone_model(model, clone_function=Rewriter(1))
    assert is_bilinear(small.get_layer("first"))
    assert small.get_layer("first").note == ("kept", 1)
    assert small.get_layer("block").hidden[1].note == "inside"


def test_texts_with_names_of_layers_are_those_of_the_copy():
    """A layer without a name of its own has another name in a copy."""

    @keras.saving.register_keras_serializable(package="tests")
    class Named(model_kinds.Block):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.order, self.gain = [layer.name for layer in self.hidden], 1.0

    model = keras.Sequential([keras.Input((24,)), Named(24, name="named")])
    model.get_layer("named").gain = 2.0
    small = rewrite_model(model, rank=1).get_layer("named")
    assert list(small.order) == [layer.name for layer in small.hidden]
    assert small.gain == 2.0
