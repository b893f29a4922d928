"""The best Kronecker sum for a given kernel, in NumPy."""

import itertools
import math

import numpy as np

# Above so many rows, a few singular vectors are found by iteration.
LARGE = 1024
OVERSAMPLING, POWERS, FEW_POWERS = 16, 6, 2
# A larger kernel is decomposed in float32.
LARGE_KERNEL = 1 << 24


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
        factorization: a `Factorization` of that shape, whose blocks share the right factor.

    Returns:
        `(left, right)`, float64, of `factorization.left_shape` and
        `right_shape`. Both factors of a term have the same norm.
    """
    plan = factorization
    blocks = np.split(np.asarray(kernel).reshape(-1, plan.full_shape[-1]), plan.blocks, axis=1)
    left, right = leading_terms(_rearrange(blocks, plan), plan.rank)
    return left.reshape(plan.left_shape), right.reshape(plan.right_shape)


def remaining_energies(blocks, factorization, most):
    """What the nearest sums of 0, 1, ... `most` terms leave of a kernel: squared norms.

    Args:
        blocks: the matrices in the kernel, each `(inputs, outputs)`.
        factorization: a `Factorization`; its rank does not matter.
        most: the largest number of terms.
    """
    left = np.zeros(most + 1)
    for coupled in factorization.couple(blocks):
        matrix = _rearrange(coupled, factorization.coupled)
        taken = np.zeros(most + 1)
        energies = _leading_energies(matrix, most)
        taken[1 : len(energies) + 1] = energies
        left += np.maximum(np.square(matrix).sum() - np.cumsum(taken), 0)
    return left


def _rearrange(blocks, plan):
    """Blocks that share a right factor as a matrix: a row for each number of the left factor."""
    dtype = "float64" if blocks[0].size <= LARGE_KERNEL else "float32"
    kernels = np.stack([arrange(np.asarray(block, dtype), plan) for block in blocks])
    rows = math.prod(plan.left_shape[1:])
    return kernels.transpose(1, 0, 3, 2, 4).reshape(rows, -1)


def leading_terms(matrix, rank):
    """The sum of `rank` outer products that is nearest to a matrix.

    Returns:
        `(left, right)`, of `(rank, rows)` and `(rank, columns)`; those of a term
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


def arrange(values, plan):
    """The numbers of one block of a kernel, `(inputs, outputs)`, arranged as its factors are.

    Returns:
        `(a, b, u, v)`: inputs of the left and of the right factor, then their
        outputs; zero for those of the padding.
    """
    inputs, outputs = input_index(plan), output_index(plan)
    return take(values, inputs, outputs).reshape(*inputs.shape, *outputs.shape)


def input_index(plan):
    """For each input of the factors, `(left, right)`, that of the kernel; -1 for the padding."""
    index = np.full((*plan.window, plan.padded_input_dim), -1)
    inputs = math.prod(plan.window) * plan.input_dim
    index[..., : plan.input_dim] = np.arange(inputs).reshape(*plan.window, plan.input_dim)
    window = itertools.chain.from_iterable(zip(plan.left_window, plan.right_window, strict=True))
    index = index.reshape(*window, *plan.input_factors)
    index = index.transpose(*range(0, index.ndim, 2), *range(1, index.ndim, 2))
    return index.reshape(math.prod(plan.left_window) * plan.input_factors[0], -1)


def output_index(plan):
    """For each output of the factors, `(left, right)`, that of the kernel; -1 for the padding."""
    index = np.full(plan.padded_output_dim, -1)
    index[: plan.output_dim] = np.arange(plan.output_dim)
    return index.reshape(plan.output_factors)


def take(values, *indices):
    """`values` at the places of one index for each axis; 0 where it is -1."""
    for axis, index in enumerate(indices):
        values = np.take(values, index.ravel(), axis)
        if index.min() < 0:
            shape = [1] * values.ndim
            shape[axis] = index.size
            values = values * (index >= 0).reshape(shape)
    return values


def _leading_vectors(matrix, count):
    """`(vectors, matrix)`: leading left singular vectors of a matrix or its transpose.

    Taken is the one with fewer rows: the eigenvectors of its Gram matrix are
    found several times as fast as a singular value decomposition, and
    projecting onto them gives the other side without a division, and to full
    precision. Of a large matrix, few vectors come from iterating on a random
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


def _leading_energies(matrix, count):
    """The squares of the leading singular values of a matrix."""
    if len(matrix) > len(matrix.T):
        matrix = matrix.T
    if not _are_many(matrix, count):
        # A subspace that is a little off misses little of the energy.
        matrix = _leading_subspace(matrix, count, FEW_POWERS).T @ matrix
    return np.linalg.eigvalsh(matrix @ matrix.T)[::-1][:count]


def _are_many(matrix, count):
    """Whether so many singular vectors come sooner from a whole decomposition."""
    return len(matrix) <= LARGE or count > len(matrix) // 4


def _leading_subspace(matrix, count, powers):
    subspace = np.random.default_rng(0).normal(size=(len(matrix), count + OVERSAMPLING))
    subspace = subspace.astype(matrix.dtype)
    for _ in range(powers):
        subspace, _ = np.linalg.qr(matrix @ (matrix.T @ subspace))
    return subspace
