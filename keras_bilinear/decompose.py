"""The best Kronecker sum for a given kernel, in NumPy."""

import itertools
import math

import numpy as np


def nearest_kronecker_sum(kernel, factorization):
    """Minimizes `|| W - sum_r kron(L_r, R_r) ||` (Frobenius norm).

    The entries of `kron(L, R)`, rearranged, are the outer product of the entries
    of `L` and `R`, so the best sum is a truncated singular value decomposition
    of the rearranged kernel (Van Loan and Pitsianis, "Approximation with
    Kronecker Products", 1993). It is exact when
    `rank >= factorization.sufficient_rank`. Where the factors are larger than
    the kernel, it is padded with zeros.

    Args:
        kernel: of `factorization.full_shape`, any real dtype.
        factorization: a `Factorization` of that shape.

    Returns:
        `(left, right)`, float64, of `factorization.left_shape` and
        `right_shape`. Both factors of a term have the same norm.
    """
    plan = factorization
    (d1, d2), (u1, u2) = plan.input_factors, plan.output_factors
    half = len(plan.window) + 2
    kernel = np.asarray(kernel, "float64").reshape(
        *plan.window, plan.input_dim, plan.groups, plan.output_dim
    )
    missing = (plan.padded_input_dim - plan.input_dim, 0, plan.padded_output_dim - plan.output_dim)
    kernel = np.pad(kernel, [(0, 0)] * len(plan.window) + [(0, size) for size in missing])
    # Rows hold what belongs to the left factor, columns what belongs to the right one.
    window = itertools.chain.from_iterable(zip(plan.left_window, plan.right_window, strict=True))
    kernel = kernel.reshape(*window, d1, d2, plan.groups * u1, u2)
    kernel = kernel.transpose(*range(0, 2 * half, 2), *range(1, 2 * half, 2))
    kernel = kernel.reshape(math.prod(plan.left_shape[1:]), math.prod(plan.right_shape[1:]))

    # The eigenvectors of the smaller Gram matrix are the singular vectors of
    # that side, several times as fast; projecting onto them gives the other
    # side without a division, and to full precision.
    if len(kernel) <= len(kernel.T):
        left = _leading_eigenvectors(kernel @ kernel.T, plan.rank)
        right = left.T @ kernel
    else:
        right = _leading_eigenvectors(kernel.T @ kernel, plan.rank).T
        left = kernel @ right.T
    left, right = left.T, right
    left_norm = np.linalg.norm(left, axis=1, keepdims=True)
    right_norm = np.linalg.norm(right, axis=1, keepdims=True)
    size = np.sqrt(left_norm * right_norm)
    left = left * np.divide(size, left_norm, out=np.zeros_like(size), where=left_norm > 0)
    right = right * np.divide(size, right_norm, out=np.zeros_like(size), where=right_norm > 0)

    # Terms beyond the smaller side are not needed and stay zero.
    missing = ((0, plan.rank - len(left)), (0, 0))
    return (
        np.pad(left, missing).reshape(plan.left_shape),
        np.pad(right, missing).reshape(plan.right_shape),
    )


def _leading_eigenvectors(gram, count):
    _, vectors = np.linalg.eigh(gram)
    return vectors[:, ::-1][:, :count]
