import re

import keras
import numpy as np
import oracle
import pytest
from backend_gradient import BACKEND, evaluate, largest_tensor, layer_gradients, weighted_output
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_bilinear import BilinearDense

# Square, padded on either side, wide, narrow, one row, one column, one number.
SHAPES = [(12, 10), (13, 10), (12, 11), (7, 60), (60, 7), (1, 9), (9, 1), (1, 1)]
RANKS = [1, 3]


def make(dims, activation=None, **arguments):
    layer = BilinearDense(dims[1], activation, bias_initializer="normal", **arguments)
    layer.build((None, dims[0]))
    return layer


def stock_layer(layer):
    """`keras.layers.Dense` with the kernel that NumPy makes of the layer's factors."""
    kernel = oracle.full_kernel(layer)
    stock = keras.layers.Dense(layer.units, layer.activation, layer.use_bias, "zeros")
    stock.build((None, len(kernel)))
    stock.set_weights([kernel, *layer.get_weights()[2:]])
    return stock


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def assert_close(actual, expected):
    actual, expected = ops.convert_to_numpy(actual), ops.convert_to_numpy(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dims", SHAPES)
def test_equals_dense_with_the_expanded_kernel(dims, rank):
    layer = make(dims, "tanh", rank=rank)
    assert_close(layer.kernel, oracle.full_kernel(layer))
    stock = stock_layer(layer)
    for leading in [(3,), (2, 3), (2, 1, 3)]:
        x = draw(*leading, dims[0])
        assert_close(evaluate(layer, x), evaluate(stock, x))


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 4), st.booleans())
def test_equals_dense_for_any_shape(input_dim, units, rank, use_bias):
    layer = make((input_dim, units), use_bias=use_bias, rank=rank, implementation="factorized")
    x = draw(3, input_dim)
    bias = layer.get_weights()[2] if use_bias else 0.0
    assert_close(evaluate(layer, x), x @ oracle.full_kernel(layer) + bias)


@pytest.mark.parametrize("implementation", ["factorized", "materialized"])
@pytest.mark.parametrize("training", [None, True, False])
@pytest.mark.parametrize("dims", SHAPES)
def test_gradients(dims, training, implementation):
    """Those of the stock layer's kernel by the chain rule, divided by the gain."""
    layer = make(dims, "tanh", rank=2, implementation=implementation)
    x, weights = draw(5, dims[0]), draw(5, dims[1], seed=1)
    kernel, bias, inputs = layer_gradients(stock_layer(layer), x, weights)
    kernel = oracle.pad_like(kernel, layer.factorization)
    left, right = oracle.factor_gradients(kernel, *oracle.factors(layer))
    actual = layer_gradients(layer, x, weights, training=training)
    for gradient, expected in zip(actual, (left, right, bias, inputs), strict=True):
        assert_close(gradient, expected)


def test_sgd_moves_the_kernel_as_if_there_were_no_gain():
    """One small step with equal factors: `dW = -lr (LL^T G + G RR^T)` to first order."""
    layer = make((12, 10), use_bias=False)
    model = keras.Sequential([keras.Input((12,)), layer])
    model.compile(keras.optimizers.SGD(1e-4), "mse", jit_compile=False)
    x, y = draw(5, 12), draw(5, 10, seed=1)
    before, factors = oracle.full_kernel(layer), oracle.factors(layer)
    kernel_gradient = x.T @ (2 * (x @ before - y) / y.size)
    model.fit(x, y, verbose=0)
    left, right = oracle.factor_gradients(kernel_gradient, *factors)
    expected = (
        -1e-4
        * layer._kernel.gain
        * (oracle.kronecker_sum(left, factors[1]) + oracle.kronecker_sum(factors[0], right))
    )
    moved = oracle.full_kernel(layer) - before
    np.testing.assert_allclose(moved, expected, atol=0.01 * np.abs(expected).max())


def test_mask_passes_through():
    x = np.array([[[1.0] * 6, [2.0] * 6, [0.0] * 6]], "float32")
    inputs = keras.Input((None, 6))
    outputs = BilinearDense(4)(keras.layers.Masking()(inputs))
    pooled = keras.layers.GlobalAveragePooling1D()(outputs)
    model = keras.Model(inputs, [outputs, pooled])
    outputs, pooled = model.predict(x, verbose=0)
    assert_close(pooled, outputs[:, :2].mean(axis=1))


