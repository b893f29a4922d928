"""The best Kronecker sum for a given kernel, in NumPy.

`nearest_kronecker_sum` finds its factors, `remaining_energies` its error at many ranks.
`leading_terms` is the truncated singular value decomposition behind both; `arrange` brings the
numbers of a kernel into the order of its factors.
"""

import itertools
import math

import numpy as np

from keras_bilinear.kronecker.factorization import Factorization

# With more rows, iteration finds a few singular vectors sooner than a decomposition.
LARGE = 1024
OVERSAMPLING, POWERS, FEW_POWERS = 16, 6, 2
# A larger kernel is decomposed in float32.
LARGE_KERNEL = 1 << 24


def nearest_kronecker_sum(
    kernel: np.ndarray, factorization: Factorization
) -> tuple[np.ndarray, np.ndarray]:
    """Minimizes `|| W - sum_r kron(L_r, R_r) ||` (Frobenius norm).

    The entries of `kron(L, R)`, rearranged, are the outer product of the entries
    of `L` and `R`, so the best sum is a truncated singular value decomposition
    of the rearranged kernel (Van Loan and Pitsianis, "Approximation with
    Kronecker Products", 1993). It is exact when
    `rank >= factorization.sufficient_rank`. Where the factors hold more numbers
    than the kernel has, the kernel is padded with zeros.

    Args:
        kernel: an array of `factorization.full_shape`, of any real dtype.
        factorization: the shapes, whose blocks share the right factor.

    Returns:
        `(left, right)`, float64, of `factorization.left_shape` and
        `right_shape`. Both factors of a term have the same norm.
    """
    blocks = np.split(
        np.asarray(kernel).reshape(-1, factorization.full_shape[-1]), factorization.blocks, axis=1
    )
    left, right = leading_terms(_rearrange(blocks, factorization), factorization.rank)
    return left.reshape(factorization.left_shape), right.reshape(factorization.right_shape)


def remaining_energies(
    blocks: list[np.ndarray], factorization: Factorization, most: int
) -> np.ndarray:
    """What the nearest sums of 0, 1, ... `most` terms leave of a kernel: squared norms.

    Args:
        blocks: the matrices in the kernel, each `(inputs, outputs)`.
        factorization: the shapes; the rank does not matter.
        most: the largest number of terms.

    Returns:
        `(most + 1,)`.
    """
    left = np.zeros(most + 1)
    for coupled in factorization.couple(blocks):
        matrix = _rearrange(coupled, factorization.coupled)
        taken = np.zeros(most + 1)
        energies = leading_energies(matrix, most)
        taken[1 : len(energies) + 1] = energies
        left += np.maximum(np.square(matrix).sum() - np.cumsum(taken), 0)
    return left


def _rearrange(blocks, factorization):
    """Blocks that share a right factor as a matrix: a row for each number of the left factor."""
    dtype = "float64" if blocks[0].size <= LARGE_KERNEL else "float32"
    kernels = np.stack([arrange(np.asarray(block, dtype), factorization) for block in blocks])
    rows = math.prod(factorization.left_shape[1:])
    return kernels.transpose(1, 0, 3, 2, 4).reshape(rows, -1)


