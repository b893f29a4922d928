"""Fits that weigh errors by gradients, against float64 formulas."""

import numpy as np
import oracle
import pytest
from scipy import linalg

from keras_bilinear.kronecker import statistics as module
from keras_bilinear.kronecker.factorization import Factorization
from keras_bilinear.kronecker.fit import fit_errors, fit_kronecker_sum
from keras_bilinear.kronecker.statistics import IndexCounts, InputStatistics

LOW_RANK = {"input_factors": (12, 1), "output_factors": (1, 9)}


def draw(rng, examples=400, inputs=12, outputs=9):
    """A kernel, inputs and gradients; both are larger in some directions, and together."""
    sizes = rng.lognormal(size=(examples, 1))
    x = sizes * (rng.normal(size=(examples, inputs)) @ rng.normal(size=(inputs, inputs)))
    g = sizes * (rng.normal(size=(examples, outputs)) @ rng.normal(size=(outputs, outputs)))
    return rng.normal(size=(inputs, outputs)), x, g


def collect(kernel, x, g):
    statistics = InputStatistics(kernel)
    for rows, gradients in zip(np.array_split(x, 3), np.array_split(g, 3), strict=True):
        norms = statistics.gradients.add(rows, gradients)
        statistics.add(rows, rows, norms)
    return statistics


def matrices(x, g):
    """The matrices for inputs and outputs, as the documentation says it."""
    share, of_x, of_g = module.WEIGHTED, (x**2).sum(1), (g**2).sum(1)

    def mean(rows, weights):
        plain, weighted = rows.T @ rows / len(rows), rows.T @ (rows * weights[:, None])
        return (1 - share) * plain + share * weighted / weights.sum()

    inputs, outputs = mean(x, of_g), mean(g, of_x)
    scale = np.mean(of_x * of_g) / (np.trace(inputs) * np.trace(outputs))
    return inputs, 0.5 * scale * outputs


@pytest.fixture
def exactly(monkeypatch):
    """Fits without a prior and without a least weight."""
    for name in ("least_squares.LEAST_PRIOR", "least_squares.PRIOR"):
        monkeypatch.setattr(f"keras_bilinear.kronecker.{name}", 0.0)
    for name in ("LEAST_WEIGHT", "WEIGHT_OF_FEW"):
        monkeypatch.setattr(f"keras_bilinear.kronecker.output_metric.{name}", 0.0)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_low_rank_is_the_decomposition_between_both_roots(exactly, monkeypatch, share):
    monkeypatch.setattr(module, "WEIGHTED", share)
    kernel, x, g = draw(np.random.default_rng(0))
    statistics = collect(kernel, x, g)
    factorization = Factorization.create(input_dim=12, output_dim=9, rank=3, **LOW_RANK)
    fit = fit_kronecker_sum([statistics], factorization)
    inputs, outputs = matrices(x, g)
    left, right = linalg.sqrtm(inputs).real, linalg.sqrtm(outputs).real
    u, sizes, v = np.linalg.svd(left @ kernel @ right)
    best = np.linalg.solve(left, u[:, :3] * sizes[:3]) @ v[:3] @ np.linalg.inv(right)
    np.testing.assert_allclose(oracle.kronecker_sum(fit.left, fit.right), best, atol=1e-5)
    norms = [np.square(side).sum((1, 2)) for side in (fit.left, fit.right)]
    np.testing.assert_allclose(*norms, rtol=1e-6)
    found = fit_errors([statistics], factorization, [1, 3])
    for rank in (1, 3):
        loss = found.relative[rank] ** 2 * found.squares
        np.testing.assert_allclose(loss, np.sum(sizes[rank:] ** 2), rtol=1e-5)


