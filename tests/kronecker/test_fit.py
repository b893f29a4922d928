import itertools

import keras
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_bilinear
from keras_bilinear.kronecker.factorization import Factorization
from keras_bilinear.kronecker.fit import _solve_symmetric, fit_errors, fit_kronecker_sum
from keras_bilinear.kronecker.nearest import arrange, nearest_kronecker_sum
from keras_bilinear.kronecker.statistics import IndexCounts, InputStatistics
from keras_bilinear.layers.converter import full_converter

WINDOWS = {
    "dense": {},
    "channel": {"left_window": (1, 1), "right_window": (3, 2)},
    "spatial": {"left_window": (3, 1), "right_window": (1, 2)},
}


def problem(rng, factorization, examples=300):
    """A kernel, and for each group examples whose directions differ in size."""
    kernel = rng.normal(size=factorization.full_shape)
    blocks = np.split(
        kernel.reshape(-1, factorization.full_shape[-1]), factorization.blocks, axis=1
    )
    inputs = len(blocks[0])
    rows = [
        rng.normal(size=(examples, inputs)) @ rng.normal(size=(inputs, inputs)) + 1 for _ in blocks
    ]
    statistics = []
    for block, x in zip(blocks, rows, strict=True):
        one = InputStatistics(block)
        for half in np.array_split(x, 2):
            one.add(half, half)
        statistics.append(one)
    return kernel, rows, statistics


def kernels(factorization, left, right):
    """The kernel of each group that two factors stand for."""
    kernel = oracle.kronecker_sum(left, right)
    kernel = kernel.reshape(
        *kernel.shape[:-1], factorization.blocks, factorization.padded_output_dim
    )
    kernel = kernel[..., : factorization.input_dim, :, : factorization.output_dim]
    return kernel.reshape(-1, factorization.blocks, factorization.output_dim).transpose(1, 0, 2)


def relative_error(factorization, rows, statistics, fit, centred):
    squares, total = 0.0, 0.0
    fitted = kernels(factorization, fit.left, fit.right)
    for x, one, kernel in zip(rows, statistics, fitted, strict=True):
        target = x @ one.kernel
        error = target - x @ kernel
        if centred:
            target, error = target - target.mean(0), error - error.mean(0)
        squares, total = squares + np.sum(target**2), total + np.sum(error**2)
    return np.sqrt(total / squares)


