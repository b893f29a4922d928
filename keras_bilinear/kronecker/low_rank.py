"""The closed form of kernels of low rank."""

import numpy as np

from keras_bilinear.kronecker.nearest import (
    leading_terms,
)


def low_rank_terms(problem, rank):
    """The terms of a kernel of low rank that solves a problem, and the errors of 0, 1, ... of them.

    With the Gram matrix, the prior included, as `C C^T`, the loss is the squared
    distance of `C^T W` to that of the kernel of full rank, but for a constant.

    Returns:
        `(inputs, outputs, errors)`: `(rank, inputs)`, `(rank, outputs)`, the two
        vectors of a term of the same norm, and a list.
    """
    kernel, prior = problem.as_matrix(problem.kernel), problem.prior
    solve, solve_transposed = problem.whitening()
    inputs, outputs = leading_terms(solve(problem.as_matrix(problem.cross) + prior * kernel), rank)
    sizes = np.square(outputs).sum(1)  # the singular values
    inputs = solve_transposed(inputs.T).T
    # The loss is that of no term less their squares; the error has none of the prior.
    norms = np.square(inputs).sum(1) * sizes
    products = np.einsum("ri,ri->r", inputs @ kernel, outputs)
    gained = np.cumsum(sizes**2 + prior * (norms - 2 * products))
    errors = [problem.relative(problem.squares - one) for one in (0.0, *gained)]
    balance = np.sqrt(np.divide(sizes, np.sqrt(norms), out=np.ones_like(sizes), where=norms > 0))
    return inputs * balance[:, None], outputs / balance[:, None], errors
