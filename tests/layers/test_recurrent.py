import json
from unittest import mock

import keras
import numpy as np
import oracle
import pytest
from backend_gradient import BACKEND, evaluate, largest_tensor, layer_gradients, weighted_output
from hypothesis import given
from hypothesis import strategies as st
from keras import ops, tree

from keras_bilinear import (
    BilinearGRU,
    BilinearGRUCell,
    BilinearLSTM,
    BilinearLSTMCell,
    BilinearSimpleRNN,
    BilinearSimpleRNNCell,
    exporting,
)
from keras_bilinear.kronecker import cost
from keras_bilinear.layers import recurrent

LAYERS = {"simple": BilinearSimpleRNN, "gru": BilinearGRU, "lstm": BilinearLSTM}
CELLS = [BilinearSimpleRNNCell, BilinearGRUCell, BilinearLSTMCell]
IMPLEMENTATIONS = ["factorized", "materialized"]
STEPS, WIDTH, UNITS = 5, 7, 12
# Some steps at the end, some at the beginning, some between, all of them, none.
MASK = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [0] * 5, [1] * 5], bool)
OPTIONS = {
    "plain": {},
    "sequences": {"return_sequences": True, "return_state": True},
    "backwards": {"go_backwards": True, "return_sequences": True},
    "unrolled": {"unroll": True, "return_state": True},
    "no bias": {"use_bias": False},
    "low rank": {"input_factors": (WIDTH, 1), "output_factors": (1, UNITS)},
    "zeros": {"zero_output_for_mask": True, "return_sequences": True},
    "activation": {"activation": "softsign"},
    "dropout": {"dropout": 0.4, "seed": 1},
    "both dropouts": {"dropout": 0.4, "recurrent_dropout": 0.3, "seed": 1},
    "recurrent dropout": {"recurrent_dropout": 0.3, "seed": 1, "return_sequences": True},
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


X = draw(len(MASK), STEPS, WIDTH)


def make(kind, units=UNITS, width=WIDTH, **options):
    options = {"rank": 2, "recurrent_rank": 3, "bias_initializer": "normal", **options}
    if kind == "gru, reset before":
        kind, options = "gru", {"reset_after": False, **options}
    layer = LAYERS[kind](units, **options)
    layer.build((len(X) if layer.stateful else None, STEPS, width))
    return layer


KINDS = [*LAYERS, "gru, reset before"]


def stock_layer(layer):
    """The stock layer with the kernels that NumPy makes of the layer's factors."""
    config = layer.get_config()
    for name in layer.cell.own_arguments:
        del config[name]
    stock = layer.full_class.from_config(config)
    width = layer.cell.factorization.input_dim
    stock.build((len(X) if layer.stateful else None, STEPS, width))
    kernels = [
        np.concatenate(oracle.gate_kernels(kernel)[0], axis=1)
        for kernel in (layer.cell._kernel, layer.cell._recurrent_kernel)
    ]
    stock.set_weights([*kernels, *layer.cell.get_weights()[4:]])
    return stock


def run(layer, x=X, **arguments):
    """Outputs, and states if it returns them, with the dropout of a layer that never ran."""
    if layer.cell.dropout or layer.cell.recurrent_dropout:
        layer.cell.seed_generator.state.assign([layer.cell.seed, 0])
        outputs = layer(x, **arguments)
        as_list = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        return [ops.convert_to_numpy(one) for one in as_list]

    def function(x):
        outputs = layer(x, **arguments)
        return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]

    if BACKEND == "jax":
        import jax

        function = jax.jit(function)
    return [ops.convert_to_numpy(one) for one in function(ops.convert_to_tensor(x))]


def assert_same(first, second, tolerance=2e-6):
    for actual, expected in zip(first, second, strict=True):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_stock_layer_with_the_expanded_kernels(kind, options):
    implementation = IMPLEMENTATIONS[len(options) % 2]
    layer = make(kind, implementation=implementation, **OPTIONS[options])
    stock = stock_layer(layer)
    mask = ops.convert_to_tensor(MASK)
    for arguments in ({}, {"mask": mask, "training": True}):
        assert_same(run(layer, **arguments), run(stock, **arguments))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has sizes that are not known")
