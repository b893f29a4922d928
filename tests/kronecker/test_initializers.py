import keras
import numpy as np
import oracle
import pytest
from keras import ops

from keras_bilinear import BilinearConv2D, BilinearDense, BilinearEmbedding
from keras_bilinear.kronecker.initializers import deviation

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
