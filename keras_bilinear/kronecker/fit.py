"""Kronecker sums that are fitted to what a layer sees, in NumPy."""

import dataclasses
import functools
import math

import numpy as np
from scipy import linalg

from keras_bilinear.kronecker.low_rank import low_rank_terms
from keras_bilinear.kronecker.nearest import (
    arrange,
    input_index,
    leading_terms,
    nearest_kronecker_sum,
    output_index,
    take,
)

# Sweeps over both factors; each is exact for one of them, so the error only falls.
SWEEPS = 50
# The fit ends when a sweep lowers the error by less than this share.
TOLERANCE = 1e-4
# Weight of the kernel itself beside the examples, for directions that these do
# not show: the least, and the one where there are as many examples as inputs.
LEAST_PRIOR, PRIOR = 1e-3, 0.1


@dataclasses.dataclass(frozen=True)
class Fit:
    """A Kronecker sum fitted to examples.

    Attributes:
        left, right: the factors, float64.
        error: root of the mean squared error over that of answering with the
            mean (without a bias: with zero), on the examples.
        start_error: that of the sum that is nearest to the kernel.
    """

    left: np.ndarray
    right: np.ndarray
    error: float
    start_error: float


def fit_kronecker_sum(statistics, factorization, centred=False, sweeps=SWEEPS):
    """Minimizes the mean of `|| y - x sum_r kron(L_r, R_r) ||^2` over examples.

    Alternating least squares: with one factor given, the other one is the
    solution of a linear system. It starts from the best of the sum that is
    nearest to the kernel and of the one that is nearest in the metric of
    Kronecker factors of the Gram matrix. Where the terms are of rank 1 as
    matrices, `Factorization.is_low_rank`, the solution has a closed form: a
    singular value decomposition in the metric of the Gram matrix. Directions that
    the examples do not show are held at the kernel's by a small prior, which
    weighs more the fewer examples there are.

    Args:
        statistics: `InputStatistics` of the examples, or `IndexCounts`; one for each block.
        factorization: a `Factorization` whose blocks share the right factor.
        centred: whether a bias takes the means.
        sweeps: at most so many; each solves for both factors.

    Returns:
        A `Fit`, never of a larger error on the examples than the nearest sum.
    """
    problems = [_Problem(one, factorization, centred) for one in statistics]
    if factorization.is_low_rank:
        return _fit_low_rank(*problems, factorization)
    starts = _starts(statistics, problems, factorization)
    best = _fit(problems, starts, sweeps)
    return Fit(*best.shaped(factorization), _error(problems, best), _error(problems, starts[0]))


def fit_errors(statistics, factorization, ranks, centred=False, sweeps=SWEEPS):
    """`{rank: error}` of `fit_kronecker_sum`, for several ranks."""
    plan = dataclasses.replace(factorization, rank=max(ranks))
    problems = [_Problem(one, plan, centred) for one in statistics]
    if plan.is_low_rank:
        *_, errors = low_rank_terms(*problems, plan.rank)
        return {rank: errors[rank] for rank in ranks}
    starts = _starts(statistics, problems, plan)
    return {
        rank: _error(problems, _fit(problems, [one.first(rank) for one in starts], sweeps))
        for rank in ranks
    }


def _fit_low_rank(problem, plan):
    """The `Fit` of a kernel of low rank."""
    nearest = leading_terms(problem.as_matrix(problem.kernel), plan.rank)
    start_error = problem.relative(problem.error_of(nearest[0].T @ nearest[1]))
    inputs, outputs, errors = low_rank_terms(problem, plan.rank)
    error = errors[plan.rank]
    if start_error < error:  # the prior has cost some of what counts
        (inputs, outputs), error = nearest, start_error
    takes_inputs = plan.output_factors[0] == problem.known.shape[1] == 1
    left, right = (inputs, outputs) if takes_inputs else (outputs, inputs)
    return Fit(left.reshape(plan.left_shape), right.reshape(plan.right_shape), error, start_error)


def _starts(statistics, problems, plan):
    """Where a fit may begin: the nearest sum, and the nearest in the metric of the inputs."""
    kernel = np.stack([one.kernel for one in statistics], axis=1).reshape(plan.full_shape)
    nearest = _Factors.of(*nearest_kronecker_sum(kernel, plan), plan)
    return [nearest, _nearest_in_metric(plan, problems)]


def _fit(problems, starts, sweeps):
    """The factors of the least loss, or of the least error."""
    losses = [_loss(problems, start) for start in starts]
    loss = min(losses)
    factors = best = starts[losses.index(loss)]
    for _ in range(sweeps):
        before = loss
        factors, loss = _sweep(problems, factors)
        if loss < before:
            best = factors
        if before - loss <= TOLERANCE * before:
            break
    # The prior may have cost some of what counts.
    return min((starts[0], best), key=lambda factors: _error(problems, factors))


