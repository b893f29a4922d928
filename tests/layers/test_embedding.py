import functools
import re

import keras
import numpy as np
import oracle
import pytest
from backend_gradient import BACKEND, evaluate, largest_tensor, layer_gradients, weighted_output
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_bilinear import (
    BilinearEmbedding,
    BilinearReversibleEmbedding,
    plan_rewrite,
    rewrite_model,
)
from keras_bilinear.layers.calibration import Calibration, collect
from keras_bilinear.layers.converter import full_converter

SHAPES = [(50, 10), (53, 11), (1, 10), (50, 1), (1, 1), (7, 64)]
IMPLEMENTATIONS = ["factorized", "materialized"]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"]
if BACKEND != "torch":  # Keras has no uint64 there
    INTEGERS.append("uint64")


def make(dims, **arguments):
    layer = BilinearEmbedding(*dims, **arguments)
    layer.build()
    return layer


def stock_layer(layer):
    """`keras.layers.Embedding` with the table that NumPy makes of the layer's factors."""
    stock = keras.layers.Embedding(layer.input_dim, layer.output_dim, "zeros")
    stock.build()
    stock.set_weights([oracle.full_kernel(layer)])
    return stock


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def draw_indices(limit, *shape, dtype="int32"):
    return np.random.default_rng(0).integers(limit, size=shape).astype(dtype)