def test_near_square_factors_are_best_in_the_metric_of_both_sides(exactly, monkeypatch):
    monkeypatch.setattr("keras_bilinear.kronecker.fit.TOLERANCE", 0.0)
    rng = np.random.default_rng(0)
    kernel, x, g = draw(rng)
    # Where the matrix for the outputs is a Kronecker product, the factors have it exactly.
    roots = [rng.normal(size=(3, 3)) for _ in range(2)]
    g = np.linalg.solve(linalg.cholesky(matrices(x, g)[1], lower=True), g.T).T @ np.kron(*roots)
    statistics = collect(kernel, x, g)
    factorization = Factorization.create(input_dim=12, output_dim=9, rank=2)
    fit = fit_kronecker_sum([statistics], factorization, sweeps=3000)
    inputs, outputs = matrices(x, g)

    def loss(left, right):
        error = kernel - oracle.kronecker_sum(left, right)
        return np.trace(error.T @ inputs @ error @ outputs)

    best = loss(fit.left, fit.right)
    plain = InputStatistics(kernel)
    plain.add(x, x)
    unweighted = fit_kronecker_sum([plain], factorization, sweeps=3000)
    assert best < 0.9 * loss(unweighted.left, unweighted.right)
    for _ in range(10):
        step = 1e-3 * rng.normal(size=fit.left.shape)
        assert min(loss(fit.left + step, fit.right), loss(fit.left - step, fit.right)) > best


def test_batches_of_any_size_have_the_same_sums():
    kernel, x, g = draw(np.random.default_rng(0))
    factorization = Factorization.create(input_dim=12, output_dim=9, rank=2)
    whole = InputStatistics(kernel)
    whole.add(x, x, whole.gradients.add(x, g))
    a, b = (
        fit_errors([one], factorization, [2], centred=True)
        for one in (whole, collect(kernel, x, g))
    )
    np.testing.assert_allclose(a.relative[2], b.relative[2], rtol=1e-9)


def test_padded_outputs_and_groups_take_part():
    rng = np.random.default_rng(0)
    factorization = Factorization.create(
        input_dim=8, output_dim=7, rank=2, blocks=2, left_window=(1,), right_window=(3,)
    )
    blocks = [draw(rng, inputs=24, outputs=7) for _ in range(2)]
    fit = fit_kronecker_sum([collect(*block) for block in blocks], factorization)
    assert fit.error < 0.95 * fit.start_error


def test_gradients_that_are_zero_change_nothing():
    kernel, x, g = draw(np.random.default_rng(0))
    factorization = Factorization.create(input_dim=12, output_dim=9, rank=2)
    plain = InputStatistics(kernel)
    plain.add(x, x)
    fits = [fit_kronecker_sum([one], factorization) for one in (plain, collect(kernel, x, 0 * g))]
    np.testing.assert_allclose(fits[0].left, fits[1].left)


def test_tables_weigh_rows_by_look_ups_and_by_projections(exactly, monkeypatch):
    monkeypatch.setattr(module, "WEIGHTED", 0.0)
    rng = np.random.default_rng(0)
    table, indices = rng.normal(size=(20, 6)), rng.zipf(1.5, size=500) % 20
    at_rows = rng.normal(size=(500, 6)) * rng.lognormal(size=6)
    hidden, at_logits = (
        rng.normal(size=(300, 6)),
        rng.normal(size=(300, 20)) * rng.lognormal(size=20),
    )
    counts = IndexCounts(table)
    counts.gradients.add(indices, at_rows)
    counts.gradients.add(hidden, at_logits)
    counts.add(indices)
    counts.add(hidden)
    error = rng.normal(size=(20, 6))
    expected = 0.5 * np.mean(
        np.concatenate(
            [
                np.einsum("nd,nd->n", error[indices], at_rows) ** 2,
                np.einsum("nv,vd,nd->n", at_logits, error, hidden) ** 2,
            ]
        )
    )
    moments = counts.moments()
    found = np.trace(error.T @ (moments.gram[:, None] * error) @ moments.metric)
    np.testing.assert_allclose(found, expected, rtol=0.25)