@pytest.mark.parametrize("in_steps", [False, True])
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_steps(kind, batch, in_steps, monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(cost, "pays_in_steps", lambda *arguments: in_steps)
    options = OPTIONS["backwards" if in_steps else "sequences"]
    layer = make(kind, implementation="factorized", **options)
    x = tf.constant(X[:2], "float32")  # fewer examples than steps

    def outputs_and_gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = tree.flatten(layer(x))
        return [*outputs, tape.gradient(outputs, x)]

    traced = tf.function(outputs_and_gradient).get_concrete_function(
        tf.TensorSpec((batch, None, X.shape[-1]))
    )
    assert_same(
        *([one.numpy() for one in function(x)] for function in (traced, outputs_and_gradient))
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("cpu_costs")
def test_inputs_are_projected_before_the_loop_or_in_it(kind, implementation, monkeypatch):
    before = make(kind, implementation=implementation, **OPTIONS["both dropouts"])
    within = make(kind, implementation=implementation, **OPTIONS["both dropouts"])
    within.set_weights(before.get_weights())
    assert not before.cell.projects_in_steps(len(X))
    for arguments in ({}, {"mask": ops.convert_to_tensor(MASK), "training": True}):
        expected = run(before, **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(cost, "LOOP_LEAST_MACS", dict.fromkeys(cost.LOOP_LEAST_MACS, 0))
            assert within.cell.projects_in_steps(len(X))
            assert_same(run(within, **arguments), expected)


@pytest.mark.parametrize("options", ["plain", "sequences", "backwards", "no bias", "both dropouts"])
@pytest.mark.parametrize("kind", KINDS)
def test_takes_the_loop_that_keras_has_for_a_gpu(kind, options, monkeypatch):
    monkeypatch.setattr(recurrent, "on_gpu", lambda: True)
    layer = make(kind, **OPTIONS[options])
    stock = stock_layer(layer)
    mask = ops.convert_to_tensor(MASK)
    for arguments in ({}, {"mask": mask, "training": True}):
        assert_same(run(layer, **arguments), run(stock, **arguments))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_keeps_from_jax_what_its_loop_cannot_do(kind, policy, monkeypatch):
    monkeypatch.setattr(recurrent, "on_gpu", lambda: True)
    fails = BACKEND == "jax" and kind == "lstm" and policy != "float32"
    assert make(kind, dtype=policy)._runs_on_gpu() is not fails
    assert not make(kind, dtype=policy, implementation="factorized")._runs_on_gpu()


@pytest.mark.parametrize("use_cudnn", ["auto", True])
def test_a_file_has_no_loop_of_a_gpu(use_cudnn, monkeypatch):
    if BACKEND == "torch":
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    else:
        monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["gpu:0"])
    layer = make("gru", use_cudnn=use_cudnn)
    assert layer._runs_on_gpu()
    with exporting():
        assert not layer._runs_on_gpu()


@pytest.mark.parametrize("kind", LAYERS)
def test_kernels_of_low_rank(kind):
    layer = make(kind, **OPTIONS["low rank"])
    kernels = layer.cell.factorization, layer.cell.recurrent_factorization
    assert all(kernel.is_low_rank for kernel in kernels)
    assert kernels[1].input_factors == (UNITS, 1)
    assert layer.count_params() == sum(
        kernel.blocks * kernel.rank * (kernel.input_dim + UNITS) for kernel in kernels
    ) + sum(np.size(weight) for weight in layer.get_weights()[4:])


@pytest.mark.skipif(BACKEND == "jax", reason="JAX compiles each of the drawn layers")
@given(st.data())
def test_equals_the_stock_layer_for_any_options(data):
    flags = ("return_sequences", "return_state", "go_backwards", "unroll", "use_bias")
    kind = data.draw(st.sampled_from(KINDS))
    options = {flag: data.draw(st.booleans()) for flag in flags}
    if kind == "lstm":
        options["unit_forget_bias"] = data.draw(st.booleans())
    rates = st.sampled_from([0.0, 0.0, 0.5])
    width = data.draw(st.integers(1, 9))
    layer = make(
        kind,
        data.draw(st.integers(1, 9)),
        width,
        **options,
        rank=data.draw(st.integers(1, 3)),
        recurrent_rank=data.draw(st.none() | st.integers(1, 3)),
        implementation=data.draw(st.sampled_from(IMPLEMENTATIONS)),
        dropout=data.draw(rates),
        recurrent_dropout=data.draw(rates),
        zero_output_for_mask=data.draw(st.booleans()),
        seed=1,
    )
    x = draw(len(MASK), STEPS, width)
    arguments = {"training": data.draw(st.booleans())}
    # Keras itself fails with all three on PyTorch.
    unsupported = BACKEND == "torch" and options["unroll"] and options["go_backwards"]
    if not unsupported and data.draw(st.booleans()):
        arguments["mask"] = ops.convert_to_tensor(MASK)
    in_steps = data.draw(st.booleans())
    with mock.patch.object(cost, "pays_in_steps", return_value=in_steps):
        actual = run(layer, x, **arguments)
    assert_same(actual, run(stock_layer(layer), x, **arguments))


@pytest.mark.parametrize("in_steps", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, implementation, in_steps, monkeypatch):
    """Those of the stock layer's kernels by the chain rule, divided by the gain."""
    monkeypatch.setattr(cost, "pays_in_steps", lambda *arguments: in_steps)
    layer = make(kind, implementation=implementation, return_sequences=True)
    stock = stock_layer(layer)
    weights = draw(len(X), STEPS, UNITS, seed=1)
    *kernels, bias, inputs = layer_gradients(stock, X, weights)
    expected = []
    pairs = (layer.cell._kernel, layer.cell._recurrent_kernel)
    for kernel, full in zip(pairs, kernels, strict=True):
        plan, (_, left, right) = kernel.factorization.block, oracle.gate_kernels(kernel)
        of_gates = [
            oracle.factor_gradients(oracle.pad_like(block, plan), one_left, one_right)
            for block, one_left, one_right in zip(
                np.split(full, len(left), axis=1), left, right, strict=True
            )
        ]
        expected += map(np.array, zip(*of_gates, strict=True))
    actual = layer_gradients(layer, X, weights, training=True)
    for gradient, reference in zip(actual, [*expected, bias, inputs], strict=True):
        scale = np.abs(reference).max()
        np.testing.assert_allclose(gradient / scale, reference / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_state(kind):
    layer = make(kind, return_state=True)
    states = [draw(len(X), UNITS, seed=i) for i in range(len(layer.state_size))]
    arguments = {"initial_state": [ops.convert_to_tensor(state) for state in states]}
    assert_same(run(layer, **arguments), run(stock_layer(layer), **arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_stateful(kind):
    layer = make(kind, stateful=True)
    stock = stock_layer(layer)
    outputs = [[ops.convert_to_numpy(one(X)) for _ in range(2)] for one in (layer, stock)]
    assert_same(*outputs)
    assert not np.allclose(outputs[0][0], outputs[0][1])
    again = layer.expand()
    assert_same([ops.convert_to_numpy(again(X))], [ops.convert_to_numpy(layer(X))])
    layer.reset_state()
    assert_same([ops.convert_to_numpy(layer(X))], outputs[0][:1])


@pytest.mark.parametrize("cell_class", CELLS)
def test_cells_in_stock_layers(cell_class):
    def cell(units):
        return cell_class(units, rank=2, recurrent_rank=1, bias_initializer="normal")

    for cells in (cell(8), [cell(8), cell(6)]):
        layer = keras.layers.RNN(cells, return_sequences=True)
        layer.build(X.shape)
        outputs = evaluate(layer, X)
        inner = cells if isinstance(cells, list) else [cells]
        full = [one.expand() for one in inner]
        assert all(type(one) is cell_class.full_class for one in full)
        stock = keras.layers.RNN(full if len(full) > 1 else full[0], return_sequences=True)
        stock.build(X.shape)
        assert_same([outputs], [evaluate(stock, X)])


def wrappers():
    lstm = {"return_sequences": True, "rank": 2}
    bidirectional = keras.layers.Bidirectional(BilinearLSTM(8, **lstm))
    return {
        "bidirectional": (bidirectional, (STEPS, WIDTH)),
        "bidirectional gru": (keras.layers.Bidirectional(BilinearGRU(8)), (STEPS, WIDTH)),
        "time distributed": (
            keras.layers.TimeDistributed(BilinearSimpleRNN(6)),
            (3, STEPS, WIDTH),
        ),
        "rnn of cells": (
            keras.layers.RNN([BilinearGRUCell(8), BilinearLSTMCell(6, rank=2)]),
            (STEPS, WIDTH),
        ),
        "lstm": (BilinearLSTM(8, recurrent_rank=2, dropout=0.2, seed=3), (STEPS, WIDTH)),
    }


@pytest.mark.parametrize("name", wrappers())
def test_trains_saves_and_loads(name, tmp_path):
    layer, shape = wrappers()[name]
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    x = draw(8, *shape)
    y = np.ones_like(model.predict(x, verbose=0))
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    before = model.get_weights()
    loss = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert loss[-1] < loss[0]
    changed = [np.any(old != new) for old, new in zip(before, model.get_weights(), strict=True)]
    assert all(changed)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    # Not `evaluate`: JAX keeps what it traced of the model before it was trained.
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize("kind", KINDS)
def test_from_full_and_expand(kind):
    # Widths that need no padding: what it holds is lost in the full kernel.
    options = {"dropout": 0.25, "seed": 5, "return_sequences": True, "name": "recurrent"}
    layer = make(kind, width=6, **options)
    full = layer.expand()
    assert type(full) is layer.full_class
    x = X[..., :6]
    assert_same([evaluate(full, x)], [evaluate(layer, x)])
    again = type(layer).from_full(full, rank=2, recurrent_rank=3)
    assert again.get_config() == layer.get_config()
    assert_same([evaluate(again, x)], [evaluate(layer, x)], 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_at_the_sufficient_rank_it_trains_at_the_pace_of_the_stock_layer(kind):
    """Not by the same curve: both factors move, where the full kernel is one."""
    full = LAYERS[kind].full_class(6, bias_initializer="normal")
    full.build((None, STEPS, 6))
    layer = LAYERS[kind].from_full(full, rank=6, recurrent_rank=6)
    for name in ("factorization", "recurrent_factorization"):
        assert getattr(layer.cell, name).sufficient_rank <= 6
    x = draw(8, STEPS, 6)
    assert_same([evaluate(layer, x)], [evaluate(full, x)], 1e-5)
    losses = []
    for one in (layer, full):
        model = keras.Sequential([keras.Input((STEPS, 6)), one])
        model.compile(keras.optimizers.Adam(1e-3), "mse", jit_compile=BACKEND == "jax")
        history = model.fit(x, np.ones((8, 6)), epochs=10, batch_size=8, verbose=0)
        losses.append(history.history["loss"])
    pace = (losses[0][0] - losses[0][-1]) / (losses[1][0] - losses[1][-1])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    assert 0.5 < pace < 2


def test_from_full_refuses():
    full = keras.layers.LSTM(6)
    with pytest.raises(ValueError, match=r"`BilinearLSTM.from_full` takes a built layer"):
        BilinearLSTM.from_full(full)
    full.build((None, STEPS, 4))
    with pytest.raises(TypeError, match=r"`BilinearGRU.from_full` takes a `keras.layers.GRU`"):
        BilinearGRU.from_full(full)
    full.cell.recurrent_kernel.assign(np.full((6, 24), np.nan))
    with pytest.raises(ValueError, match=r"takes finite weights.* in `recurrent_kernel`"):
        BilinearLSTM.from_full(full)


@pytest.mark.parametrize("kind", LAYERS)
def test_config_round_trip(kind):
    options = {
        "recurrent_rank": 4,
        "input_factors": (2, 4),
        "output_factors": (3, 4),
        "implementation": "factorized",
        "return_sequences": True,
        "kernel_regularizer": keras.regularizers.L2(0.1),
        "recurrent_constraint": keras.constraints.MaxNorm(2.0),
        "dropout": 0.1,
        "seed": 3,
        "dtype": "mixed_bfloat16",
        "name": "recurrent",
        "trainable": False,
        "zero_output_for_mask": True,
    }
    layer = make(kind, **options)
    config = json.loads(json.dumps(layer.get_config()))
    again = LAYERS[kind].from_config(config)
    assert json.loads(json.dumps(again.get_config())) == config
    assert again.name == "recurrent"
    assert again.compute_dtype == again.cell.compute_dtype == "bfloat16"
    again.build((None, STEPS, WIDTH))
    assert again.cell.factorization == layer.cell.factorization
    assert again.trainable_variables == []
    assert again.zero_output_for_mask


def test_positional_arguments_are_those_of_the_stock_layer():
    layer = BilinearLSTM(8, "relu", "hard_sigmoid", False)
    assert layer.activation is keras.activations.relu
    assert layer.recurrent_activation is keras.activations.hard_sigmoid
    assert not layer.use_bias
    assert BilinearGRUCell(8, "relu").activation is keras.activations.relu


@pytest.mark.parametrize("layer_class", [*LAYERS.values(), *CELLS])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"units": 0}, "expected a positive integer"),
        ({"units": -3}, "expected a positive integer"),
        ({"units": 2.5}, "must be a positive integer|must be an integer"),
        ({"rank": 0}, "`rank` must be a positive integer"),
        ({"rank": True}, "`rank` must be a positive integer"),
        ({"recurrent_rank": 1.0}, "`recurrent_rank` must be a positive integer"),
        ({"implementation": 2}, "`implementation` must be one of"),
        ({"input_factors": (0, 3)}, "must be a positive integer"),
        ({"output_factors": (2, 3)}, "must be at least 8"),
    ],
)
def test_refuses(layer_class, arguments, text):
    with pytest.raises(ValueError, match=text):
        layer_class(**{"units": 8, **arguments})


def test_refuses_use_cudnn_as_the_stock_layer_does():
    with pytest.raises(ValueError, match="use_cudnn"):
        BilinearLSTM(8, use_cudnn="always")


@pytest.mark.parametrize("kind", LAYERS)
def test_refuses_inputs(kind):
    layer = LAYERS[kind](8)
    with pytest.raises(ValueError, match="must be known"):
        layer.build((None, STEPS, None))
    assert layer.cell.weights == []
    with pytest.raises(AttributeError, match=r"You must build|has no attribute"):
        LAYERS[kind](8).expand()


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_no_tensor_of_the_size_of_the_kernel(kind):
    layer = make(kind, 256, 256, rank=1, recurrent_rank=1, implementation="factorized")
    x, weights = draw(2, 3, 256), draw(2, 256, seed=1)
    function = weighted_output(layer, None, weights, training=True)
    largest = largest_tensor(function, *layer.get_weights(), x)
    assert largest < 256 * 256 / 4


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_recurrent_kernel_starts_orthogonal(kind, rank):
    layer = make(kind, 36, recurrent_rank=rank)
    kernel = ops.convert_to_numpy(layer.cell.recurrent_kernel)
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(36), atol=1e-5)
    for gate in np.split(kernel, layer.cell.gates, axis=1):
        np.testing.assert_allclose(gate @ gate.T, np.eye(36) / layer.cell.gates, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_starts_with_the_variance_of_the_stock_layer(kind):
    kernels = [
        ops.convert_to_numpy(make(kind, 36, 49, rank=rank).cell.kernel)
        for rank in (1, 3)
        for _ in range(20)
    ]
    gates = LAYERS[kind].cell_class.gates
    np.testing.assert_allclose(np.std(kernels), np.sqrt(2 / (49 + gates * 36)), rtol=0.1)


@pytest.mark.parametrize("name", ["zeros", "ones", "identity"])
def test_fixed_initializers(name):
    cell = make("gru", 9, 9, kernel_initializer=name, recurrent_initializer=name).cell
    full = keras.layers.GRUCell(9, kernel_initializer=name, recurrent_initializer=name)
    full.build((None, 9))
    for kernel in ("kernel", "recurrent_kernel"):
        actual, expected = (ops.convert_to_numpy(getattr(one, kernel)) for one in (cell, full))
        np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(kind, policy):
    layer = make(kind, return_sequences=True)
    mixed = make(kind, return_sequences=True, dtype=policy)
    mixed.set_weights(layer.get_weights())
    outputs = mixed(X)
    assert keras.backend.standardize_dtype(outputs.dtype) == policy.removeprefix("mixed_")
    assert {variable.dtype for variable in mixed.weights} == {"float32"}
    actual = ops.convert_to_numpy(ops.cast(outputs, "float32"))
    np.testing.assert_allclose(actual, evaluate(layer, X), atol=0.1)