@dataclasses.dataclass(frozen=True)
class _Factors:
    """`left`: for each block `(rank, a, u)`; `right`: `(rank, b, v)`."""

    left: list
    right: np.ndarray

    @classmethod
    def of(cls, left, right, plan):
        left = left.reshape(plan.rank, -1, plan.blocks, plan.output_factors[0])
        right = right.reshape(plan.rank, -1, plan.output_factors[1])
        return cls([left[:, :, block] for block in range(plan.blocks)], right)

    def first(self, rank):
        """The first terms, which are the largest of those to begin with."""
        return _Factors([left[:rank] for left in self.left], self.right[:rank])

    def shaped(self, plan):
        left = np.stack(self.left, axis=2)
        return left.reshape(plan.left_shape), self.right.reshape(plan.right_shape)


class _Problem:
    """The least squares of one block, its axes arranged as those of the factors."""

    def __init__(self, statistics, plan, centred):
        kernel = np.asarray(statistics.kernel, "float64")
        gram, cross, squares = statistics.second(centred)
        inputs, outputs = input_index(plan), output_index(plan)
        a, b = inputs.shape
        # Of the prior counts the size of the inputs, not which of them they are.
        diagonal = gram if gram.ndim == 1 else np.diagonal(gram)
        prior = max(LEAST_PRIOR, PRIOR * len(diagonal) / statistics.count)
        # Inputs that are constant, or zero, show nothing but how their squares were rounded.
        prior *= max(diagonal.mean(), 1e-3 * statistics.size) or 1.0
        self.squares = squares.sum()
        self.prior, self.prior_squares = prior, np.square(kernel).sum()
        self.mask = (outputs >= 0).astype("float64")
        self.kernel = arrange(kernel, plan)
        self.cross = arrange(cross, plan)
        self.diagonal = gram.ndim == 1
        if self.diagonal:
            self.gram = take(gram, inputs).reshape(a, b)
        else:
            gram = take(gram, inputs, inputs).reshape(a, b, a, b)
            self.gram = np.ascontiguousarray(gram.transpose(0, 2, 1, 3)).reshape(a * a, b * b)
        self.known = (inputs >= 0).astype("float64")

    def as_matrix(self, values):
        """Numbers that are arranged as the kernel, of low rank, as `(inputs, outputs)`."""
        return values.reshape(self.known.size, -1)

    def whitening(self):
        """Functions that solve for `C` and for `C^T`, where `C C^T` is the Gram matrix and prior.

        Of a kernel of low rank.
        """
        if self.diagonal:
            root = np.sqrt(self.gram.ravel() + self.prior)[:, None]
            return (lambda x: x / root,) * 2
        gram = self.as_matrix(self.gram).astype("float64")
        gram[np.diag_indices_from(gram)] += self.prior
        try:
            root = linalg.cholesky(gram, lower=True, check_finite=False)
        except linalg.LinAlgError:  # where inputs hardly vary, rounding may make it indefinite
            values, vectors = linalg.eigh(gram, check_finite=False)
            roots = np.sqrt(np.maximum(values, self.prior))[:, None]
            return lambda x: vectors.T @ x / roots, lambda x: vectors @ (x / roots)
        return tuple(
            functools.partial(
                linalg.solve_triangular, root, lower=True, trans=trans, check_finite=False
            )
            for trans in ("N", "T")
        )

    def error_of(self, kernel):
        """Mean squared error over the examples of a kernel of low rank, as a matrix."""
        gram = self.gram.reshape(-1, 1) if self.diagonal else self.as_matrix(self.gram)
        product = gram * kernel if self.diagonal else gram @ kernel
        cross = self.as_matrix(self.cross)
        return self.squares + np.sum(kernel * (product - 2 * cross))

    def relative(self, error):
        """Root of a mean squared error over that of zero."""
        return math.sqrt(max(error, 0.0) / self.squares) if self.squares else 0.0

    def traces(self):
        """The partial traces of the Gram matrix, the prior included: `(a, a)` and `(b, b)`."""
        known = self.prior * self.known
        if self.diagonal:
            known = known + self.gram
            return np.diag(known.sum(1)), np.diag(known.sum(0))
        a, b = known.shape
        left = self.gram[:, :: b + 1].sum(1, dtype="float64")
        right = self.gram[:: a + 1].sum(0, dtype="float64")
        return (
            left.reshape(a, a) + np.diag(known.sum(1)),
            right.reshape(b, b) + np.diag(known.sum(0)),
        )

    def normal(self, other, mask, side, prior):
        """The matrix of the normal equations of one side, `(n, rank, n, rank)`.

        Args:
            other: the factor of the other side, `(rank, m, outputs)`.
            mask: which of its outputs count.
            side: `"left"` or `"right"`.
            prior: weight of the prior.
        """
        rank, m, _ = other.shape
        other = other.swapaxes(0, 1)
        products = np.tensordot(other * mask, other, ((2,), (2,)))  # m, rank, m, rank
        own = products[np.arange(m), :, np.arange(m)]  # m, rank, rank
        known = self.known if side == "left" else self.known.T
        n = len(known)
        weights = prior * known
        gram = self.gram if side == "left" else self.gram.T
        if self.diagonal:
            weights = weights + gram
            matrix = np.zeros((n, rank, n, rank))
        else:
            products = products.transpose(0, 2, 1, 3).astype(gram.dtype, order="C")
            whole = (gram @ products.reshape(m * m, -1)).reshape(n, n, rank, rank)
            matrix = whole.transpose(0, 2, 1, 3).astype("float64")
        diagonal = np.tensordot(weights, own, ((1,), (0,)))  # n, rank, rank
        matrix[np.arange(n), :, np.arange(n)] += diagonal
        return matrix

    def target(self, other, side, prior):
        """The right-hand side of the normal equations of one side, `(n, rank, outputs)`."""
        cross = (self.cross + prior * self.kernel) * self.mask
        axes = (1, 3) if side == "left" else (0, 2)
        return np.tensordot(other, cross, ((1, 2), axes)).swapaxes(0, 1)

    def error(self, left, right, prior):
        """Mean squared error over the examples, with the prior's share."""
        total = 0.0
        target = self.target(right, "left", prior)
        rank, n, _ = left.shape
        left = left.swapaxes(0, 1)
        for columns, mask in _columns(self.mask):
            matrix = self.normal(right, mask, "left", prior).reshape(n * rank, n * rank)
            part = left[:, :, columns].reshape(n * rank, -1)
            total += np.sum(part * (matrix @ part))
            total -= 2 * np.sum(part * target[:, :, columns].reshape(n * rank, -1))
        return max(total + self.squares + prior * self.prior_squares, 0.0)