@settings(max_examples=2 * settings().max_examples)
@given(
    st.integers(1, 13),
    st.integers(1, 13),
    st.integers(1, 4),
    st.sampled_from(sorted(WINDOWS)),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_errors_are_those_of_the_examples_and_not_above_the_nearest_sums(
    inputs, outputs, rank, pattern, groups, centred, seed
):
    groups = 1 if pattern == "dense" else groups
    factorization = Factorization.create(
        input_dim=inputs, output_dim=outputs, rank=rank, blocks=groups, **WINDOWS[pattern]
    )
    kernel, rows, statistics = problem(np.random.default_rng(seed), factorization)
    fit = fit_kronecker_sum(statistics, factorization, centred)
    error = relative_error(factorization, rows, statistics, fit, centred)
    np.testing.assert_allclose(fit.error, error, rtol=1e-3, atol=1e-6)
    assert fit.error <= fit.start_error
    nearest = nearest_kronecker_sum(kernel, factorization)
    for exact, side in zip(nearest, (fit.left, fit.right), strict=True):
        assert side.shape == exact.shape
    if rank >= factorization.sufficient_rank:
        assert fit.error < 1e-6


@pytest.mark.parametrize("pattern", WINDOWS)
@pytest.mark.parametrize("centred", [False, True])
def test_no_small_change_of_a_factor_fits_better(pattern, centred, monkeypatch):
    monkeypatch.setattr("keras_bilinear.kronecker.fit.TOLERANCE", 0.0)
    monkeypatch.setattr("keras_bilinear.kronecker.least_squares.LEAST_PRIOR", 0.0)
    monkeypatch.setattr("keras_bilinear.kronecker.least_squares.PRIOR", 0.0)
    factorization = Factorization.create(input_dim=12, output_dim=9, rank=2, **WINDOWS[pattern])
    rng = np.random.default_rng(0)
    _, rows, statistics = problem(rng, factorization)
    fit = fit_kronecker_sum(statistics, factorization, centred, sweeps=2000)
    best = relative_error(factorization, rows, statistics, fit, centred)
    assert best < 0.95 * fit.start_error
    for name in ("left", "right"):
        for _ in range(5):
            step = 1e-3 * rng.normal(size=getattr(fit, name).shape)
            sides = {"left": fit.left, "right": fit.right}
            for sign in (1, -1):
                moved = type(fit)(
                    **{**sides, name: sides[name] + sign * step}, error=0, start_error=0
                )
                assert relative_error(factorization, rows, statistics, moved, centred) > best


def low_rank_plan(window, rank, swapped=False):
    factorization = Factorization.create(
        input_dim=12, output_dim=9, rank=rank, left_window=(1,) * len(window), right_window=window
    )
    inputs, outputs = factorization.low_rank_factors
    if swapped:
        inputs, outputs = inputs[::-1], outputs[::-1]
    factorization = Factorization.create(
        input_dim=12,
        output_dim=9,
        input_factors=inputs,
        output_factors=outputs,
        rank=rank,
        left_window=(1,) * len(window),
        right_window=window,
    )
    assert factorization.is_low_rank
    return factorization


@pytest.mark.parametrize(
    ("window", "swapped"), [((), False), ((), True), ((1,), False), ((3, 2), False)]
)
@pytest.mark.parametrize("centred", [False, True])
def test_kernels_of_low_rank_are_the_singular_vectors_in_the_metric_of_the_examples(
    window, swapped, centred
):
    factorization = low_rank_plan(window, 3, swapped)
    _, (x,), (statistics,) = problem(np.random.default_rng(0), factorization)
    fit = fit_kronecker_sum([statistics], factorization, centred)
    fitted = kernels(factorization, fit.left, fit.right)[0]
    kernel = statistics.kernel
    mean = x.mean(0) if centred else 0.0
    gram = (x - mean).T @ (x - mean) / len(x)
    # With the targets of the kernel itself, the prior adds to the metric and nothing else.
    prior = max(1e-3, 0.1 * len(gram) / len(x)) * np.trace(gram) / len(gram)
    values, vectors = np.linalg.eigh(gram + prior * np.eye(len(gram)))
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    left, sizes, right = np.linalg.svd(root @ kernel, full_matrices=False)
    expected = inverse @ (left[:, :3] * sizes[:3]) @ right[:3]
    np.testing.assert_allclose(fitted, expected, atol=1e-8)
    error = relative_error(factorization, [x], [statistics], fit, centred)
    np.testing.assert_allclose(fit.error, error, rtol=1e-6)
    assert fit.error < fit.start_error
    by_rank = fit_errors([statistics], factorization, [1, 2, 3, 9], centred).relative
    assert by_rank[3] == pytest.approx(fit.error)
    assert by_rank[1] > by_rank[2] > by_rank[3] > by_rank[9] == pytest.approx(0, abs=1e-6)
    norms = [np.sum(one**2, axis=tuple(range(1, one.ndim))) for one in (fit.left, fit.right)]
    np.testing.assert_allclose(*norms)


def test_kernels_of_low_rank_are_fitted_to_inputs_that_hardly_vary():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(200, 9)).astype("float32")
    x = (100 * rng.uniform(1, 2, 200) + 1e-4 * rng.normal(size=(600, 200))).astype("float32")
    statistics = InputStatistics(kernel)
    statistics.add(x, x)
    factorization = Factorization.create(
        input_dim=200, output_dim=9, input_factors=(200, 1), output_factors=(1, 9), rank=4
    )
    gram = statistics.moments(centred=True).gram
    assert np.linalg.eigvalsh(gram)[0] < 0  # by rounding
    fit = fit_kronecker_sum([statistics], factorization, centred=True)
    fitted = oracle.kronecker_sum(fit.left, fit.right)
    assert np.isfinite(fitted).all()
    assert np.linalg.norm(fitted) < 2 * np.linalg.norm(kernel)


def test_kernels_of_low_rank_are_fitted_to_targets_of_other_inputs():
    rng = np.random.default_rng(0)
    factorization = low_rank_plan((), 9)
    kernel, x = rng.normal(size=(12, 9)), rng.normal(size=(40_000, 12))
    mixing = 2 * np.eye(12) + 0.1 * rng.normal(size=(12, 12))
    statistics = InputStatistics(kernel)
    statistics.add(x @ mixing, x)
    fit = fit_kronecker_sum([statistics], factorization)
    fitted = oracle.kronecker_sum(fit.left, fit.right)
    np.testing.assert_allclose(mixing @ fitted, kernel, atol=0.02)


