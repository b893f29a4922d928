import dataclasses
import itertools
import math
import re

import numpy as np
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keras_bilinear.kronecker.factorization import (
    FACTORIZED,
    Factorization,
    Order,
    check_factors,
    check_positive_int,
    choose_aligned_factors,
    choose_factors,
    recurrent_input_factors,
)

PRIMES = [3, 5, 7, 11, 13, 17, 101, 509, 997, 10007, 1_000_003]
NOT_POSITIVE_INTEGERS = [0, -3, 2.0, 2.5, True, "8", None, [4], math.nan]
SMALL = st.integers(1, 12)


def is_tight(first, second, size):
    return (first - 1) * second < size <= first * second and first * (second - 1) < size


@given(st.integers(1, 10**9))
@example(3)
@example(5)
def test_chosen_factors_are_tight_and_near_square(size):
    first, second = choose_factors(size)
    assert first <= second
    assert is_tight(first, second, size)
    assert first + second <= 1.25 * 2 * math.ceil(math.sqrt(size))


def test_chosen_factors_of_every_small_size():
    for size in range(1, 5000):
        first, second = choose_factors(size)
        assert first <= second
        assert is_tight(first, second, size), size
        assert first > 1 or size <= 2, size


@pytest.mark.parametrize("prime", PRIMES)
def test_a_prime_is_padded(prime):
    first, second = choose_factors(prime)
    assert first > 1
    assert prime < first * second < prime + second


@pytest.mark.parametrize("root", [1, 2, 7, 32, 1000])
def test_a_square_is_split_into_its_root(root):
    assert choose_factors(root**2) == (root, root)


@given(SMALL, SMALL, st.integers(1, 4))
def test_parameters_count_the_numbers_in_both_factors(input_dim, output_dim, rank):
    factorization = Factorization.create(input_dim=input_dim, output_dim=output_dim, rank=rank)
    left, right = np.zeros(factorization.left_shape), np.zeros(factorization.right_shape)
    assert left.shape[0] == right.shape[0] == rank
    assert factorization.parameters == left.size + right.size
    assert factorization.full_parameters == input_dim * output_dim
    padded = np.kron(left[0], right[0]).shape
    assert padded == (factorization.padded_input_dim, factorization.padded_output_dim)
    assert padded >= (input_dim, output_dim)


def count_macs(factorization, order):
    """Counts one multiplication for each pair of numbers that meet in `sum_r L_r^T X R_r`."""
    (d1, d2), (u1, u2) = factorization.input_factors, factorization.output_factors
    first, second = (
        ((u1, d2, d1), (u1, u2, d2)) if order is Order.LEFT_FIRST else ((d1, u2, d2), (u1, u2, d1))
    )
    return sum(1 for shape in (first, second) for _ in np.ndindex(factorization.rank, *shape))


@given(SMALL, SMALL, st.integers(1, 3))
def test_macs_are_those_of_the_cheaper_order(input_dim, output_dim, rank):
    factorization = Factorization.create(input_dim=input_dim, output_dim=output_dim, rank=rank)
    macs = {order: count_macs(factorization, order) for order in FACTORIZED}
    assert factorization.macs == macs[factorization.order] == min(macs.values())
    assert factorization.full_macs == input_dim * output_dim


def test_order_follows_the_factors():
    assert (
        Factorization.create(
            input_dim=64, output_dim=8, input_factors=(32, 2), output_factors=(2, 4)
        ).order
        is Order.LEFT_FIRST
    )
    assert (
        Factorization.create(
            input_dim=64, output_dim=8, input_factors=(2, 32), output_factors=(4, 2)
        ).order
        is Order.RIGHT_FIRST
    )


@pytest.mark.parametrize(
    ("input_factors", "output_factors", "rank"),
    [
        ((3, 4), (2, 5), 1),
        ((3, 4), (2, 5), 2),
        ((1, 3), (4, 8), 1),
        ((3, 1), (4, 8), 1),
        ((6, 2), (2, 6), 1),
        ((6, 2), (2, 6), 2),
        ((6, 2), (2, 6), 3),
        ((5, 5), (5, 5), 1),
    ],
)
def test_attainable_rank_is_that_of_a_random_kernel(input_factors, output_factors, rank):
    factorization = Factorization.create(
        input_dim=math.prod(input_factors),
        output_dim=math.prod(output_factors),
        input_factors=input_factors,
        output_factors=output_factors,
        rank=rank,
    )
    random = np.random.default_rng(0)
    kernel = oracle.kronecker_sum(
        random.normal(size=factorization.left_shape), random.normal(size=factorization.right_shape)
    )
    assert np.linalg.matrix_rank(kernel) == factorization.attainable_rank


