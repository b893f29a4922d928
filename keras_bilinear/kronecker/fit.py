"""Kronecker sums that are fitted to what a layer sees, in NumPy.

`fit_kronecker_sum` finds the factors, `fit_errors` the errors at several ranks.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import linalg

from keras_bilinear.kronecker.factorization import Factorization
from keras_bilinear.kronecker.least_squares import LeastSquares, columns_by_mask
from keras_bilinear.kronecker.low_rank import low_rank_error, low_rank_terms
from keras_bilinear.kronecker.nearest import leading_energies, leading_terms, nearest_kronecker_sum
from keras_bilinear.kronecker.output_metric import OutputMetric
from keras_bilinear.kronecker.statistics import Statistics
from keras_bilinear.progress import track

# At most so many sweeps. Each solves exactly for one factor, then for the other one, so the
# error only falls.
SWEEPS = 50
# The fit ends when a sweep lowers the error by less than this share.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Fit:
    """A Kronecker sum fitted to examples.

    Attributes:
        left: the left factor, float64, of `Factorization.left_shape`.
        right: the right factor, float64, of `Factorization.right_shape`.
        error: relative error on the examples: root of the mean squared error, over the
            error of the mean answer or, without a bias, of the answer zero.
        start_error: the same for the sum that is nearest to the kernel.
    """

    left: np.ndarray
    right: np.ndarray
    error: float
    start_error: float


@dataclasses.dataclass(frozen=True)
class FitErrors:
    """What fits of several ranks leave.

    Attributes:
        relative: by the rank, the error as in `Fit`.
        squares: the mean squared error of the mean answer or, without a bias, of the answer zero:
            the rise of the loss for each row, if the statistics know gradients.
    """

    relative: dict[int, float]
    squares: float


def fit_kronecker_sum(
    statistics: Sequence[Statistics],
    factorization: Factorization,
    centred: bool = False,
    sweeps: int = SWEEPS,
) -> Fit:
    """Minimizes the mean of `|| y - x sum_r kron(L_r, R_r) ||^2` over examples.

    The fit is by alternating least squares: given one factor, the other factor solves a
    linear system. It starts from the sum that is nearest to the kernel, or from the sum that
    is nearest in the metric of Kronecker factors of the Gram matrix, whichever has the lower
    loss. If the factors are of low rank (`Factorization.is_low_rank`), the solution has a
    closed form: a singular value decomposition in the metric of the Gram matrix. A small
    prior holds directions that the examples do not show at those of the kernel. The fewer
    examples there are, the more it weighs.

    Args:
        statistics: `InputStatistics` or `IndexCounts` of the examples, for each block.
        factorization: the shapes, whose blocks share the right factor.
        centred: whether a bias takes the means.
        sweeps: the largest number of sweeps; each solves for both factors.

    Returns:
        A `Fit` whose error on the examples is at most that of the nearest sum.
    """
    metric, problems = _problems(statistics, factorization, centred)
    if factorization.is_low_rank:
        (problem,) = problems
        factors, error, start_error = _fit_low_rank(problem, factorization)
    else:
        starts = _starts(statistics, metric, problems, factorization)
        factors = _fit(problems, starts, sweeps)
        error, start_error = (_relative(problems, found) for found in (factors, starts[0]))
    factors = _balanced(*metric.change_factors_back(factors.left, factors.right))
    return Fit(*factors.shaped(factorization), error, start_error)


def fit_errors(
    statistics: Sequence[Statistics],
    factorization: Factorization,
    ranks: Iterable[int],
    centred: bool = False,
    sweeps: int = SWEEPS,
) -> FitErrors:
    """The errors of `fit_kronecker_sum` at several ranks.

    Args:
        statistics: see `fit_kronecker_sum`.
        factorization: the shapes; the rank does not matter.
        ranks: numbers of Kronecker terms.
        centred: see `fit_kronecker_sum`.
        sweeps: see `fit_kronecker_sum`.

    Returns:
        A `FitErrors`.
    """
    ranks = list(ranks)
    factorization = dataclasses.replace(factorization, rank=max(ranks))
    metric, problems = _problems(statistics, factorization, centred)
    squares = sum(problem.squares for problem in problems)
    if factorization.is_low_rank:
        (problem,) = problems
        *_, errors = low_rank_terms(problem, factorization.rank)
        return FitErrors({rank: errors[rank] for rank in ranks}, squares)
    starts = _starts(statistics, metric, problems, factorization)
    fits = {
        rank: _fit(problems, [start.first(rank) for start in starts], sweeps)
        for rank in track(ranks, "fitting", lambda rank: f"rank {rank}", lambda rank: rank**2)
    }
    return FitErrors({rank: _relative(problems, fit) for rank, fit in fits.items()}, squares)


def estimate_errors(
    statistics: Sequence[Statistics],
    factorization: Factorization,
    ranks: Iterable[int],
    centred: bool = False,
) -> dict[int, float]:
    """About the errors that `fit_errors` finds, from one decomposition for all ranks.

    The Kronecker product of the partial traces of the Gram matrix stands for that matrix, as in
    the start of a fit. For kernels of low rank these are the errors of the fit themselves.

    Args:
        statistics, factorization, ranks, centred: see `fit_errors`.

    Returns:
        `{rank: error}`, relative.
    """
    ranks = list(ranks)
    if factorization.is_low_rank:
        return fit_errors(statistics, factorization, ranks, centred).relative
    _, problems = _problems(statistics, factorization, centred)
    matrix, *_ = _in_metric(problems)
    energies = leading_energies(matrix, max(ranks))
    left = np.square(matrix).sum()
    taken = np.cumsum(np.pad(energies, (0, max(ranks) - len(energies)))) / (left or 1.0)
    return {rank: math.sqrt(max(1 - taken[rank - 1], 0.0)) for rank in ranks}


def _problems(statistics, factorization, centred):
    """The metric of the outputs, and the least squares of each block."""
    moments = [of_block.moments(centred) for of_block in statistics]
    counts = [of_block.count for of_block in statistics]
    metric = OutputMetric(moments, counts, factorization)
    problems = [
        LeastSquares(one.kernel, of_block, one.count, one.size, factorization, metric, block)
        for block, (one, of_block) in enumerate(zip(statistics, moments, strict=True))
    ]
    return metric, problems


def _fit_low_rank(problem, factorization):
    """The factors where they are of low rank, their error, and that of the nearest ones."""
    nearest = leading_terms(problem.as_matrix(problem.kernel), factorization.rank)
    start_error = problem.relative(low_rank_error(problem, nearest[0].T @ nearest[1]))
    inputs, outputs, errors = low_rank_terms(problem, factorization.rank)
    error = errors[factorization.rank]
    if start_error < error:  # the prior made the fit worse on the examples
        (inputs, outputs), error = nearest, start_error
    takes_inputs = factorization.output_factors[0] == problem.known.shape[1] == 1
    left, right = (inputs, outputs) if takes_inputs else (outputs, inputs)
    a, b = problem.known.shape
    left = left.reshape(factorization.rank, a, -1)
    return _Factors([left], right.reshape(factorization.rank, b, -1)), error, start_error


def _starts(statistics, metric, problems, factorization):
    """Where a fit may begin: the nearest sum, and the nearest in the metric of the inputs."""
    kernel = np.stack([of_block.kernel for of_block in statistics], axis=1).reshape(
        factorization.full_shape
    )
    nearest = _Factors.of(*nearest_kronecker_sum(kernel, factorization), factorization)
    nearest = _Factors(*metric.change_factors(nearest.left, nearest.right))
    return [nearest, _nearest_in_metric(factorization, problems)]


def _fit(problems, starts, sweeps):
    """The factors of the least loss; the first of `starts`, if its error is lower."""
    losses = [_loss(problems, start) for start in starts]
    loss = min(losses)
    factors = best = starts[losses.index(loss)]
    for _ in track(range(sweeps), "solving for the factors"):
        before = loss
        factors, loss = _sweep(problems, factors)
        if loss < before:
            best = factors
        if before - loss <= TOLERANCE * before:
            break
    # The prior may have made the fit worse on the examples.
    return min((starts[0], best), key=lambda factors: _relative(problems, factors))


@dataclasses.dataclass(frozen=True)
class _Factors:
    """`left`: for each block `(rank, a, u)`; `right`: `(rank, b, v)`."""

    left: list[np.ndarray]
    right: np.ndarray

    @classmethod
    def of(cls, left, right, factorization):
        left = left.reshape(
            factorization.rank, -1, factorization.blocks, factorization.output_factors[0]
        )
        right = right.reshape(factorization.rank, -1, factorization.output_factors[1])
        return cls([left[:, :, block] for block in range(factorization.blocks)], right)

    def first(self, rank):
        """The first terms, which are the largest of those to begin with."""
        return _Factors([left[:rank] for left in self.left], self.right[:rank])

    def shaped(self, factorization):
        left = np.stack(self.left, axis=2)
        return left.reshape(factorization.left_shape), self.right.reshape(factorization.right_shape)


def _nearest_in_metric(factorization, problems):
    """The factors of the sum that is nearest in the metric of the inputs.

    The Kronecker product of the partial traces of the Gram matrix stands for that matrix.
    """
    matrix, left_inverses, right_inverse = _in_metric(problems)
    (a, b), u = problems[0].known.shape, len(problems[0].mask)
    left, right = leading_terms(matrix, factorization.rank)
    left = left.reshape(factorization.rank, a, len(problems), u)
    return _Factors(
        [np.matmul(inverse, left[:, :, block]) for block, inverse in enumerate(left_inverses)],
        np.matmul(right_inverse, right.reshape(factorization.rank, b, -1)),
    )


def _in_metric(problems):
    """The kernels in the metric of the inputs, a row for each number of the left factor.

    Returns:
        The matrix, and the ways back: for the left factor of each block, and for the right one.
    """
    traces = [problem.traces() for problem in problems]
    left_roots = [_root(left) for left, _ in traces]
    right_root, right_inverse = _root(_total(right for _, right in traces))
    kernels = [
        np.einsum("ac,bd,cduv->aubv", left_root, right_root, problem.kernel, optimize=True)
        for (left_root, _), problem in zip(left_roots, problems, strict=True)
    ]
    *_, b, v = kernels[0].shape
    matrix = np.stack(kernels, 1).reshape(-1, b * v)
    return matrix, [inverse for _, inverse in left_roots], right_inverse


def _total(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.add, arrays)


def _root(matrix):
    """The square root of a positive semidefinite matrix, and the pseudoinverse of the root."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.sqrt(np.maximum(values, 1e-9 * values[-1]))
    inverse = np.divide(1, values, out=np.zeros_like(values), where=values > 0)
    return vectors * values @ vectors.T, vectors * inverse @ vectors.T