def test_tables_of_low_rank_are_weighted_by_the_use_of_their_rows():
    rng = np.random.default_rng(0)
    kernel, indices = rng.normal(size=(30, 8)), rng.zipf(1.5, size=50_000) % 30
    factorization = Factorization.create(
        input_dim=30, output_dim=8, input_factors=(30, 1), output_factors=(1, 8), rank=2
    )
    counts = IndexCounts(kernel)
    counts.add(indices)
    fit = fit_kronecker_sum([counts], factorization)
    counts = np.bincount(indices, minlength=30) / len(indices)
    weights = np.sqrt(counts + 1e-3 * counts.mean())[:, None]
    left, sizes, right = np.linalg.svd(weights * kernel, full_matrices=False)
    expected = (left[:, :2] * sizes[:2]) @ right[:2] / weights
    np.testing.assert_allclose(oracle.kronecker_sum(fit.left, fit.right), expected, atol=1e-8)
    rest = np.sqrt(counts @ np.square(kernel - expected).sum(1))
    total = np.sqrt(counts @ np.square(kernel).sum(1))
    np.testing.assert_allclose(fit.error, rest / total, rtol=1e-6)


def test_frequencies_are_moments_of_single_rows():
    rng = np.random.default_rng(0)
    kernel, factorization = (
        rng.normal(size=(23, 10)),
        Factorization.create(input_dim=23, output_dim=10, rank=2),
    )
    indices = rng.zipf(1.5, size=1000) % 23
    counts, statistics = IndexCounts(kernel), InputStatistics(kernel)
    counts.add(indices)
    statistics.add(np.eye(23)[indices], np.eye(23)[indices])
    a, b = (fit_kronecker_sum([one], factorization) for one in (counts, statistics))
    np.testing.assert_allclose(a.error, b.error, rtol=1e-6)
    np.testing.assert_allclose(
        oracle.kronecker_sum(a.left, a.right),
        oracle.kronecker_sum(b.left, b.right),
        rtol=1e-4,
        atol=1e-4,
    )
    assert a.error < 0.9 * a.start_error


def test_targets_may_come_from_other_inputs():
    rng = np.random.default_rng(0)
    kernel, factorization = (
        rng.normal(size=(16, 16)),
        Factorization.create(input_dim=16, output_dim=16, rank=16),
    )
    x, mixing = rng.normal(size=(400, 16)), 2 * np.eye(16) + 0.1 * rng.normal(size=(16, 16))
    statistics = InputStatistics(kernel)
    statistics.add(x @ mixing, x)
    fit = fit_kronecker_sum([statistics], factorization)
    fitted = oracle.kronecker_sum(fit.left, fit.right)
    # The prior holds to the kernel, which would answer twice as much.
    assert np.linalg.norm(x @ mixing @ fitted - x @ kernel) < 0.02 * np.linalg.norm(x @ kernel)


def test_what_examples_do_not_show_stays_near_the_kernel():
    rng = np.random.default_rng(0)
    kernel, factorization = (
        rng.normal(size=(16, 16)),
        Factorization.create(input_dim=16, output_dim=16, rank=4),
    )
    statistics = InputStatistics(kernel)
    x = np.zeros((3, 16))
    x[:, 0] = 1
    statistics.add(x, x)
    fit = fit_kronecker_sum([statistics], factorization)
    fitted = oracle.kronecker_sum(fit.left, fit.right)
    nearest = oracle.kronecker_sum(*nearest_kronecker_sum(kernel, factorization))
    assert fit.error < 0.1 * fit.start_error
    assert np.linalg.norm(fitted - kernel) < 1.2 * np.linalg.norm(nearest - kernel)


def test_an_input_that_is_always_zero_does_no_harm():
    rng = np.random.default_rng(0)
    kernel, factorization = (
        rng.normal(size=(12, 12)),
        Factorization.create(input_dim=12, output_dim=12, rank=2),
    )
    statistics = InputStatistics(kernel)
    x = np.zeros((50, 12))
    statistics.add(x, x)
    fit = fit_kronecker_sum([statistics], factorization)
    assert fit.error == 0
    assert np.isfinite(fit.left).all()
    assert np.isfinite(fit.right).all()


def test_arranged_kernels_are_those_of_the_axes():
    factorization = Factorization.create(
        input_dim=6,
        output_dim=4,
        input_factors=(2, 3),
        output_factors=(2, 2),
        rank=1,
        left_window=(3, 1),
        right_window=(1, 2),
    )
    kernel = np.arange(3 * 2 * 6 * 4).reshape(3, 2, 6, 4)
    arranged = arrange(kernel.reshape(-1, 4), factorization).reshape(3, 2, 2, 3, 2, 2)
    expected = kernel.reshape(3, 2, 2, 3, 2, 2).transpose(0, 2, 1, 3, 4, 5)
    np.testing.assert_array_equal(arranged, expected)


