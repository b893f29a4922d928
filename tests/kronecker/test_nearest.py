import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_bilinear.kronecker.factorization import Factorization
from keras_bilinear.kronecker.nearest import nearest_kronecker_sum

DIMS = st.integers(1, 40)


def random_kernel(factorization, seed=0):
    return np.random.default_rng(seed).normal(
        size=(factorization.input_dim, factorization.output_dim)
    )


def residual(kernel, factorization):
    """Of the padded kernel: what the decomposition puts into the padding counts."""
    left, right = nearest_kronecker_sum(kernel, factorization)
    assert left.shape == factorization.left_shape
    assert right.shape == factorization.right_shape
    assert left.dtype == right.dtype == "float64"
    return np.linalg.norm(
        oracle.kronecker_sum(left, right) - oracle.pad_like(kernel, factorization)
    )


def singular_values(kernel, factorization):
    """Of the kernel rearranged entry by entry: one row for each entry of the left factor."""
    (d1, d2), (u1, u2) = factorization.input_factors, factorization.output_factors
    padded = oracle.pad_like(kernel, factorization)
    rows = [
        padded[a * d2 : (a + 1) * d2, b * u2 : (b + 1) * u2].ravel()
        for a in range(d1)
        for b in range(u1)
    ]
    return np.linalg.svd(np.array(rows), compute_uv=False)