@given(SMALL, SMALL)
def test_sufficient_rank_is_that_of_the_rearranged_kernel(input_dim, output_dim):
    factorization = Factorization.create(input_dim=input_dim, output_dim=output_dim)
    (d1, d2), (u1, u2) = factorization.input_factors, factorization.output_factors
    assert factorization.sufficient_rank == np.linalg.matrix_rank(
        np.random.default_rng(0).normal(size=(d1 * u1, d2 * u2))
    )


@given(SMALL, SMALL, st.integers(1, 3))
def test_transposed_swaps_input_and_output(input_dim, output_dim, rank):
    factorization = Factorization.create(input_dim=input_dim, output_dim=output_dim, rank=rank)
    other = Factorization.create(input_dim=output_dim, output_dim=input_dim, rank=rank)
    assert factorization.transposed == other
    assert factorization.transposed.transposed == factorization
    assert factorization.transposed.parameters == factorization.parameters


@given(st.integers(2, 99), st.integers(2, 99), st.integers(1, 9))
def test_factors_of_low_rank_are_two_plain_products(input_dim, output_dim, rank):
    for window, inputs in (((), input_dim), ((3, 2), 6 * input_dim)):
        ones = (1,) * len(window)
        square = Factorization.create(
            input_dim=input_dim,
            output_dim=output_dim,
            rank=rank,
            left_window=ones,
            right_window=window,
        )
        assert not square.is_low_rank
        factors = square.low_rank_factors
        factorization = Factorization.create(
            input_dim=input_dim,
            output_dim=output_dim,
            input_factors=factors[0],
            output_factors=factors[1],
            rank=rank,
            left_window=ones,
            right_window=window,
        )
        assert factorization.is_low_rank
        assert factorization.parameters == rank * (inputs + output_dim)
        assert factorization.macs == factorization.parameters
        assert factorization.between(factorization.order) == rank
        assert factorization.attainable_rank == min(rank, inputs, output_dim)
    assert factorization.low_rank_factors == factors
    assert square.block.low_rank_factors == factors
    gates = dataclasses.replace(
        factorization, left_window=(), right_window=(), blocks=3, share_right=False
    )
    assert gates.low_rank_factors == ((input_dim, 1), (1, output_dim))
    other = Factorization.create(input_dim=input_dim, output_dim=output_dim, rank=rank, blocks=2)
    assert other.low_rank_factors is None
    assert not other.is_low_rank


def test_a_recurrent_kernel_has_the_same_factors_on_both_sides_or_is_of_low_rank():
    for factors in ((8, 8), (4, 16), (16, 4), (7, 10), None):
        assert recurrent_input_factors(64, factors) == factors
    assert recurrent_input_factors(64, (1, 64)) == (64, 1)
    assert recurrent_input_factors(64, (64, 1)) == (1, 64)
    assert recurrent_input_factors(2, (1, 2)) == (1, 2)  # that is as square as it gets


def test_given_factors_are_kept():
    factorization = Factorization.create(
        input_dim=12,
        output_dim=10,
        input_factors=(4, 3),
        output_factors=np.array([5, 2]),
        rank=np.int64(2),
    )
    assert (factorization.input_factors, factorization.output_factors, factorization.rank) == (
        (4, 3),
        (5, 2),
        2,
    )
    assert all(type(n) is int for n in (*factorization.output_factors, factorization.rank))


WINDOWS = [
    {"left_window": (1,), "right_window": (3,)},
    {"left_window": (3,), "right_window": (1,)},
    {"left_window": (1, 1), "right_window": (3, 3)},
    {"left_window": (3, 1), "right_window": (1, 3)},
    {"left_window": (2, 1, 1), "right_window": (1, 2, 3)},
]


@pytest.mark.parametrize("windows", WINDOWS)
@given(SMALL, SMALL, st.integers(1, 3), st.integers(1, 3))
def test_a_convolution_counts_the_numbers_in_both_factors(windows, channels, filters, rank, groups):
    factorization = Factorization.create(
        input_dim=channels, output_dim=filters, rank=rank, blocks=groups, **windows
    )
    left, right = np.zeros(factorization.left_shape), np.zeros(factorization.right_shape)
    assert left.shape[0] == right.shape[0] == rank
    assert factorization.parameters == left.size + right.size
    padded = np.kron(left[0], right[0]).shape
    assert padded == (
        *factorization.window,
        factorization.padded_input_dim,
        groups * factorization.padded_output_dim,
    )
    assert factorization.full_shape == (*factorization.window, channels, groups * filters)
    assert (
        factorization.full_parameters
        == factorization.full_macs
        == math.prod(factorization.full_shape)
    )


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("channels", [(3, 32), (7, 11), (37, 13), (13, 128), (127, 128), (1, 64)])
def test_channels_are_never_split_without_compression(windows, channels):
    factorization = Factorization.create(input_dim=channels[0], output_dim=channels[1], **windows)
    near_square = [choose_factors(size) for size in channels]
    orders = itertools.product(*((split, split[::-1]) for split in near_square))
    least = min(Factorization(*channels, *pair, **windows).parameters for pair in orders)
    assert factorization.parameters <= 2.5 * least
    assert factorization.parameters < factorization.full_parameters / 2 or max(channels) < 12


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize(
    "pair", [((3, 1), (4, 8)), ((1, 3), (4, 8)), ((4, 4), (2, 8)), ((2, 6), (6, 2))]
)
@pytest.mark.parametrize("rank", [1, 2])
def test_attainable_rank_of_a_convolution_is_that_of_a_random_kernel(windows, pair, rank):
    factorization = Factorization.create(
        input_dim=math.prod(pair[0]),
        output_dim=math.prod(pair[1]),
        input_factors=pair[0],
        output_factors=pair[1],
        rank=rank,
        **windows,
    )
    random = np.random.default_rng(0)
    kernel = oracle.kronecker_sum(
        random.normal(size=factorization.left_shape), random.normal(size=factorization.right_shape)
    )
    kernel = kernel.reshape(-1, factorization.output_dim)
    assert np.linalg.matrix_rank(kernel) == factorization.attainable_rank