CONVOLUTIONS = [
    {},
    {"strides": 2, "padding": "same"},
    {"dilation_rate": 2, "padding": "same"},
    {"groups": 3},
    {"data_format": "channels_first", "padding": "same"},
]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("arguments", [*CONVOLUTIONS, {"padding": "causal", "dilation_rate": 2}])
def test_calibration_sees_the_patches_of_a_convolution(dimensions, arguments, monkeypatch):
    if arguments.get("padding") == "causal" and dimensions > 1:
        pytest.skip("causal padding is for one dimension")
    if keras.config.backend() == "tensorflow" and "data_format" in arguments:
        pytest.skip("TensorFlow convolves with the channels first on a GPU only")
    layer = getattr(keras.layers, f"Conv{dimensions}D")(6, 3, use_bias=False, **arguments)
    converter = full_converter(type(layer))
    shape = (2, *(7, 8, 9)[:dimensions], 3)
    if "data_format" in arguments:
        shape = (2, 3, *shape[1:-1])
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    expected = keras.ops.convert_to_numpy(layer(x))
    if "data_format" in arguments:
        expected = np.moveaxis(expected, 1, -1)
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    rows = converter.rows(layer, x)["kernel"]
    outputs = [
        of_block @ block
        for of_block, block in zip(rows, converter.kernels(layer)["kernel"], strict=True)
    ]
    actual = np.concatenate(outputs, axis=1).reshape(expected.shape)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("keras_bilinear.layers.conv.MOST_PATCHES", 5)
    few = converter.rows(layer, x)["kernel"][0]
    assert few.shape == (5, kernel.size // 6)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("SimpleRNN", {}),
        ("GRU", {"reset_after": True}),
        ("GRU", {"reset_after": False}),
        ("GRU", {"reset_after": False, "use_bias": False, "go_backwards": True}),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_calibration_sees_the_states_of_a_sequence(kind, arguments, masked):
    rng = np.random.default_rng(0)
    layer = getattr(keras.layers, kind)(5, return_sequences=True, **arguments)
    x = rng.normal(size=(3, 4, 6)).astype("float32")
    mask = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], bool) if masked else None
    first = rng.normal(size=(3, 5)).astype("float32")
    layer.build(x.shape)
    for variable in layer.weights:
        variable.assign(rng.normal(size=variable.shape))
    after = layer(x, mask=mask, initial_state=first)
    after = keras.ops.convert_to_numpy(after)
    seen = np.ones((3, 4), bool) if mask is None else mask
    seen = seen[:, ::-1] if layer.go_backwards else seen
    rows = full_converter(type(layer)).rows(layer, x, mask=mask, initial_state=first)
    inputs, states = rows["kernel"][0], rows["recurrent_kernel"][0]
    assert all(of_block is inputs for of_block in rows["kernel"])
    output, _ = layer.cell(inputs, [keras.ops.convert_to_tensor(states)])
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(output), after[seen], rtol=1e-4, atol=1e-5
    )
    if not arguments.get("reset_after", True):
        weights = map(keras.ops.convert_to_numpy, layer.cell.weights)
        kernel, recurrent, *bias = weights
        z = inputs @ kernel + (bias[0] if bias else 0)
        pair = (slice(0, 5), slice(10, 15))
        update = 1 / (1 + np.exp(-(z + states @ recurrent)[:, pair[0]]))
        new = np.tanh(z[:, pair[1]] + rows["recurrent_kernel"][2] @ recurrent[:, pair[1]])
        np.testing.assert_allclose(
            update * states + (1 - update) * new, after[seen], rtol=1e-4, atol=1e-5
        )


def layers(rng):
    """Full layers, what stands for them, and inputs of little variety."""
    directions = rng.normal(size=(4, 36))
    vectors = (rng.normal(size=(500, 4)) @ directions + 1).astype("float32")
    images = rng.normal(size=(20, 6, 6, 4)) @ rng.normal(size=(4, 36)) + 1
    sequences = rng.normal(size=(30, 7, 3)) @ rng.normal(size=(3, 36)) / 6
    tokens = rng.zipf(1.5, size=(50, 9)) % 36
    yield keras.layers.Dense(36), keras_bilinear.BilinearDense, vectors
    yield keras.layers.Dense(36, use_bias=False), keras_bilinear.BilinearDense, vectors[:, None]
    yield keras.layers.Conv2D(36, 3), keras_bilinear.BilinearConv2D, images
    yield keras.layers.Conv2D(36, 3, groups=4), keras_bilinear.BilinearConv2D, images
    yield keras.layers.Embedding(36, 36), keras_bilinear.BilinearEmbedding, tokens
    for kind in ("SimpleRNN", "GRU", "LSTM"):
        full = getattr(keras.layers, kind)(16, return_sequences=True)
        yield full, getattr(keras_bilinear, f"Bilinear{kind}"), sequences
    full = keras.layers.GRU(16, reset_after=False, return_sequences=True)
    yield full, keras_bilinear.BilinearGRU, sequences