def leading_terms(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The sum of `rank` outer products that is nearest to a matrix.

    Args:
        matrix: `(rows, columns)`.
        rank: number of terms.

    Returns:
        `(left, right)`, of `(rank, rows)` and `(rank, columns)`. Both vectors of a term
        have the same norm. Terms beyond the rank of the matrix are zero.
    """
    vectors, short = _leading_vectors(matrix, rank)
    left, right = vectors.T, vectors.T @ short
    if short is not matrix:
        left, right = right, left
    left_norm = np.linalg.norm(left, axis=1, keepdims=True)
    right_norm = np.linalg.norm(right, axis=1, keepdims=True)
    size = np.sqrt(left_norm * right_norm)
    left = left * np.divide(size, left_norm, out=np.zeros_like(size), where=left_norm > 0)
    right = right * np.divide(size, right_norm, out=np.zeros_like(size), where=right_norm > 0)
    missing = ((0, rank - len(left)), (0, 0))
    return np.pad(left, missing), np.pad(right, missing)


def arrange(values: np.ndarray, factorization: Factorization) -> np.ndarray:
    """Brings the numbers of one block of a kernel into the order of its factors.

    Args:
        values: `(inputs, outputs)`, a number for each number of the block.
        factorization: the shapes.

    Returns:
        `(a, b, u, v)`: inputs of the left and of the right factor, then their outputs.
        Padding is zero.
    """
    inputs, outputs = input_index(factorization), output_index(factorization)
    return take(values, inputs, outputs).reshape(*inputs.shape, *outputs.shape)


def input_index(factorization: Factorization) -> np.ndarray:
    """For each input of the left and of the right factor the input of a block; -1 for padding."""
    index = np.full((*factorization.window, factorization.padded_input_dim), -1)
    inputs = math.prod(factorization.window) * factorization.input_dim
    index[..., : factorization.input_dim] = np.arange(inputs).reshape(
        *factorization.window, factorization.input_dim
    )
    window = itertools.chain.from_iterable(
        zip(factorization.left_window, factorization.right_window, strict=True)
    )
    index = index.reshape(*window, *factorization.input_factors)
    index = index.transpose(*range(0, index.ndim, 2), *range(1, index.ndim, 2))
    return index.reshape(math.prod(factorization.left_window) * factorization.input_factors[0], -1)


def output_index(factorization: Factorization) -> np.ndarray:
    """For each output of the left and of the right factor the output of a block; -1 for padding."""
    index = np.full(factorization.padded_output_dim, -1)
    index[: factorization.output_dim] = np.arange(factorization.output_dim)
    return index.reshape(factorization.output_factors)


def take(values: np.ndarray, *indices: np.ndarray) -> np.ndarray:
    """`values` at the places that an index for each axis says; 0 where an index is -1."""
    for axis, index in enumerate(indices):
        values = np.take(values, index.ravel(), axis)
        if index.min() < 0:
            shape = [1] * values.ndim
            shape[axis] = index.size
            values = values * (index >= 0).reshape(shape)
    return values


def _leading_vectors(matrix, count):
    """`(vectors, matrix)`: leading left singular vectors of a matrix or its transpose.

    The function takes the matrix or the transpose, whichever has fewer rows. It finds the
    eigenvectors of the Gram matrix, several times as fast as a singular value
    decomposition. Projecting onto them gives the other side without a division, and to
    full precision. Of a large matrix, few vectors come from iterating on a random
    subspace (Halko, Martinsson, Tropp, "Finding Structure with Randomness",
    2011).
    """
    if len(matrix) > len(matrix.T):
        matrix = matrix.T
    if _are_many(matrix, count):
        _, vectors = np.linalg.eigh(matrix @ matrix.T)
        return vectors[:, ::-1][:, :count], matrix
    subspace = _leading_subspace(matrix, count, POWERS)
    projected = subspace.T @ matrix
    _, vectors = np.linalg.eigh(projected @ projected.T)
    return subspace @ vectors[:, ::-1][:, :count], matrix


def leading_energies(matrix: np.ndarray, count: int) -> np.ndarray:
    """The squares of at most `count` leading singular values of a matrix, the largest first."""
    if len(matrix) > len(matrix.T):
        matrix = matrix.T
    if not _are_many(matrix, count):
        # A subspace that is a little off misses little of the energy.
        matrix = _leading_subspace(matrix, count, FEW_POWERS).T @ matrix
    return np.linalg.eigvalsh(matrix @ matrix.T)[::-1][:count]


def _are_many(matrix, count):
    """Whether a whole decomposition is the faster way to so many singular vectors."""
    return len(matrix) <= LARGE or count > len(matrix) // 4


def _leading_subspace(matrix, count, powers):
    """Columns that nearly span the leading left singular vectors, by power iteration."""
    subspace = np.random.default_rng(0).normal(size=(len(matrix), count + OVERSAMPLING))
    subspace = subspace.astype(matrix.dtype)
    for _ in range(powers):
        subspace, _ = np.linalg.qr(matrix @ (matrix.T @ subspace))
    return subspace