@pytest.mark.parametrize("shape", [(None, 12), (None, None, 12), (None, 3, None, 12)])
def test_unknown_dimensions_in_a_compiled_function(shape):
    layer = make((12, 10), rank=2)
    sizes = [tuple(size or n for size in shape) for n in (1, 2, 5)]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        function = tf.function(layer, input_signature=[tf.TensorSpec(shape, "float32")])
    else:
        inputs = keras.Input(shape[1:])
        function = keras.Model(inputs, layer(inputs))
    for size in sizes:
        x = draw(*size)
        assert_close(function(ops.convert_to_tensor(x)), stock_layer(layer)(x))


@pytest.mark.parametrize("shape", [(0, 12), (0, 3, 12), (3, 0, 12)])
@pytest.mark.parametrize("implementation", ["factorized", "materialized"])
def test_empty_inputs(shape, implementation):
    layer = make((12, 10), implementation=implementation)
    assert tuple(layer(np.zeros(shape, "float32")).shape) == (*shape[:-1], 10)


def test_a_prime_width_is_padded():
    layer = make((10007, 10007), use_bias=False)
    assert layer.factorization.input_factors == (91, 110)
    assert layer.count_params() == 91 * 91 + 110 * 110
    x = draw(2, 10007)
    left, right = (factor[0] for factor in oracle.factors(layer))
    padded = np.pad(x, ((0, 0), (0, 10010 - 10007))).reshape(2, 91, 110)
    expected = layer._kernel.gain * (left.T @ padded @ right).reshape(2, -1)[:, :10007]
    assert_close(layer(x), expected.astype("float32"))


@pytest.mark.usefixtures("cpu_costs")
def test_auto_materializes_only_where_that_is_cheaper():
    assert make((12, 10), rank=50)._kernel.materialized
    assert not make((64, 64), rank=2)._kernel.materialized
    assert not make((12, 10), rank=50, implementation="factorized")._kernel.materialized
    assert make((64, 64), rank=2, implementation="materialized")._kernel.materialized


@pytest.mark.parametrize("dims", [(4096, 4096), (4095, 4093)])
@pytest.mark.parametrize("training", [True, False])
def test_no_tensor_of_the_size_of_the_kernel(dims, training):
    layer = make(dims, rank=4)
    function = weighted_output(layer, None, draw(2, dims[1]), training=training)
    largest = largest_tensor(function, *layer.get_weights(), draw(2, dims[0]))
    assert layer.factorization.parameters / 2 <= largest <= 4 * layer.factorization.parameters
    assert largest < layer.factorization.full_parameters / 100


def test_a_materialized_kernel_would_be_seen():
    layer = make((256, 256), implementation="materialized")
    function = weighted_output(layer, None, draw(2, 256))
    assert largest_tensor(function, *layer.get_weights(), draw(2, 256)) >= 256 * 256


def test_regularizers_add_a_loss_for_each_factor():
    layer = make(
        (12, 10),
        kernel_regularizer=keras.regularizers.L2(0.1),
        bias_regularizer=keras.regularizers.L1(0.2),
        activity_regularizer=keras.regularizers.L2(0.3),
    )
    weights = layer.get_weights()
    expected = [0.1 * np.sum(w**2) for w in weights[:2]] + [0.2 * np.abs(weights[2]).sum()]
    losses = [ops.convert_to_numpy(loss) for loss in layer.losses]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    layer(draw(2, 12))
    assert len(layer.losses) == 4


def test_constraints_hold_for_each_factor_after_a_step():
    layer = make((12, 10), rank=2, kernel_constraint="non_neg", bias_constraint="non_neg")
    assert all(np.any(weight < 0) for weight in layer.get_weights())
    model = keras.Sequential([keras.Input((12,)), layer])
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(draw(4, 12), draw(4, 10), verbose=0)
    assert all(np.all(weight >= 0) for weight in layer.get_weights())
    assert all(np.any(weight > 0) for weight in layer.get_weights()[:2])


def full_layer(dims=(12, 10), **arguments):
    layer = keras.layers.Dense(dims[1], bias_initializer="normal", **arguments)
    layer.build((None, dims[0]))
    return layer


@pytest.mark.parametrize("dims", SHAPES)
def test_from_full_is_exact_at_the_sufficient_rank(dims):
    full = full_layer(dims)
    rank = BilinearDense.from_full(full).factorization.sufficient_rank
    layer = BilinearDense.from_full(full, rank=rank)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer.kernel), full.get_weights()[0], rtol=0, atol=3e-6
    )
    np.testing.assert_array_equal(layer.get_weights()[-1], full.get_weights()[-1])
    x = draw(4, dims[0])
    assert_close(layer(x), full(x))


