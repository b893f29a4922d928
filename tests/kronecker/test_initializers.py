import keras
import numpy as np
import oracle
import pytest
from keras import layers, ops

from keras_bilinear import (
    BilinearConv2D,
    BilinearDense,
    BilinearEmbedding,
    Rewriter,
    plan_rewrite,
    rewrite_model,
)
from keras_bilinear.kronecker.initializers import deviation
from keras_bilinear.layers import kernel as kernel_module
from keras_bilinear.layers.converter import converter_of

SEEDS = 40
INITIALIZERS = {
    "glorot_uniform": keras.initializers.GlorotUniform,
    "glorot_normal": keras.initializers.GlorotNormal,
    "he_uniform": keras.initializers.HeUniform,
    "he_normal": keras.initializers.HeNormal,
    "lecun_uniform": keras.initializers.LecunUniform,
    "lecun_normal": keras.initializers.LecunNormal,
    "normal": lambda seed: keras.initializers.RandomNormal(stddev=0.3, seed=seed),
    "uniform": lambda seed: keras.initializers.RandomUniform(-0.2, 0.2, seed=seed),
    "truncated": lambda seed: keras.initializers.TruncatedNormal(stddev=0.3, seed=seed),
    "fan_out": lambda seed: keras.initializers.VarianceScaling(
        3.0, "fan_out", "untruncated_normal", seed=seed
    ),
}
SHAPES = {
    "square": {"dims": (64, 64), "rank": 1},
    "rank 8": {"dims": (36, 100), "rank": 8},
    "rank 18": {"dims": (36, 100), "rank": 18},
    "padded": {"dims": (37, 53), "rank": 3},
    "row": {"dims": (60, 64), "rank": 2, "input_factors": (1, 60)},
    "column": {"dims": (60, 64), "rank": 2, "input_factors": (60, 1), "output_factors": (4, 16)},
}


def make(initializer, dims, **arguments):
    layer = BilinearDense(dims[1], kernel_initializer=initializer, **arguments)
    layer.build((None, dims[0]))
    return layer


def second_moments(initializer, dims, **arguments):
    """Mean squares of the full kernel's and of the materialized kernel's entries, for each seed."""
    full, bilinear = [], []
    for seed in range(SEEDS):
        full.append(np.mean(ops.convert_to_numpy(initializer(seed)(dims)) ** 2))
        bilinear.append(
            np.mean(oracle.full_kernel(make(initializer(seed), dims, **arguments)) ** 2)
        )
    return np.array(full), np.array(bilinear)


def assert_same_variance(initializer, shape):
    full, bilinear = second_moments(initializer, **shape)
    error = bilinear.std() / np.sqrt(SEEDS)
    assert error < 0.1 * full.mean(), "too few seeds to tell"
    assert abs(bilinear.mean() - full.mean()) < 4 * error + 0.01 * full.mean()


@pytest.mark.parametrize("name", INITIALIZERS)
def test_kernel_has_the_variance_of_the_full_one(name):
    assert_same_variance(INITIALIZERS[name], SHAPES["padded"])


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_variance_for_any_factors_and_rank(shape):
    assert_same_variance(INITIALIZERS["glorot_uniform"], SHAPES[shape])


@pytest.mark.parametrize("name", INITIALIZERS)
def test_stored_factors_have_the_deviation_of_the_full_kernel(name):
    initializer = INITIALIZERS[name]
    layer = make(initializer(0), (400, 900), rank=4)
    full = ops.convert_to_numpy(initializer(1)((400, 900)))
    assert_stored(layer, full.std())


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((400, 900), 8, 650**-0.5),
        ((400, 900), 32, 2 * 650**-0.5),
        ((4096, 4096), 2, 0.025),
        ((4096, 4096), 8, 0.04),
    ],
)
def test_high_ranks_and_wide_layers_store_larger_factors(shape, rank, expected):
    layer = make(keras.initializers.GlorotUniform(0), shape, rank=rank)
    assert_stored(layer, expected)


def test_kernel_of_small_numbers_has_the_variance_of_the_full_one():
    def small(seed):
        return keras.initializers.RandomNormal(stddev=0.01, seed=seed)

    assert_stored(make(small(0), (400, 900)), 0.025)
    assert_same_variance(small, SHAPES["padded"])


