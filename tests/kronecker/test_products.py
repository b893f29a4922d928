import functools

import numpy as np
import oracle
import pytest
from backend_gradient import evaluate, gradients
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_bilinear.kronecker import products
from keras_bilinear.kronecker.factorization import FACTORIZED


@st.composite
def cases(draw):
    """Factors, and a generator of whatever else the test needs."""
    rank, d1, d2, u1, u2 = (draw(st.integers(1, n)) for n in (6, 5, 5, 5, 5))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    left = random.normal(size=(rank, d1, u1)).astype("float32")
    right = random.normal(size=(rank, d2, u2)).astype("float32")
    return left, right, random


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@given(cases())
def test_materialize(case):
    left, right, _ = case
    assert_close(evaluate(products.materialize, left, right), oracle.kronecker_sum(left, right))


@given(cases())
def test_transpose(case):
    left, right, _ = case
    transposed = [ops.convert_to_numpy(f) for f in products.transpose(left, right)]
    np.testing.assert_array_equal(
        oracle.kronecker_sum(*transposed), oracle.kronecker_sum(left, right).T
    )


@pytest.mark.parametrize("order", FACTORIZED)
@given(case=cases(), batch=st.integers(0, 4))
def test_project(order, case, batch):
    left, right, random = case
    kernel = oracle.kronecker_sum(left, right)
    x = random.normal(size=(batch, len(kernel))).astype("float32")
    project = functools.partial(products.project, order=order)
    assert_close(evaluate(project, x, left, right), x @ kernel)


@given(case=cases(), count=st.integers(0, 6))
def test_rows(case, count):
    left, right, random = case
    kernel = oracle.kronecker_sum(left, right)
    indices = random.integers(len(kernel), size=count).astype("int32")
    assert_close(evaluate(products.rows, indices, left, right), kernel[indices])


def test_rows_flattens_the_indices():
    left, right = np.ones((1, 2, 2), "float32"), np.ones((1, 3, 2), "float32")
    assert tuple(products.rows(np.zeros((2, 5), "int32"), left, right).shape) == (10, 4)


@pytest.mark.parametrize("order", FACTORIZED)
@given(case=cases(), batch=st.integers(1, 3))
def test_gradients_of_project(order, case, batch):
    left, right, random = case
    kernel = oracle.kronecker_sum(left, right)
    x = random.normal(size=(batch, kernel.shape[0])).astype("float32")
    weights = random.normal(size=(batch, kernel.shape[1])).astype("float32")

    def weighted_sum(x, left, right):
        return ops.sum(ops.multiply(products.project(x, left, right, order), weights))

    x_gradient, *factor_gradients = gradients(weighted_sum, x, left, right)
    assert_close(x_gradient, weights @ kernel.T)
    for actual, expected in zip(
        factor_gradients, oracle.factor_gradients(x.T @ weights, left, right), strict=True
    ):
        assert_close(actual, expected)


@given(case=cases(), count=st.integers(1, 6))
def test_gradients_of_rows(case, count):
    left, right, random = case
    kernel = oracle.kronecker_sum(left, right)
    indices = random.integers(len(kernel), size=count).astype("int32")
    weights = random.normal(size=(count, kernel.shape[1])).astype("float32")
    kernel_gradient = np.zeros(kernel.shape)
    np.add.at(kernel_gradient, indices, weights)

    def weighted_sum(left, right):
        return ops.sum(ops.multiply(products.rows(indices, left, right), weights))

    for actual, expected in zip(
        gradients(weighted_sum, left, right),
        oracle.factor_gradients(kernel_gradient, left, right),
        strict=True,
    ):
        assert_close(actual, expected)


@given(cases())
def test_gradients_of_materialize(case):
    left, right, random = case
    weights = random.normal(size=oracle.kronecker_sum(left, right).shape).astype("float32")

    def weighted_sum(left, right):
        return ops.sum(ops.multiply(products.materialize(left, right), weights))

    for actual, expected in zip(
        gradients(weighted_sum, left, right),
        oracle.factor_gradients(weights, left, right),
        strict=True,
    ):
        assert_close(actual, expected)