def _nearest_in_metric(plan, problems):
    """The factors of the nearest sum where an input counts as often as the examples show it.

    The Gram matrix is taken for the Kronecker product of its partial traces.
    """
    traces = [problem.traces() for problem in problems]
    of_left = [_root(left) for left, _ in traces]
    root, inverse = _root(sum(right for _, right in traces))
    kernels = [
        np.einsum("ac,bd,cduv->aubv", one, root, problem.kernel, optimize=True)
        for (one, _), problem in zip(of_left, problems, strict=True)
    ]
    a, u, b, v = kernels[0].shape
    left, right = leading_terms(np.stack(kernels, 1).reshape(-1, b * v), plan.rank)
    left = left.reshape(plan.rank, a, len(problems), u)
    return _Factors(
        [np.matmul(back, left[:, :, block]) for block, (_, back) in enumerate(of_left)],
        np.matmul(inverse, right.reshape(plan.rank, b, v)),
    )


def _root(matrix):
    """The square root of a positive semidefinite matrix, and its inverse, as far as it has one."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.sqrt(np.maximum(values, 1e-9 * values[-1]))
    inverse = np.divide(1, values, out=np.zeros_like(values), where=values > 0)
    return vectors * values @ vectors.T, vectors * inverse @ vectors.T


def _columns(mask):
    """Pairs of columns of one side and of the mask that they share on the other side."""
    rows, which = np.unique(mask, axis=0, return_inverse=True)
    which = which.reshape(-1)
    return [(np.flatnonzero(which == i), row) for i, row in enumerate(rows) if row.any()]


def _loss(problems, factors):
    pairs = zip(problems, factors.left, strict=True)
    return sum(problem.error(left, factors.right, problem.prior) for problem, left in pairs)


def _error(problems, factors):
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
    # Both sides of a term of the same size: it keeps the systems well conditioned.
    sizes = [np.sqrt(sum(np.square(left[r]).sum() for left in lefts)) for r in range(len(right))]
    norms = np.linalg.norm(right.reshape(len(right), -1), axis=1)
    scale = np.sqrt(np.divide(norms, sizes, out=np.ones_like(norms), where=np.array(sizes) > 0))
    scale = np.where(scale > 0, scale, 1.0)[:, None, None]
    return _Factors([left * scale for left in lefts], right / scale), loss


def _solve(problems, others, old, mask, side):
    """One factor, given the other one of each problem, and the loss with it."""
    rank, n, _ = old.shape
    old = old.swapaxes(0, 1)
    new = old.copy()
    loss = sum(problem.squares + problem.prior * problem.prior_squares for problem in problems)
    target = sum(
        problem.target(other, side, problem.prior)
        for problem, other in zip(problems, others, strict=True)
    )
    for columns, shared in _columns(mask):
        matrix = sum(
            problem.normal(other, shared, side, problem.prior)
            for problem, other in zip(problems, others, strict=True)
        ).reshape(n * rank, n * rank)
        # Where nothing is known, all stays as it is.
        inertia = 1e-9 * np.trace(matrix) / len(matrix) + np.finfo("float64").tiny
        matrix[np.diag_indices_from(matrix)] += inertia
        before, goal = (one[:, :, columns].reshape(n * rank, -1) for one in (old, target))
        part = _solve_symmetric(matrix, goal + inertia * before)
        new[:, :, columns] = part.reshape(n, rank, -1)
        # That is part' matrix part - 2 part' goal, but for the inertia.
        loss += np.sum(part * (inertia * (before - part) - goal))
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