def assert_stored(layer, deviation):
    stored = np.concatenate([factor.ravel() for factor in oracle.factors(layer)])
    np.testing.assert_allclose(stored.std(), deviation, rtol=0.05)
    assert abs(stored.mean()) < 0.1 * deviation


@pytest.mark.parametrize("name", INITIALIZERS)
def test_deviation_is_what_the_initializer_draws(name):
    initializer = INITIALIZERS[name](0)
    drawn = ops.convert_to_numpy(initializer((300, 500)))
    np.testing.assert_allclose(deviation(initializer, 300, 500), drawn.std(), rtol=0.02)


@pytest.mark.parametrize(
    "initializer",
    [
        keras.initializers.RandomNormal(mean=1.0),
        keras.initializers.TruncatedNormal(mean=1.0),
        keras.initializers.RandomUniform(0.0, 1.0),
        keras.initializers.Ones(),
        np.ones,
    ],
)
def test_deviation_of_others_is_not_known(initializer):
    assert deviation(initializer, 30, 50) is None


def test_embedding_table_has_the_variance_of_the_full_one():
    squares = []
    for seed in range(SEEDS):
        keras.utils.set_random_seed(seed)
        layer = BilinearEmbedding(500, 60, rank=2)
        layer.build()
        squares.append(np.mean(oracle.full_kernel(layer) ** 2))
    np.testing.assert_allclose(np.mean(squares), 0.05**2 / 3, rtol=0.05)


@pytest.mark.parametrize("initializer", ["zeros", keras.initializers.RandomNormal(stddev=0.0)])
def test_zeros_can_be_trained(initializer):
    layer = make(initializer, (12, 10), rank=2)
    left, right = oracle.factors(layer)
    assert np.all(oracle.full_kernel(layer) == 0)
    assert np.all(right == 0)
    assert np.all(left != 0)
    model = keras.Sequential([keras.Input((12,)), layer])
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(np.ones((4, 12)), np.ones((4, 10)), epochs=2, verbose=0)
    new_left, new_right = oracle.factors(layer)
    assert np.any(new_right != 0)
    assert np.any(new_left != left)
    assert np.any(oracle.full_kernel(layer) != 0)


def test_product_of_orthogonal_factors_is_orthogonal():
    kernel = oracle.full_kernel(make("orthogonal", (36, 36)))
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(36), atol=1e-5)