def _loss(problems, factors):
    pairs = zip(problems, factors.left, strict=True)
    return sum(problem.error(left, factors.right, problem.prior) for problem, left in pairs)


def _relative(problems, factors):
    pairs = zip(problems, factors.left, strict=True)
    squares = sum(problem.squares for problem in problems)
    error = sum(problem.error(left, factors.right, 0.0) for problem, left in pairs)
    return math.sqrt(error / squares) if squares else 0.0


def _sweep(problems, factors):
    """Better factors, and the loss with them."""
    lefts = [
        _solve([problem], [factors.right], left, problem.mask, "left")[0]
        for problem, left in zip(problems, factors.left, strict=True)
    ]
    right, loss = _solve(problems, lefts, factors.right, problems[0].mask.T, "right")
    # Factors of the same size keep the systems well conditioned.
    return _balanced(lefts, right), loss


def _balanced(lefts, right):
    """The factors of the same sum, where both factors of a term have the same norm."""
    sizes = [np.sqrt(sum(np.square(left[r]).sum() for left in lefts)) for r in range(len(right))]
    norms = np.linalg.norm(right.reshape(len(right), -1), axis=1)
    scale = np.sqrt(np.divide(norms, sizes, out=np.ones_like(norms), where=np.array(sizes) > 0))
    scale = np.where(scale > 0, scale, 1.0)[:, None, None]
    return _Factors([left * scale for left in lefts], right / scale)


