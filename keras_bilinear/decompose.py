"""The best Kronecker sum for a given kernel, in NumPy."""

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
        kernel: `(input_dim, output_dim)`, any real dtype.
        factorization: a `Factorization` of that shape.

    Returns:
        `(left, right)`, float64, of `factorization.left_shape` and
        `right_shape`. Both factors of a term have the same norm.
    """
    (d1, d2), (u1, u2) = factorization.input_factors, factorization.output_factors
    rank = factorization.rank
    kernel = np.asarray(kernel, "float64")
    padding = (
        (0, factorization.padded_input_dim - kernel.shape[0]),
        (0, factorization.padded_output_dim - kernel.shape[1]),
    )
    kernel = np.pad(kernel, padding).reshape(d1, d2, u1, u2)
    kernel = kernel.transpose(0, 2, 1, 3).reshape(d1 * u1, d2 * u2)

    # The eigenvectors of the smaller Gram matrix are the singular vectors of
    # that side, several times as fast; projecting onto them gives the other
    # side without a division, and to full precision.
    if d1 * u1 <= d2 * u2:
        left = _leading_eigenvectors(kernel @ kernel.T, rank)
        right = left.T @ kernel
    else:
        right = _leading_eigenvectors(kernel.T @ kernel, rank).T
        left = kernel @ right.T
    left, right = left.T, right
    left_norm = np.linalg.norm(left, axis=1, keepdims=True)
    right_norm = np.linalg.norm(right, axis=1, keepdims=True)
    size = np.sqrt(left_norm * right_norm)
    left = left * np.divide(size, left_norm, out=np.zeros_like(size), where=left_norm > 0)
    right = right * np.divide(size, right_norm, out=np.zeros_like(size), where=right_norm > 0)

    # Terms beyond the smaller side are not needed and stay zero.
    missing = ((0, rank - len(left)), (0, 0))
    return (
        np.pad(left, missing).reshape(factorization.left_shape),
        np.pad(right, missing).reshape(factorization.right_shape),
    )


def _leading_eigenvectors(gram, count):
    _, vectors = np.linalg.eigh(gram)
    return vectors[:, ::-1][:, :count]