@pytest.mark.parametrize("pattern", ["channel", "spatial"])
@pytest.mark.parametrize("filters", [8, 64, 400])
@pytest.mark.parametrize("rank", [1, 2])
def test_orthogonal_kernels_of_convolutions_are_orthogonal(pattern, filters, rank):
    initializer = keras.initializers.Orthogonal(gain=1.5, seed=1)
    layer = BilinearConv2D(filters, 3, rank=rank, pattern=pattern, kernel_initializer=initializer)
    layer.build((None, 8, 8, 16))
    kernel = oracle.full_kernel(layer).reshape(-1, filters)
    values = np.linalg.svd(kernel, compute_uv=False)
    np.testing.assert_allclose(values, 1.5, rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_orthogonal_convolutions_of_a_higher_rank_keep_the_norm(groups):
    initializer = keras.initializers.Orthogonal(seed=1)
    layer = BilinearConv2D(64, 3, rank=9, groups=groups, kernel_initializer=initializer)
    layer.build((None, 8, 8, 16))
    np.testing.assert_allclose(np.sum(oracle.full_kernel(layer) ** 2), 64, rtol=0.1)


def test_orthogonal_of_a_higher_rank_keeps_the_norm():
    squares = []
    for seed in range(0, 10 * SEEDS, 10):
        layer = make(keras.initializers.Orthogonal(seed=seed), (36, 36), rank=4)
        squares.append(np.sum(oracle.full_kernel(layer) ** 2))
    np.testing.assert_allclose(np.mean(squares), 36, rtol=0.1)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize(
    ("initializer", "shape", "expected"),
    [
        ("ones", (12, 10), np.ones((12, 10))),
        (keras.initializers.Constant(0.3), (12, 10), np.full((12, 10), 0.3)),
        ("identity", (36, 36), np.eye(36)),
        (keras.initializers.Identity(2.0), (36, 36), 2 * np.eye(36)),
    ],
)
def test_fixed_values_at_any_rank(initializer, shape, expected, rank):
    layer = make(initializer, shape, rank=rank)
    np.testing.assert_allclose(oracle.full_kernel(layer), expected, atol=1e-6)


def test_terms_of_a_fixed_kernel_train_apart():
    layer = make("ones", (12, 10), rank=3)
    model = keras.Sequential([keras.Input((12,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    model.fit(np.ones((4, 12)), np.ones((4, 10)), epochs=2, verbose=0)
    left, right = oracle.factors(layer)
    for i in range(3):
        assert np.any(right[i] != 0)
        for j in range(i):
            assert not np.allclose(left[i], left[j])


def test_asymmetric_uniform_is_called_for_each_matrix():
    layer = make(keras.initializers.RandomUniform(1.0, 2.0, seed=0), (12, 10), rank=4)
    kernel = oracle.full_kernel(layer)
    assert np.all(kernel >= 4 / np.sqrt(4) - 1e-5)
    assert np.all(kernel <= 16 / np.sqrt(4) + 1e-5)
    assert kernel.std() > 0.05


def test_custom_callable_is_called_for_each_matrix():
    shapes = []

    def custom(shape, dtype=None):
        shapes.append(tuple(shape))
        return ops.full(shape, 2.0, dtype)

    layer = make(custom, (12, 10), rank=2, input_factors=(4, 3), output_factors=(2, 5))
    assert sorted(shapes) == [(3, 5), (3, 5), (4, 2), (4, 2)]
    np.testing.assert_allclose(oracle.full_kernel(layer), 2 * 4 / np.sqrt(2), rtol=1e-5)


@pytest.mark.parametrize("name", [*INITIALIZERS, "orthogonal", "offset"])
def test_seeds(name):
    make_initializer = {
        **INITIALIZERS,
        "orthogonal": keras.initializers.Orthogonal,
        "offset": lambda seed: keras.initializers.RandomNormal(mean=1.0, seed=seed),
    }[name]
    first, again, other = (
        oracle.factors(make(make_initializer(seed=seed), (36, 36), rank=3)) for seed in (1, 1, 99)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    matrices = np.concatenate(first)
    assert matrices.shape == (6, 6, 6)
    for i in range(6):
        for j in range(i):
            assert not np.allclose(matrices[i], matrices[j])


def test_unseeded_layers_differ():
    first, second = (oracle.full_kernel(make("glorot_uniform", (12, 10))) for _ in range(2))
    assert not np.allclose(first, second)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["glorot_uniform", "zeros", "identity", "ones"])
def test_values_are_drawn_in_the_dtype_of_the_variables(name, dtype):
    layer = make(name, (36, 36), rank=2, dtype=dtype)
    assert {variable.dtype for variable in layer.weights} == {dtype}
    assert np.isfinite(oracle.full_kernel(layer)).all()


@keras.saving.register_keras_serializable("test")
class Table(keras.initializers.Initializer):
    """Gives one table, whatever shape it is asked for; refuses other shapes if `strict`."""

    def __init__(self, table, strict=False):
        self.table, self.strict = np.asarray(table), strict

    def __call__(self, shape, dtype=None):
        assert not self.strict or tuple(shape) == self.table.shape
        return ops.cast(self.table, dtype or "float32")

    def get_config(self):
        return {"table": self.table.tolist(), "strict": self.strict}


def of_fixed_shape(table):
    """Every kind of initializer that gives one table."""
    return {
        "constant": keras.initializers.Constant(table),
        "array": table,
        "function": lambda shape, dtype=None: ops.convert_to_tensor(table, dtype=dtype),
        "class": Table(table),
        "strict class": Table(table, strict=True),
    }


KINDS = list(of_fixed_shape(np.ones((2, 2))))
# A full layer, the shape of its inputs, the name of its kernel and of the initializer.
HOLDERS = {
    "dense": (lambda **i: layers.Dense(10, **i), (None, 12), "kernel"),
    "einsum": (
        lambda **i: layers.EinsumDense("abc,hcd->abhd", (None, 4, 6), **i),
        (None, 3, 12),
        "kernel",
    ),
    "conv": (lambda **i: layers.Conv2D(8, 3, groups=2, **i), (None, 8, 8, 12), "kernel"),
    "transposed": (lambda **i: layers.Conv1DTranspose(8, 3, **i), (None, 8, 12), "kernel"),
    "separable": (
        lambda **i: layers.SeparableConv1D(8, 3, **i),
        (None, 8, 12),
        "pointwise_kernel",
    ),
    "lstm": (lambda **i: layers.LSTM(6, **i), (None, 5, 12), "kernel"),
    "gru recurrent": (lambda **i: layers.GRU(6, **i), (None, 5, 12), "recurrent_kernel"),
    "conv lstm": (lambda **i: layers.ConvLSTM1D(4, 3, **i), (None, 5, 8, 6), "kernel"),
    "embedding": (lambda **i: layers.Embedding(40, 12, **i), (None, 3), "embeddings"),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_matrix_as_initializer_starts_at_the_nearest_sum(name):
    make_full, shape, attribute = HOLDERS[name]
    argument = {"recurrent_kernel": "recurrent", "pointwise_kernel": "pointwise"}.get(
        attribute, attribute
    )
    full = make_full()
    full.build(shape)
    kernel = getattr(getattr(full, "cell", full), attribute)
    matrix = np.random.default_rng(0).normal(size=kernel.shape)
    full = make_full(**{f"{argument}_initializer": keras.initializers.Constant(matrix)})
    full.build(shape)
    bilinear = converter_of(full).like(full, rank=2)
    bilinear.build(shape)
    expected = converter_of(full).from_full(full, rank=2).kernels[attribute]
    for actual, factor in zip(
        bilinear.kernels[attribute].read_factors(), expected.read_factors(), strict=True
    ):
        np.testing.assert_allclose(actual, factor, atol=1e-4)
        assert np.any(factor)


@pytest.mark.parametrize("kind", KINDS)
def test_an_initializer_of_one_shape_gives_the_full_kernel(kind):
    matrix = np.random.default_rng(0).normal(size=(12, 10)).astype("float32")
    layer = make(of_fixed_shape(matrix)[kind], (12, 10), rank=6)
    np.testing.assert_allclose(oracle.full_kernel(layer), matrix, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_of_another_shape_is_refused(kind):
    layer = BilinearDense(10, kernel_initializer=of_fixed_shape(np.ones((7, 8), "float32"))[kind])
    with pytest.raises((ValueError, AssertionError)):
        layer.build((None, 12))


def test_a_row_is_repeated():
    row = np.arange(10, dtype="float32")
    layer = make(keras.initializers.Constant(row), (12, 10), rank=2)
    np.testing.assert_allclose(oracle.full_kernel(layer), np.tile(row, (12, 1)), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_matrix_starts_in_the_dtype_of_the_variables(dtype):
    table = np.random.default_rng(0).normal(size=(12, 10))
    layer = make(keras.initializers.Constant(table), (12, 10), rank=6, dtype=dtype)
    assert {variable.dtype for variable in layer.weights} == {dtype}
    np.testing.assert_allclose(oracle.full_kernel(layer), table, atol=0.1)


def test_a_kernel_that_is_overwritten_is_decomposed_once(monkeypatch):
    decompose, calls = kernel_module.nearest_kronecker_sum, []

    def count(*arguments):
        calls.append(arguments)
        return decompose(*arguments)

    monkeypatch.setattr(kernel_module, "nearest_kronecker_sum", count)
    full = layers.Dense(10, kernel_initializer=keras.initializers.Constant(np.ones((12, 10))))
    full.build((None, 12))
    BilinearDense.from_full(full)
    assert len(calls) == 1
    make(full.kernel_initializer, (12, 10))
    assert len(calls) == 2


@pytest.mark.parametrize("initializer", [keras.initializers.Constant, Table])
def test_models_with_a_matrix_as_initializer(tmp_path, initializer):
    rng = np.random.default_rng(0)
    table, matrix = rng.normal(size=(1000, 50)), rng.normal(size=(50, 30))
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(1000, 50, embeddings_initializer=initializer(table)),
            layers.Dense(30, kernel_initializer=initializer(matrix)),
        ]
    )
    x = rng.integers(0, 1000, (64, 4))
    assert plan_rewrite(model, 0.5).parameters < model.count_params()
    small = rewrite_model(model, rank=4)
    expected = ops.convert_to_numpy(small(x))
    rewritten = keras.models.clone_model(model, clone_function=Rewriter(4))
    clone = keras.models.clone_model(small)
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    for other in (rewritten, clone, loaded):
        np.testing.assert_allclose(ops.convert_to_numpy(other(x)), expected, atol=0.01)
    loaded.compile("adam", "mse", jit_compile=False)
    loaded.fit(x, np.ones((64, 4, 30)), verbose=0)
    assert np.any(np.abs(ops.convert_to_numpy(loaded(x)) - expected) > 1e-4)
