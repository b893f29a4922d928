"""Pure functions of a Kronecker sum `W = sum_r kron(L_r, R_r)`, over `keras.ops`.

`left` has the shape `(rank, d1, u1)` and `right` `(rank, d2, u2)`. Nothing here
knows of layers, padding or dtypes.
"""

from keras import backend, ops

# XLA likes one large matrix product and fuses the transposes around it; the
# other backends call one library kernel per op and like it batched.
_COMPILES_WITH_XLA = backend.backend() == "jax"


def project(x, left, right, order):
    """Multiplies rows by the Kronecker sum without forming it: `Y = sum_r L_r^T X R_r`.

    A sum of any rank takes two contractions: the terms are laid side by side
    in the first and summed over in the second.

    Args:
        x: `(..., d1 * d2)`.
        left: `(rank, d1, u1)`.
        right: `(rank, d2, u2)`.
        order: the side to contract first, `"left"` or `"right"`.

    Returns:
        `(n, u1 * u2)`, where `n` is the product of the leading dimensions of `x`.
    """
    rank, d1, u1 = left.shape
    _, d2, u2 = right.shape
    if order == "left":
        left = ops.reshape(ops.transpose(left, (2, 0, 1)), (u1 * rank, d1))
        x = _multiply_each(left, ops.reshape(x, (-1, d1, d2)))
        right = ops.reshape(right, (rank * d2, u2))
        y = ops.matmul(ops.reshape(x, (-1, rank * d2)), right)
    else:
        right = ops.reshape(ops.transpose(right, (1, 0, 2)), (d2, rank * u2))
        x = ops.matmul(ops.reshape(x, (-1, d2)), right)
        left = ops.reshape(ops.transpose(left, (2, 1, 0)), (u1, d1 * rank))
        y = _multiply_each(left, ops.reshape(x, (-1, d1 * rank, u2)))
    return ops.reshape(y, (-1, u1 * u2))


def _multiply_each(matrix, x):
    """`matrix @ x[i]` for each of the matrices in `x`: `(m, p), (n, p, q) -> (n, m, q)`."""
    if not _COMPILES_WITH_XLA:
        return ops.matmul(matrix, x)
    m, p = matrix.shape
    y = ops.matmul(ops.reshape(ops.transpose(x, (0, 2, 1)), (-1, p)), ops.transpose(matrix))
    return ops.transpose(ops.reshape(y, (-1, x.shape[2], m)), (0, 2, 1))


def rows(indices, left, right):
    """Rows of the Kronecker sum: `L[i // d2] x R[i % d2]`, two gathers and a product.

    Args:
        indices: integers of any shape.
        left: `(rank, d1, u1)`.
        right: `(rank, d2, u2)`.

    Returns:
        `(n, u1 * u2)`, where `n` is the number of indices.
    """
    rank, d1, u1 = left.shape
    _, d2, u2 = right.shape
    indices = ops.reshape(indices, (-1,))
    quotient = ops.floor_divide(indices, d2)
    remainder = ops.subtract(indices, ops.multiply(quotient, d2))
    # Backends have their fastest gather, and its gradient, for matrices.
    left = ops.reshape(ops.transpose(left, (1, 2, 0)), (d1, u1 * rank))
    right = ops.reshape(ops.transpose(right, (1, 0, 2)), (d2, rank * u2))
    left = ops.reshape(ops.take(left, quotient, axis=0), (-1, u1, rank))
    right = ops.reshape(ops.take(right, remainder, axis=0), (-1, rank, u2))
    return ops.reshape(ops.matmul(left, right), (-1, u1 * u2))


def materialize(left, right):
    """The Kronecker sum itself, `(d1 * d2, u1 * u2)`."""
    rank, d1, u1 = left.shape
    _, d2, u2 = right.shape
    left = ops.transpose(ops.reshape(left, (rank, d1 * u1)))
    kernel = ops.matmul(left, ops.reshape(right, (rank, d2 * u2)))
    kernel = ops.transpose(ops.reshape(kernel, (d1, u1, d2, u2)), (0, 2, 1, 3))
    return ops.reshape(kernel, (d1 * d2, u1 * u2))


def transpose(left, right):
    """The factors of the transposed kernel: the Kronecker product transposes factor by factor."""
    return ops.transpose(left, (0, 2, 1)), ops.transpose(right, (0, 2, 1))