@given(DIMS, DIMS, st.integers(1, 6), st.integers(0, 99))
def test_residual_is_that_of_the_truncated_svd(input_dim, output_dim, rank, seed):
    factorization = Factorization.create(input_dim=input_dim, output_dim=output_dim, rank=rank)
    kernel = random_kernel(factorization, seed)
    best = np.linalg.norm(singular_values(kernel, factorization)[rank:])
    np.testing.assert_allclose(residual(kernel, factorization), best, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_residual_of_a_kernel_of_very_different_singular_values(rank):
    factorization = Factorization.create(input_dim=36, output_dim=36, rank=rank)
    random = np.random.default_rng(0)
    left, _ = np.linalg.qr(random.normal(size=(36, 6)))
    right, _ = np.linalg.qr(random.normal(size=(36, 6)))
    scale = 10.0 ** -np.arange(0, 12, 2)  # down to what float32 cannot tell from zero
    terms = (left * scale).T.reshape(6, 6, 6), right.T.reshape(6, 6, 6)
    kernel = oracle.kronecker_sum(*terms)
    best = np.linalg.norm(scale[rank:])
    np.testing.assert_allclose(residual(kernel, factorization), best, rtol=1e-6, atol=2e-8)


@given(DIMS, DIMS, st.integers(0, 3))
def test_exact_at_the_sufficient_rank_and_beyond(input_dim, output_dim, more):
    factorization = Factorization.create(input_dim=input_dim, output_dim=output_dim)
    rank = factorization.sufficient_rank + more
    factorization = Factorization.create(input_dim=input_dim, output_dim=output_dim, rank=rank)
    kernel = random_kernel(factorization)
    assert residual(kernel, factorization) < 1e-12 * np.linalg.norm(kernel)


@pytest.mark.parametrize(
    ("input_factors", "output_factors"), [((2, 30), (3, 4)), ((30, 2), (4, 3)), ((1, 60), (12, 1))]
)
def test_exact_with_one_side_larger(input_factors, output_factors):
    rank = Factorization.create(
        input_dim=60, output_dim=12, input_factors=input_factors, output_factors=output_factors
    ).sufficient_rank
    factorization = Factorization.create(
        input_dim=60,
        output_dim=12,
        input_factors=input_factors,
        output_factors=output_factors,
        rank=rank,
    )
    assert residual(random_kernel(factorization), factorization) < 1e-11


def test_exact_for_a_sum_of_as_many_terms():
    factorization = Factorization.create(input_dim=30, output_dim=42, rank=3)
    random = np.random.default_rng(0)
    kernel = oracle.kronecker_sum(
        random.normal(size=factorization.left_shape), random.normal(size=factorization.right_shape)
    )
    assert residual(kernel, factorization) < 1e-12 * np.linalg.norm(kernel)


CONVOLUTIONS = [
    {"left_window": (1, 1), "right_window": (3, 3)},
    {"left_window": (3, 1), "right_window": (1, 2)},
    {"left_window": (1,), "right_window": (5,), "blocks": 3},
    {"left_window": (2, 1, 1), "right_window": (1, 2, 2), "blocks": 2},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("dims", [(6, 8), (7, 5)])
def test_kernels_with_windows_and_groups(dims, options):
    sizes = dict(zip(("input_dim", "output_dim"), dims, strict=True))
    factorization = Factorization.create(**sizes, **options)
    kernel = np.random.default_rng(0).normal(size=factorization.full_shape)
    ranks = range(1, factorization.sufficient_rank + 1)
    factorizations = [Factorization.create(**sizes, rank=rank, **options) for rank in ranks]
    errors = [residual(kernel, factorization) for factorization in factorizations]
    assert (np.diff(errors) < 0).all()
    assert errors[-1] < 1e-12 * np.linalg.norm(kernel)
    # The rearranged kernel has a row for each number of the left factor.
    padded = oracle.pad_like(kernel, factorization)
    pairs = zip(factorization.left_shape[1:], factorization.right_shape[1:], strict=True)
    axes = padded.reshape([size for pair in pairs for size in pair])
    half = axes.ndim // 2
    order = [*range(0, 2 * half, 2), *range(1, 2 * half, 2)]
    rows = axes.transpose(order).reshape(np.prod(factorization.left_shape[1:]), -1)
    values = np.linalg.svd(rows, compute_uv=False)
    best = [np.linalg.norm(values[rank:]) for rank in ranks]
    np.testing.assert_allclose(errors, best, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dims", [(36, 49), (17, 13), (3, 50), (101, 7)])
def test_error_falls_with_the_rank(dims):
    sizes = dict(zip(("input_dim", "output_dim"), dims, strict=True))
    ranks = range(1, Factorization.create(**sizes).sufficient_rank)
    factorizations = [Factorization.create(**sizes, rank=rank) for rank in ranks]
    errors = [
        residual(random_kernel(factorization), factorization) for factorization in factorizations
    ]
    assert (np.diff(errors) < 0).all()


@given(DIMS, DIMS, st.integers(1, 5))
def test_never_worse_than_random_factors_at_their_best_scale(input_dim, output_dim, rank):
    factorization = Factorization.create(input_dim=input_dim, output_dim=output_dim, rank=rank)
    kernel = random_kernel(factorization)
    random = np.random.default_rng(1)
    guess = oracle.kronecker_sum(
        random.normal(size=factorization.left_shape), random.normal(size=factorization.right_shape)
    )
    padded = oracle.pad_like(kernel, factorization)
    guess *= np.sum(guess * padded) / np.sum(guess**2)
    assert residual(kernel, factorization) <= np.linalg.norm(padded - guess) + 1e-9


@given(DIMS, DIMS, st.integers(1, 5))
def test_both_factors_of_a_term_have_the_same_norm(input_dim, output_dim, rank):
    factorization = Factorization.create(input_dim=input_dim, output_dim=output_dim, rank=rank)
    left, right = nearest_kronecker_sum(random_kernel(factorization), factorization)
    norms = [np.linalg.norm(factor, axis=(1, 2)) for factor in (left, right)]
    np.testing.assert_allclose(*norms, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 200])
def test_zero_kernel_gives_zero_factors(rank):
    factorization = Factorization.create(input_dim=12, output_dim=10, rank=rank)
    for factor in nearest_kronecker_sum(np.zeros((12, 10)), factorization):
        np.testing.assert_array_equal(factor, 0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32"])
def test_any_real_dtype(dtype):
    factorization = Factorization.create(input_dim=12, output_dim=10, rank=10)
    kernel = (10 * random_kernel(factorization)).astype(dtype)
    assert residual(kernel, factorization) < 1e-10


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(scale):
    factorization = Factorization.create(input_dim=13, output_dim=10, rank=10)
    kernel = scale * random_kernel(factorization)
    assert residual(kernel, factorization) < 1e-11 * scale
