"""The closed form of the fit where the factors are of low rank.

The kernel is then a product of two plain matrices. Its fit is a singular value decomposition in
the metric of the inputs' Gram matrix.
"""

import functools
from collections.abc import Callable

import numpy as np
from scipy import linalg

from keras_bilinear.kronecker.least_squares import LeastSquares
from keras_bilinear.kronecker.nearest import leading_terms


def low_rank_terms(problem: LeastSquares, rank: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """The terms of a kernel of low rank that solves a problem, and their errors.

    With the Gram matrix, the prior included, as `C C^T`, the loss of a kernel `W` is the
    squared distance of `C^T W` to `C^T W_0`, but for a constant. `W_0` is the kernel of full
    rank that solves the problem.

    Args:
        problem: the least squares of a factorization of low rank.
        rank: number of terms.

    Returns:
        `(inputs, outputs, errors)`: `(rank, inputs)` and `(rank, outputs)`, where both
        vectors of a term have the same norm, and a list with the relative error of the first
        0, 1, ... `rank` terms.
    """
    kernel, prior = problem.as_matrix(problem.kernel), problem.prior
    solve, solve_transposed = _whitening(problem)
    inputs, outputs = leading_terms(solve(problem.as_matrix(problem.cross) + prior * kernel), rank)
    sizes = np.square(outputs).sum(1)  # the singular values
    inputs = solve_transposed(inputs.T).T
    # The terms lower the loss by the squares of their singular values. The error lacks the prior.
    norms = np.square(inputs).sum(1) * sizes
    products = np.einsum("ri,ri->r", inputs @ kernel, outputs)
    gained = np.cumsum(sizes**2 + prior * (norms - 2 * products))
    errors = [problem.relative(problem.squares - gain) for gain in (0.0, *gained)]
    balance = np.sqrt(np.divide(sizes, np.sqrt(norms), out=np.ones_like(sizes), where=norms > 0))
    return inputs * balance[:, None], outputs / balance[:, None], errors


def low_rank_error(problem: LeastSquares, kernel: np.ndarray) -> float:
    """Mean squared error over the examples of a kernel of `(inputs, outputs)`."""
    gram = problem.gram.reshape(-1, 1) if problem.diagonal else problem.as_matrix(problem.gram)
    product = gram * kernel if problem.diagonal else gram @ kernel
    cross = problem.as_matrix(problem.cross)
    return problem.squares + np.sum(kernel * (product - 2 * cross))


def _whitening(problem: LeastSquares) -> tuple[Callable, Callable]:
    """Functions that solve for `C` and for `C^T`; `C C^T` is the Gram matrix with the prior."""
    if problem.diagonal:
        root = np.sqrt(problem.gram.ravel() + problem.prior)[:, None]
        return lambda x: x / root, lambda x: x / root
    gram = problem.as_matrix(problem.gram).astype("float64")
    gram[np.diag_indices_from(gram)] += problem.prior
    try:
        root = linalg.cholesky(gram, lower=True, check_finite=False)
    except linalg.LinAlgError:  # where inputs hardly vary, rounding may make it indefinite
        values, vectors = linalg.eigh(gram, check_finite=False)
        roots = np.sqrt(np.maximum(values, problem.prior))[:, None]
        return lambda x: vectors.T @ x / roots, lambda x: vectors @ (x / roots)
    solve = functools.partial(linalg.solve_triangular, root, lower=True, check_finite=False)
    return functools.partial(solve, trans="N"), functools.partial(solve, trans="T")