def test_from_full_improves_with_the_rank():
    full = full_layer((36, 36))
    errors = [
        np.linalg.norm(oracle.full_kernel(BilinearDense.from_full(full, rank)) - full.kernel)
        for rank in (1, 4, 16, 35)
    ]
    assert (np.diff(errors) < 0).all()


@pytest.mark.skipif(BACKEND == "jax", reason="JAX stores float32 unless told otherwise")
def test_from_full_in_float64():
    full = full_layer((12, 10), dtype="float64")
    layer = BilinearDense.from_full(full, rank=20)
    np.testing.assert_allclose(oracle.full_kernel(layer), full.get_weights()[0], rtol=0, atol=1e-13)


def test_from_full_keeps_the_options_and_the_full_layer():
    full = full_layer(
        activation="relu",
        name="hidden",
        trainable=False,
        dtype="mixed_bfloat16",
        kernel_initializer="he_normal",
        kernel_regularizer="l2",
        bias_regularizer="l1",
        activity_regularizer="l1",
        kernel_constraint="max_norm",
        bias_constraint="non_neg",
    )
    before, config = full.get_weights(), full.get_config()
    layer = BilinearDense.from_full(
        full, rank=2, input_factors=(2, 6), output_factors=(10, 1), implementation="factorized"
    )
    kept = {**layer.get_config(), "bias_initializer": config["bias_initializer"]}
    assert {key: kept[key] for key in config if key in kept} == {
        key: value for key, value in config.items() if key in kept
    }
    assert {*config} - {*kept} <= {"lora_rank", "lora_alpha", "quantization_config"}
    assert (layer.rank, layer.input_factors, layer.output_factors) == (2, (2, 6), (10, 1))
    assert layer.implementation == "factorized"
    assert layer.trainable_weights == []
    assert full.get_config() == config
    for old, new in zip(before, full.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_from_full_without_bias():
    layer = BilinearDense.from_full(full_layer(use_bias=False))
    assert layer.bias is None
    assert len(layer.weights) == 2


def test_from_full_merges_lora():
    full = full_layer()
    full.enable_lora(2)
    full.lora_kernel_b.assign(draw(*full.lora_kernel_b.shape))
    layer = BilinearDense.from_full(full, rank=20)
    x = draw(3, 12)
    assert_close(layer(x), full(x))
    assert len(layer.trainable_weights) == 3


@pytest.mark.parametrize("dims", SHAPES)
def test_expand(dims):
    layer = make(dims, "relu", rank=2, name="hidden", trainable=False)
    full = layer.expand()
    assert type(full) is keras.layers.Dense
    assert (full.name, full.trainable, full.units) == ("hidden", False, dims[1])
    assert_close(full.kernel, oracle.full_kernel(layer))
    x = draw(3, dims[0])
    assert_close(full(x), layer(x))


@pytest.mark.parametrize("units", [0, -3, 2.5, 8.0, True, "8", None, (8,)])
def test_refuses_units(units):
    message = f"`units` must be a positive integer. Received: units={units!r} (of type"
    with pytest.raises(ValueError, match=re.escape(message)):
        BilinearDense(units)


def test_accepts_numpy_integers():
    config = BilinearDense(np.int64(10), rank=np.int32(2)).get_config()
    assert (type(config["units"]), type(config["rank"])) == (int, int)


@pytest.mark.parametrize(
    ("output_factors", "rule"),
    [((3, 3), "must be at least 10"), ((5, 3), "must fit the size 10 tightly")],
)
def test_refuses_output_factors_in_the_constructor(output_factors, rule):
    with pytest.raises(ValueError, match=f"`output_factors`.*{rule}.*Received: output_factors=.*"):
        BilinearDense(10, output_factors=output_factors)


@pytest.mark.parametrize(
    ("input_factors", "rule"),
    [((3, 3), "must be at least 12"), ((7, 2), "must fit the size 12 tightly")],
)
def test_refuses_input_factors_when_built(input_factors, rule):
    layer = BilinearDense(10, input_factors=input_factors)
    with pytest.raises(ValueError, match=f"`input_factors`.*{rule}.*Received: input_factors="):
        layer.build((None, 12))
    assert layer.weights == []


def test_refuses_an_unknown_input_width():
    with pytest.raises(ValueError, match=r"last dimension .* must be known. Received: input_shape"):
        BilinearDense(10).build((None, None))


def test_refuses_other_inputs():
    layer = make((12, 10))
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 12"):
        layer(np.zeros((2, 13), "float32"))
    with pytest.raises(ValueError, match="expected min_ndim=2"):
        layer(np.zeros(12, "float32"))