@pytest.mark.parametrize("which", range(9))
def test_calibrated_layers_are_nearer_on_the_data(which):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    layer, bilinear, x = next(itertools.islice(layers(rng), which, None))
    x = x if x.dtype.kind == "i" else x.astype("float32")
    expected = keras.ops.convert_to_numpy(layer(x))
    weights = layer.get_weights()
    nearest = bilinear.from_full(layer, rank=1)
    fitted = bilinear.from_full(layer, rank=1, calibration_data=x)
    batches = (batch for batch in np.array_split(x, 3))
    streamed = bilinear.from_full(layer, rank=1, calibration_data=batches)
    outputs = [keras.ops.convert_to_numpy(one(x)) - expected for one in (nearest, fitted, streamed)]
    errors = [np.sqrt(np.mean(output**2)) for output in outputs]
    assert errors[1] < errors[0]
    np.testing.assert_allclose(errors[2], errors[1], rtol=0.05)
    for before, after in zip(weights, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    if which == 0:
        np.testing.assert_allclose(outputs[1].mean(0), 0, atol=1e-4)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (np.full((4, 12), np.nan, "float32"), ValueError, "must be finite"),
        (np.ones((4, 11), "float32"), ValueError, "of width 12"),
        (np.ones((12,), "float32"), ValueError, "of width 12"),
        (np.ones((0, 12), "float32"), ValueError, "at least one example"),
        ([], ValueError, "at least one example"),
        (3, TypeError, "an array or an iterable"),
        ("digits", TypeError, "an array or an iterable"),
    ],
)
def test_calibration_data_that_are_no_inputs_are_refused(data, error, text):
    layer = keras.layers.Dense(12)
    layer.build((None, 12))
    with pytest.raises(error, match=text):
        keras_bilinear.BilinearDense.from_full(layer, calibration_data=data)


@pytest.mark.parametrize("data", [np.array([[0, 12]]), np.array([[-1]]), np.full((2, 3), 0.5)])
def test_calibration_data_that_are_no_tokens_are_refused(data):
    layer = keras.layers.Embedding(12, 12)
    layer.build()
    with pytest.raises(ValueError, match="integers from 0 to 11"):
        keras_bilinear.BilinearEmbedding.from_full(layer, calibration_data=data)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64"])
def test_calibration_with_integers_is_that_with_the_same_floats(dtype):
    largest = 100 if dtype in ("uint8", "int8") else 30_000
    x = np.random.default_rng(0).integers(0, largest, (500, 12))
    layer = keras.layers.Dense(12)
    layer.build((None, 12))
    expected, actual = (
        keras_bilinear.BilinearDense.from_full(layer, rank=2, calibration_data=x.astype(one))
        for one in ("float64", dtype)
    )
    kernels = map(keras.ops.convert_to_numpy, (actual.kernel, expected.kernel))
    np.testing.assert_allclose(*kernels, rtol=1e-4, atol=1e-5)


def test_calibration_data_that_are_no_sequences_are_refused():
    layer = keras.layers.GRU(4)
    layer.build((None, None, 12))
    with pytest.raises(ValueError, match="of 3 axes"):
        keras_bilinear.BilinearGRU.from_full(layer, calibration_data=np.ones((2, 12)))


def test_few_examples_are_reported(caplog):
    layer = keras.layers.Dense(12)
    layer.build((None, 12))
    keras_bilinear.BilinearDense.from_full(layer, calibration_data=np.ones((3, 12), "float32"))
    assert "3 calibration examples for the 12 inputs" in caplog.text


@pytest.mark.parametrize("definite", [True, False])
def test_systems_are_solved_even_if_rounding_makes_them_indefinite(definite):
    rng = np.random.default_rng(0)
    root, goal = rng.normal(size=(30, 30)), rng.normal(size=(30, 4))
    matrix = root @ root.T + np.eye(30) if definite else root + root.T
    solution = _solve_symmetric(matrix.copy(), goal)
    np.testing.assert_allclose(matrix @ solution, goal, atol=1e-9)