def _solve(problems, others, old, mask, side):
    """One factor, given the other factor of each problem, and the loss with it."""
    rank, n, _ = old.shape
    old = old.swapaxes(0, 1)
    new = old.copy()
    loss = sum(problem.squares + problem.prior * problem.prior_squares for problem in problems)
    target = _total(
        problem.target(other, side, problem.prior)
        for problem, other in zip(problems, others, strict=True)
    )
    for columns, shared in columns_by_mask(mask):
        matrix = _total(
            problem.normal(other, shared, side, problem.prior)
            for problem, other in zip(problems, others, strict=True)
        ).reshape(n * rank, n * rank)
        # Numbers of which nothing is known keep their values.
        inertia = 1e-9 * np.trace(matrix) / len(matrix) + np.finfo("float64").tiny
        matrix[np.diag_indices_from(matrix)] += inertia
        before, goal = (values[:, :, columns].reshape(n * rank, -1) for values in (old, target))
        after = _solve_symmetric(matrix, goal + inertia * before)
        new[:, :, columns] = after.reshape(n, rank, -1)
        # Without the inertia this is after' matrix after - 2 after' goal.
        loss += np.sum(after * (inertia * (before - after) - goal))
    return new.swapaxes(0, 1), max(loss, 0.0)


def _solve_symmetric(matrix, goal):
    """The solution of a positive definite system; the matrix may be overwritten."""
    diagonal = np.diagonal(matrix).copy()
    try:
        # The transpose lies in memory as LAPACK takes it, so nothing is copied.
        factor = linalg.cho_factor(matrix.T, lower=True, overwrite_a=True, check_finite=False)
    except linalg.LinAlgError:  # indefinite by rounding; below its diagonal it is what it was
        below = np.tril(matrix, -1)
        matrix = below + below.T + np.diag(diagonal)
        return linalg.solve(matrix, goal, assume_a="sym", check_finite=False)
    return linalg.cho_solve(factor, goal, check_finite=False)
