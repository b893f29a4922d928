"""Pure functions of a Kronecker sum `W = sum_r kron(L_r, R_r)`, over `keras.ops`.

`left` has the shape `(rank, d1, u1)` and `right` `(rank, d2, u2)`; those of a
convolution have a window before the channels. Nothing here knows of layers, padding or dtypes.
"""

import functools
import operator
from collections.abc import Callable

from keras import ops

from keras_bilinear.kronecker import Tensor
from keras_bilinear.kronecker.factorization import Order
from keras_bilinear.kronecker.target import EXPORTED, on_gpu, runtime

# On a CPU XLA is slow at one small product of matrices for each row, in its gradient.
# Up to this rank a sum of outer products is as fast going forward and trains faster.
_MOST_OUTER_PRODUCTS = 4


def project(x: Tensor, left: Tensor, right: Tensor, order: Order) -> Tensor:
    """Multiplies rows by the Kronecker sum without forming it: `Y = sum_r L_r^T X R_r`.

    A sum of any rank takes two contractions. The terms lie side by side in the first
    contraction, and the second one sums over them.

    Args:
        x: `(..., d1 * d2)`.
        left: `(rank, d1, u1)`.
        right: `(rank, d2, u2)`.
        order: an `Order`, not `MATERIALIZED`.

    Returns:
        `(n, u1 * u2)`, where `n` is the product of the leading dimensions of `x`.
    """
    (y,) = projection(left[None], right[None], order)(x)
    return y


def projection(left: Tensor, right: Tensor, order: Order) -> Callable[[Tensor], list[Tensor]]:
    """Prepares the projection of rows by several Kronecker sums, such as the gates of a cell.

    All blocks share the first contraction; each block has a second one of its own.

    Args:
        left: `(blocks, rank, d1, u1)`.
        right: `(blocks, rank, d2, u2)`.
        order: an `Order`, not `MATERIALIZED`.

    Returns:
        A function from `(..., d1 * d2)` to a list, with a tensor for each block, of
        `(n, u1 * u2)`. What depends on the factors alone is computed already.
    """
    # PyTorch's tracing has tensors for sizes; these are plain numbers.
    blocks, rank, d1, u1 = map(int, left.shape)
    d2, u2 = map(int, right.shape[2:])
    if order is Order.LEFT_FIRST:
        left = ops.reshape(ops.transpose(left, (0, 3, 1, 2)), (blocks * u1 * rank, d1))
        right = _unstack(ops.reshape(right, (blocks, rank * d2, u2)))

        def apply(x):
            x = _split(_multiply_each(left, ops.reshape(x, (-1, d1, d2))), blocks, axis=1)
            for block, matrix in zip(x, right, strict=True):
                yield ops.matmul(ops.reshape(block, (-1, rank * d2)), matrix)
    else:
        right = ops.reshape(ops.transpose(right, (2, 0, 1, 3)), (d2, blocks * rank * u2))
        left = _unstack(ops.reshape(ops.transpose(left, (0, 3, 2, 1)), (blocks, u1, d1 * rank)))

        def apply(x):
            x = ops.reshape(ops.matmul(ops.reshape(x, (-1, d2)), right), (-1, d1, right.shape[1]))
            for block, matrix in zip(_split(x, blocks, axis=2), left, strict=True):
                yield _multiply_each(matrix, ops.reshape(block, (-1, d1 * rank, u2)))

    return lambda x: [ops.reshape(y, (-1, u1 * u2)) for y in apply(x)]


def _unstack(x):
    return [x[i] for i in range(x.shape[0])]


def _split(x, count, axis):
    return [x] if count == 1 else ops.split(x, count, axis)


def _multiply_each(matrix, x):
    """`matrix @ x[i]` for each of the matrices in `x`: `(m, p), (n, p, q) -> (n, m, q)`."""
    m, p = matrix.shape
    n, _, q = x.shape
    if q == 1:  # factors of low rank: one plain product
        return ops.reshape(ops.matmul(ops.reshape(x, (-1, p)), ops.transpose(matrix)), (-1, m, 1))
    if n == 1 and runtime() in ("tensorflow", "jax"):  # PyTorch does so by itself
        return ops.reshape(ops.matmul(matrix, ops.reshape(x, (p, q))), (1, m, q))
    # XLA is fastest with one large matrix product, and fuses the transposes around it. LiteRT
    # quantizes and runs best the products whose right operand is a constant matrix.
    # TensorFlow and PyTorch call one library kernel per operation, fastest with a batch.
    if runtime() not in ("jax", EXPORTED):
        return ops.matmul(matrix, x)
    y = ops.matmul(ops.reshape(ops.transpose(x, (0, 2, 1)), (-1, p)), ops.transpose(matrix))
    return ops.transpose(ops.reshape(y, (-1, q, m)), (0, 2, 1))