def assert_close(actual, expected, atol=1e-6):
    actual, expected = ops.convert_to_numpy(actual), ops.convert_to_numpy(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dims", SHAPES)
def test_equals_embedding_with_the_expanded_table(dims, rank, implementation):
    layer = make(dims, rank=rank, implementation=implementation)
    assert_close(layer.embeddings, oracle.full_kernel(layer))
    stock = stock_layer(layer)
    for shape in [(), (4,), (2, 3), (2, 3, 4)]:
        indices = draw_indices(dims[0], *shape)
        assert_close(evaluate(layer, indices), evaluate(stock, indices))


@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 4))
def test_every_row(input_dim, output_dim, rank):
    layer = make((input_dim, output_dim), rank=rank)
    assert_close(evaluate(layer, np.arange(input_dim)), oracle.full_kernel(layer))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_dtypes(dtype):
    layer = make((90_000, 4))
    assert layer.factorization.input_factors[1] > 255
    largest = min(np.iinfo(dtype).max, 90_000 - 1)
    indices = np.array([[0, 1, 100], [largest - 1, largest // 2, largest]], dtype)
    expected = oracle.full_kernel(layer)[indices.astype("int64")]
    assert_close(layer(indices), expected.astype("float32"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dims", [(50, 10), (53, 11)])
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
def test_negative_indices_count_from_the_end(dims, dtype, implementation):
    layer = make(dims, rank=2, implementation=implementation)
    indices = np.arange(-dims[0], dims[0]).astype(dtype)
    rows = evaluate(layer, indices)
    assert_close(rows, oracle.full_kernel(layer)[indices])
    assert_close(rows, evaluate(stock_layer(layer), indices))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("training", [None, True, False])
@pytest.mark.parametrize("dims", SHAPES)
def test_gradients(dims, training, implementation):
    """Those of the stock layer's table by the chain rule, divided by the gain."""
    layer = make(dims, rank=2, implementation=implementation)
    indices, weights = draw_indices(dims[0], 2, 4), draw(2, 4, dims[1])
    table_gradient = np.zeros(dims)
    np.add.at(table_gradient, indices, weights)
    expected = oracle.factor_gradients(
        oracle.pad_like(table_gradient, layer.factorization), *oracle.factors(layer)
    )
    actual = layer_gradients(layer, indices, weights, training=training)
    for gradient, value in zip(actual, expected, strict=True):
        assert_close(gradient, value, atol=1e-5)


@pytest.mark.parametrize("dims", SHAPES)
def test_gradients_in_reverse(dims):
    layer = make(dims, rank=2)
    hidden, weights = draw(3, dims[1]), draw(3, dims[0], seed=1)
    table_gradient = oracle.pad_like(weights.T @ hidden, layer.factorization)
    left, right = oracle.factor_gradients(table_gradient, *oracle.factors(layer))
    actual = layer_gradients(layer, hidden, weights, reverse=True, training=True)
    expected = left, right, weights @ oracle.full_kernel(layer)
    for gradient, value in zip(actual, expected, strict=True):
        assert_close(gradient, value, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dims", SHAPES)
def test_reverse_multiplies_by_the_transposed_table(dims, implementation):
    layer = BilinearEmbedding(*dims, rank=2, implementation=implementation)
    layer(draw(3, dims[1]), reverse=True)
    for leading in [(3,), (2, 3), (2, 1, 3), (0,)]:
        hidden = draw(*leading, dims[1])
        logits = evaluate(functools.partial(layer, reverse=True), hidden)
        assert_close(logits, hidden @ oracle.full_kernel(layer).T, atol=1e-5)
    symbol = keras.KerasTensor((None, None, dims[1]))
    assert layer.compute_output_spec(symbol, reverse=True).shape == (None, None, dims[0])


def test_reverse_in_mixed_precision():
    layer = BilinearEmbedding(50, 10, dtype="mixed_bfloat16")
    logits = layer(draw(3, 10), reverse=True)
    assert keras.backend.standardize_dtype(logits.dtype) == "bfloat16"
    assert layer.compute_output_spec(keras.KerasTensor((3, 10)), reverse=True).dtype == "bfloat16"


def tied_model():
    inputs = keras.Input((None,), dtype="int32")
    tied = BilinearEmbedding(50, 16, rank=2, mask_zero=True, name="tied")
    hidden = keras.layers.Dense(16, activation="tanh")(tied(inputs))
    return keras.Model(inputs, tied(hidden, reverse=True))


def test_tied_forward_and_reverse(tmp_path):
    model = tied_model()
    assert model.output.shape == (None, None, 50)
    assert len(model.trainable_variables) == 4
    x = draw_indices(50, 8, 6)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=False)
    losses = model.fit(x, x, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "tied.keras")
    loaded = keras.models.load_model(tmp_path / "tied.keras")
    assert len(loaded.trainable_variables) == 4
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logit_soft_cap": 0.5, "tie_weights": False},
        {"reverse_dtype": "float32", "dtype": "mixed_bfloat16"},
        {"reverse_dtype": "float32", "dtype": "mixed_bfloat16", "tie_weights": False},
    ],
)
def test_reversible_embedding_is_that_of_keras(options):
    layer = BilinearReversibleEmbedding(50, 16, rank=2, embeddings_initializer="normal", **options)
    layer.build()
    full = layer.expand()
    assert type(full) is keras.layers.ReversibleEmbedding
    indices, hidden = draw_indices(50, 4, 3), draw(4, 3, 16)
    for x, reverse in ((indices, False), (hidden, True)):
        actual, expected = (one(x, reverse=reverse) for one in (layer, full))
        assert actual.dtype == expected.dtype
        values = (ops.convert_to_numpy(ops.cast(y, "float32")) for y in (actual, expected))
        np.testing.assert_allclose(*values, rtol=1e-5, atol=0.05 if "dtype" in options else 1e-5)


def untied(**arguments):
    layer = keras.layers.ReversibleEmbedding(50, 16, False, "normal", **arguments)
    layer.build()
    return layer


@pytest.mark.parametrize("factors", [((8, 7), (4, 4)), ((50, 1), (1, 16))])
def test_both_tables_are_fitted_to_what_they_see(factors):
    full = untied()
    indices = np.minimum(np.random.default_rng(0).geometric(0.3, 2000), 49)
    hidden = draw(2000, 16) * np.geomspace(1, 0.01, 16, dtype="float32")
    fit = functools.partial(BilinearReversibleEmbedding.from_full, full, 3, *factors)
    fitted, nearest = fit(calibration_data=[indices, hidden]), fit()

    def errors(layer):
        pairs = ([one(indices), one(hidden, reverse=True)] for one in (layer, full))
        return [
            float(ops.mean(ops.square(ops.subtract(actual, expected))))
            for actual, expected in zip(*pairs, strict=True)
        ]

    assert np.all(np.array(errors(fitted)) < 0.8 * np.array(errors(nearest)))
    assert_close(nearest.expand()(hidden, reverse=True), nearest(hidden, reverse=True))


def test_the_call_says_which_way_an_embedding_goes():
    inputs = keras.Input((16,))  # as wide as the table, and of floats
    layer = untied(name="embedding")
    hidden = keras.layers.Dense(16, activation="tanh")(layer(inputs))
    model = keras.Model(inputs, layer(hidden, reverse=True))
    x = draw_indices(50, 20, 16).astype("float32")
    calibration = Calibration(full_converter(type(layer)), layer)
    for one, options, _ in collect(model, {"": layer}, x)[""]:
        calibration.add(one, **options)
    counts = {name: blocks[0].count for name, blocks in calibration.statistics.items()}
    assert counts == {"embeddings": 320, "reverse_embeddings": 320}
    plan = plan_rewrite(model, 0.5, layers={"embedding": 2}, calibration_data=x)
    plan["embedding"].factors = (50, 1), (1, 16)
    small = rewrite_model(model, plan=plan, calibration_data=x)
    assert plan["embedding"].parameters == small.get_layer("embedding").count_params() == 264


def test_tied_gradient_is_the_sum_of_both_uses():
    layer = make((20, 6), rank=2)
    indices, weights = draw_indices(20, 5), draw(5, 20)

    class Tied(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.tied = layer
            self.built = True

        def call(self, x):
            return self.tied(self.tied(x), reverse=True)

    rows = oracle.full_kernel(layer)[indices]
    table_gradient = weights.T @ rows
    np.add.at(table_gradient, indices, weights @ oracle.full_kernel(layer))
    expected = oracle.factor_gradients(
        oracle.pad_like(table_gradient, layer.factorization), *oracle.factors(layer)
    )
    for gradient, value in zip(layer_gradients(Tied(), indices, weights), expected, strict=True):
        assert_close(gradient, value, atol=1e-5)


def test_mask_zero():
    x = np.array([[3, 1, 0, 0], [2, 0, 4, 0]], "int32")
    layer = BilinearEmbedding(50, 10, mask_zero=True)
    mask = layer.compute_mask(ops.convert_to_tensor(x))
    np.testing.assert_array_equal(ops.convert_to_numpy(mask), x != 0)
    inputs = keras.Input((None,), dtype="int32")
    outputs = layer(inputs)
    pooled = keras.layers.GlobalAveragePooling1D()(outputs)
    outputs, pooled = keras.Model(inputs, [outputs, pooled]).predict(x, verbose=0)
    for row, kept, mean in zip(outputs, x != 0, pooled, strict=True):
        assert_close(mean, row[kept].mean(axis=0))


def test_mask_survives_reverse():
    layer = BilinearEmbedding(50, 10, mask_zero=True)
    mask = ops.convert_to_tensor(np.array([[True, False]]))
    states = ops.convert_to_tensor(draw(1, 2, 10))
    layer(states, reverse=True)
    assert layer.compute_mask(states, mask) is mask
    layer(np.array([[3, 0]]))
    after = layer.compute_mask(ops.convert_to_tensor(np.array([[3, 0]])), mask)
    assert ops.convert_to_numpy(after).tolist() == [[True, False]]


@pytest.mark.parametrize("shape", [(None,), (None, None), (None, 3, None)])
def test_unknown_dimensions_in_a_compiled_function(shape):
    layer = make((53, 11), rank=2)
    sizes = [tuple(size or n for size in shape) for n in (1, 2, 5)]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        function = tf.function(layer, input_signature=[tf.TensorSpec(shape, "int32")])
    else:
        inputs = keras.Input(shape[1:], dtype="int32")
        function = keras.Model(inputs, layer(inputs))
    for size in sizes:
        x = draw_indices(53, *size)
        assert_close(function(ops.convert_to_tensor(x)), stock_layer(layer)(x))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_inputs(shape, implementation):
    layer = make((50, 10), implementation=implementation)
    assert tuple(layer(np.zeros(shape, "int32")).shape) == (*shape, 10)


@pytest.mark.parametrize("dims", [(1_000_000, 256), (1_000_003, 257)])
def test_no_tensor_of_the_size_of_the_table(dims):
    layer = make(dims, rank=4)
    indices = draw_indices(dims[0], 2, 3)
    function = weighted_output(layer, indices, draw(2, 3, dims[1]), training=True)
    largest = largest_tensor(function, *layer.get_weights())
    assert layer.factorization.parameters / 4 <= largest <= 4 * layer.factorization.parameters
    assert largest < layer.factorization.full_parameters / 100


def test_no_tensor_of_the_size_of_the_table_in_reverse():
    layer = make((100_000, 256), rank=4)
    function = weighted_output(layer, None, draw(2, 100_000), reverse=True, training=True)
    largest = largest_tensor(function, *layer.get_weights(), draw(2, 256))
    assert largest < layer.factorization.full_parameters / 20


def test_a_materialized_table_would_be_seen():
    layer = make((500, 64), implementation="materialized")
    function = weighted_output(layer, np.arange(2), draw(2, 64))
    assert largest_tensor(function, *layer.get_weights()) >= 500 * 64


def test_a_table_of_a_billion_rows():
    layer = make((10**9, 256), rank=4)
    assert layer.count_params() < 4_100_000
    indices = np.array([0, 1, 10**9 - 1, 123_456_789])
    left, right = oracle.factors(layer)
    second = layer.factorization.input_factors[1]
    expected = [
        layer._kernel.gain
        * sum(np.kron(left[r, i // second], right[r, i % second]) for r in range(4))[:256]
        for i in indices
    ]
    assert_close(layer(indices), np.array(expected, "float32"))


def test_regularizer_adds_a_loss_for_each_factor():
    layer = make((50, 10), embeddings_regularizer=keras.regularizers.L2(0.1))
    expected = [0.1 * np.sum(weight**2) for weight in layer.get_weights()]
    losses = [ops.convert_to_numpy(loss) for loss in layer.losses]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_constraint_holds_for_each_factor_after_a_step():
    layer = make((50, 10), rank=2, embeddings_constraint="non_neg")
    assert all(np.any(weight < 0) for weight in layer.get_weights())
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(draw_indices(50, 4, 3), draw(4, 3, 10), verbose=0)
    assert all(np.all(weight >= 0) for weight in layer.get_weights())
    assert all(np.any(weight > 0) for weight in layer.get_weights())


@pytest.mark.parametrize("wrap", [lambda table: table, lambda table: [table]])
def test_weights_argument(wrap):
    table = draw(50, 10)
    layer = BilinearEmbedding(50, 10, weights=wrap(table), rank=16)
    assert layer.built
    assert layer.factorization.sufficient_rank <= 16
    assert_close(layer(np.arange(50)), table, atol=1e-5)


@pytest.mark.parametrize(
    "weights", [draw(50, 9), draw(10, 50), draw(50), [draw(50, 10), draw(50, 10)]]
)
def test_refuses_weights_of_another_shape(weights):
    message = r"`weights` must be a table of shape .* Received: weights of shape .*input_dim=50"
    with pytest.raises(ValueError, match=message):
        BilinearEmbedding(50, 10, weights=weights)


def test_refuses_weights_that_are_not_finite():
    table = draw(50, 10)
    table[3, 4] = np.nan
    with pytest.raises(ValueError, match=r"`weights` must be finite. Received: .*NaN"):
        BilinearEmbedding(50, 10, weights=table)


def full_layer(dims=(50, 10), **arguments):
    layer = keras.layers.Embedding(*dims, **arguments)
    layer.build()
    return layer


@pytest.mark.parametrize("dims", SHAPES)
def test_from_full_is_exact_at_the_sufficient_rank(dims):
    full = full_layer(dims)
    rank = BilinearEmbedding.from_full(full).factorization.sufficient_rank
    layer = BilinearEmbedding.from_full(full, rank=rank)
    assert_close(layer(np.arange(dims[0])), full.get_weights()[0])


def test_from_full_keeps_the_options_and_the_full_layer():
    full = full_layer(
        name="tokens",
        trainable=False,
        dtype="mixed_bfloat16",
        mask_zero=True,
        embeddings_initializer="normal",
        embeddings_regularizer="l2",
        embeddings_constraint="max_norm",
        activity_regularizer="l1",
    )
    before, config = full.get_weights(), full.get_config()
    layer = BilinearEmbedding.from_full(
        full, rank=2, input_factors=(10, 5), output_factors=(5, 2), implementation="factorized"
    )
    kept = layer.get_config()
    assert {key: kept[key] for key in config if key in kept} == {
        key: value for key, value in config.items() if key in kept
    }
    assert {*config} - {*kept} <= {"lora_rank", "lora_alpha", "quantization_config"}
    assert (layer.rank, layer.input_factors, layer.output_factors) == (2, (10, 5), (5, 2))
    assert layer.implementation == "factorized"
    assert full.get_config() == config
    np.testing.assert_array_equal(before[0], full.get_weights()[0])


@pytest.mark.parametrize("dims", SHAPES)
def test_expand(dims):
    layer = make(dims, rank=2, name="tokens", trainable=False, mask_zero=True)
    full = layer.expand()
    assert type(full) is keras.layers.Embedding
    assert (full.name, full.trainable, full.mask_zero) == ("tokens", False, True)
    assert_close(full.embeddings, oracle.full_kernel(layer))


@pytest.mark.parametrize("argument", ["input_dim", "output_dim"])
@pytest.mark.parametrize("value", [0, -3, 2.5, 8.0, True, "8", None])
def test_refuses_sizes(argument, value):
    message = f"`{argument}` must be a positive integer. Received: {argument}={value!r} (of type"
    with pytest.raises(ValueError, match=re.escape(message)):
        BilinearEmbedding(**{"input_dim": 50, "output_dim": 10, argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("input_factors", (7, 7), "must be at least 50"),
        ("input_factors", (11, 5), "must fit the size 50 tightly"),
        ("output_factors", (3, 3), "must be at least 10"),
        ("output_factors", (5, 3), "must fit the size 10 tightly"),
    ],
)
def test_refuses_factors_in_the_constructor(argument, value, rule):
    with pytest.raises(ValueError, match=f"`{argument}`.*{rule}.*Received: {argument}="):
        BilinearEmbedding(50, 10, **{argument: value})


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_takes_floats_as_indices_like_keras(policy):
    layer = BilinearEmbedding(5000, 10, mask_zero=True, dtype=policy)
    # As many as the width: a hidden state in reverse has that shape, but no mask.
    indices = np.array([[0, 1, 2049, 4999, 5, 6, 7, 8, 9, 10]])
    expected = layer(indices)
    floats = ops.convert_to_tensor(indices.astype("float32"))
    actual = layer(floats)
    np.testing.assert_array_equal(*(ops.convert_to_numpy(y) for y in (actual, expected)))
    assert ops.convert_to_numpy(layer.compute_mask(floats)).tolist() == [[False] + 9 * [True]]
    layer(floats, reverse=True)
    assert layer.compute_mask(floats) is None


def test_a_table_behind_floats_is_rewritten_saved_and_fitted(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Embedding(50, 10)])
    x = np.random.default_rng(0).integers(0, 50, (30, 4))
    for data in (None, x, x.astype("float32")):
        rewrite_model(model, rank=2, calibration_data=data).save(tmp_path / "small.keras")
        assert keras.models.load_model(tmp_path / "small.keras").predict(x, verbose=0).shape == (
            *x.shape,
            10,
        )


@pytest.mark.parametrize(("dtype", "rows"), [("float32", 2**24 + 1), ("bool", 50)])
def test_refuses_indices_that_are_no_integers(dtype, rows):
    layer = BilinearEmbedding(rows, 10)
    message = f"takes integer indices.*Received: inputs.dtype={dtype}"
    with pytest.raises(ValueError, match=message):
        layer(ops.convert_to_tensor(np.ones((2, 3), dtype)))
    with pytest.raises(ValueError, match=message):
        layer(keras.Input((3,), dtype=dtype))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has tensors of strings")
def test_refuses_strings():
    with pytest.raises(ValueError, match=r"takes integer indices.*Received: inputs.dtype=string"):
        BilinearEmbedding(50, 10)(ops.convert_to_tensor(np.array([["a", "b"]])))


def test_refuses_another_width_in_reverse():
    message = r"`reverse=True` .* output_dim=10. Received: inputs.shape=.*11"
    with pytest.raises(ValueError, match=message):
        BilinearEmbedding(50, 10)(draw(2, 11), reverse=True)
    with pytest.raises(ValueError, match=message):
        BilinearEmbedding(50, 10)(keras.Input((11,)), reverse=True)