@given(SMALL, SMALL)
def test_aligned_factors_reach_the_rank_of_every_near_square_order(channels, filters):
    windows = {"left_window": (1, 1), "right_window": (3, 3)}
    best = Factorization(
        channels, filters, *choose_aligned_factors(channels, filters, **windows), **windows
    )
    for inputs in (choose_factors(channels), choose_factors(channels)[::-1]):
        for outputs in (choose_factors(filters), choose_factors(filters)[::-1]):
            other = Factorization(channels, filters, inputs, outputs, **windows)
            assert best.attainable_rank >= other.attainable_rank


def test_a_window_of_one_is_split_as_a_dense_projection():
    factorization = Factorization.create(
        input_dim=128, output_dim=200, left_window=(1, 1), right_window=(1, 1)
    )
    assert factorization.pointwise
    assert (factorization.input_factors, factorization.output_factors) == (
        choose_factors(128),
        choose_factors(200),
    )
    assert not Factorization.create(input_dim=12, output_dim=12, blocks=2).pointwise


@pytest.mark.parametrize("value", NOT_POSITIVE_INTEGERS)
def test_check_positive_int_refuses(value):
    message = f"`width` must be a positive integer. Received: width={value!r} (of type"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_positive_int("width", value)


@pytest.mark.parametrize(
    ("argument", "value"),
    [*itertools.product(["input_dim", "output_dim", "rank"], NOT_POSITIVE_INTEGERS)],
)
def test_factorization_refuses_sizes(argument, value):
    message = f"`{argument}` must be a positive integer. Received: {argument}={value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Factorization.create(**{"input_dim": 12, "output_dim": 12, argument: value})


@pytest.mark.parametrize("value", NOT_POSITIVE_INTEGERS)
def test_choose_factors_refuses(value):
    with pytest.raises(ValueError, match=r"`size` must be a positive integer. Received: size="):
        choose_factors(value)


@pytest.mark.parametrize("argument", ["input_factors", "output_factors"])
@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (12, "must be a pair of positive integers"),
        ("34", "must be a pair of positive integers"),
        ((12,), "must be a pair of positive integers"),
        ((3, 2, 2), "must be a pair of positive integers"),
        ((), "must be a pair of positive integers"),
        ((0, 12), "[0]` must be a positive integer"),
        ((4, -3), "[1]` must be a positive integer"),
        ((4, 3.0), "[1]` must be a positive integer"),
        ((True, 12), "[0]` must be a positive integer"),
        ((4, "3"), "[1]` must be a positive integer"),
        ((3, 3), "must be at least 12, the size they factor"),
        ((1, 11), "must be at least 12, the size they factor"),
        ((5, 3), "must fit the size 12 tightly"),
        ((1, 13), "must fit the size 12 tightly"),
        ((7, 7), "must fit the size 12 tightly"),
    ],
)
def test_factorization_refuses_factors(argument, value, rule):
    with pytest.raises(ValueError, match=f"`{argument}.*{re.escape(rule)}.*Received: {argument}"):
        Factorization.create(input_dim=12, output_dim=12, **{argument: value})


def test_check_factors_without_a_size_accepts_any_pair():
    assert check_factors("input_factors", [7, 9]) == (7, 9)
    assert check_factors("input_factors", None, 12) is None


def test_gates_have_factors_of_their_own():
    factorization = Factorization.create(
        input_dim=12, output_dim=20, rank=3, blocks=4, share_right=False
    )
    gate = Factorization.create(input_dim=12, output_dim=20, rank=3)
    assert factorization.block == gate
    assert factorization.left_shape == (4, *gate.left_shape)
    assert factorization.right_shape == (4, *gate.right_shape)
    assert factorization.full_shape == (12, 80)
    assert factorization.macs == 4 * gate.macs
    assert factorization.parameters == 4 * gate.parameters
    assert factorization.sufficient_rank == gate.sufficient_rank