def rows(indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
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
    if d2 == 1:  # low rank: every index has the same row of the right factor
        left = ops.reshape(ops.transpose(left, (1, 2, 0)), (d1, u1 * rank))
        left = ops.reshape(ops.take(left, indices, axis=0), (-1, rank))
        return ops.reshape(ops.matmul(left, ops.reshape(right, (rank, u2))), (-1, u1 * u2))
    if 1 < rank <= _MOST_OUTER_PRODUCTS and runtime() == "jax" and not on_gpu():
        terms = zip(ops.split(left, rank), ops.split(right, rank), strict=True)
        return functools.reduce(operator.add, (rows(indices, *term) for term in terms))
    quotient = ops.floor_divide(indices, d2)
    remainder = ops.subtract(indices, ops.multiply(quotient, d2))
    # Backends gather fastest from matrices, going forward and in the gradient.
    left = ops.reshape(ops.transpose(left, (1, 2, 0)), (d1, u1 * rank))
    right = ops.reshape(ops.transpose(right, (1, 0, 2)), (d2, rank * u2))
    left = ops.reshape(ops.take(left, quotient, axis=0), (-1, u1, rank))
    right = ops.reshape(ops.take(right, remainder, axis=0), (-1, rank, u2))
    # PyTorch and LiteRT are slow at a matmul for an outer product, above all of integers.
    outer = rank == 1 and runtime() in ("torch", EXPORTED)
    product = ops.multiply if outer else ops.matmul
    return ops.reshape(product(left, right), (-1, u1 * u2))


def materialize(left: Tensor, right: Tensor) -> Tensor:
    """The Kronecker sum itself.

    Args:
        left: `(rank, *left_window, d1, u1)`.
        right: `(rank, *right_window, d2, u2)`.

    Returns:
        `(*window, d1 * d2, u1 * u2)`.
    """
    rank, *left_window, d1, u1 = left.shape
    *right_window, d2, u2 = right.shape[1:]
    left = ops.transpose(ops.reshape(left, (rank, -1)))
    kernel = ops.matmul(left, ops.reshape(right, (rank, -1)))
    kernel = ops.reshape(kernel, (*left_window, d1, u1, *right_window, d2, u2))
    # Each axis of the left factor comes to stand before the same axis of the right factor.
    half = len(left_window) + 2
    kernel = ops.transpose(kernel, [side + i for i in range(half) for side in (0, half)])
    window = [a * b for a, b in zip(left_window, right_window, strict=True)]
    return ops.reshape(kernel, (*window, d1 * d2, u1 * u2))


def materialize_blocks(left: Tensor, right: Tensor) -> Tensor:
    """Several Kronecker sums, side by side.

    Args:
        left: `(blocks, rank, d1, u1)`.
        right: `(blocks, rank, d2, u2)`.

    Returns:
        `(d1 * d2, blocks, u1 * u2)`.
    """
    blocks, rank, d1, u1 = left.shape
    d2, u2 = right.shape[2:]
    left = ops.transpose(ops.reshape(left, (blocks, rank, d1 * u1)), (0, 2, 1))
    kernel = ops.matmul(left, ops.reshape(right, (blocks, rank, d2 * u2)))
    kernel = ops.transpose(ops.reshape(kernel, (blocks, d1, u1, d2, u2)), (1, 3, 0, 2, 4))
    return ops.reshape(kernel, (d1 * d2, blocks, u1 * u2))


def transpose(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the transposed kernel: the transposed factors.

    Args:
        left: `(rank, d1, u1)`.
        right: `(rank, d2, u2)`.

    Returns:
        `(rank, u1, d1)` and `(rank, u2, d2)`.
    """
    return ops.transpose(left, (0, 2, 1)), ops.transpose(right, (0, 2, 1))
