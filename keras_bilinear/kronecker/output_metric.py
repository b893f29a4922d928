"""What errors of the outputs cost, in the shape of the factors.

The matrix `G` for the outputs becomes `kron(C_u C_u^T, C_v C_v^T)`, by its partial traces. It is
exact for factors of low rank, as one of the two has a single output. Outputs times
`kron(C_u, C_v)` then have plain squared errors that are the costs, and a factor `L` becomes
`L C_u`. So a fit needs nothing but this change, and the way back.
"""

from collections.abc import Sequence

import numpy as np
from scipy import linalg

from keras_bilinear.kronecker.factorization import Factorization
from keras_bilinear.kronecker.nearest import output_index, take
from keras_bilinear.kronecker.statistics import Moments

# The least weight of a direction of the outputs beside the mean over all directions, and the
# weight where there are as many examples as outputs.
LEAST_WEIGHT, WEIGHT_OF_FEW = 1e-3, 0.1


class OutputMetric:
    """What errors of the outputs of blocks that share a right factor cost.

    Args:
        moments: the means over examples of each block.
        counts: number of examples of each block.
        factorization: the shapes.
    """

    def __init__(
        self,
        moments: Sequence[Moments],
        counts: Sequence[int],
        factorization: Factorization,
    ):
        self._index = output_index(factorization)
        self._plain = all(of_block.metric is None for of_block in moments)
        self._left: list[np.ndarray] = []
        if self._plain:
            return
        weights = [
            _with_least_weight(of_block.metric, of_block.targets, count)
            for of_block, count in zip(moments, counts, strict=True)
        ]
        traces = [self._traces(of_block) for of_block in weights]
        rights = sum(right for _, right, _ in traces)
        total = sum(trace for *_, trace in traces)
        self._left = [_root(left) for left, *_ in traces]
        self._right = _root(rights / total if total else rights)

    def _traces(self, metric):
        """The partial traces of a metric, matrices or diagonals, and its trace."""
        u, v = self._index.shape
        if metric.ndim == 1 or self._index.min() < 0:
            # Directions that mix outputs with padding are none.
            diagonal = metric if metric.ndim == 1 else np.diagonal(metric)
            arranged = take(diagonal, self._index).reshape(u, v)
            return arranged.sum(1), arranged.sum(0), arranged.sum()
        arranged = metric.reshape(u, v, u, v)
        left, right = np.einsum("avbv->ab", arranged), np.einsum("uaub->ab", arranged)
        return left, right, np.trace(left)

    def change(self, values: np.ndarray, block: int) -> np.ndarray:
        """Changes the outputs of `(a, b, u, v)`."""
        if self._plain:
            return values
        values = _times(values, self._right)
        return _times(values.swapaxes(2, 3), self._left[block]).swapaxes(2, 3)

    def total(self, targets: np.ndarray, block: int) -> float:
        """What errors as large as the targets cost.

        Args:
            targets: the mean of `y y^T`, `(outputs, outputs)`, or its diagonal.
            block: position of the block.
        """
        if self._plain:
            return float(targets.sum() if targets.ndim == 1 else np.trace(targets))
        left, right = _square(self._left[block]), _square(self._right)
        if targets.ndim == 2 and left.ndim == 2 == right.ndim:
            arranged = targets.reshape(*self._index.shape, *self._index.shape)
            return float(np.einsum("uvab,ua,vb->", arranged, left, right, optimize=True))
        diagonal = targets if targets.ndim == 1 else np.diagonal(targets)
        left, right = (x if x.ndim == 1 else np.diagonal(x) for x in (left, right))
        arranged = take(diagonal, self._index).reshape(self._index.shape)
        return float(left @ arranged @ right)

    def change_factors(self, left: Sequence[np.ndarray], right: np.ndarray) -> tuple:
        """Factors `(rank, a, u)` of each block, and `(rank, b, v)`, for changed outputs."""
        if self._plain:
            return [*left], right
        pairs = zip(left, self._left, strict=True)
        return [_times(factor, root) for factor, root in pairs], _times(right, self._right)

    def change_factors_back(self, left: Sequence[np.ndarray], right: np.ndarray) -> tuple:
        """The way back from `change_factors`."""
        if self._plain:
            return [*left], right
        pairs = zip(left, self._left, strict=True)
        return [_over(factor, root) for factor, root in pairs], _over(right, self._right)


def _with_least_weight(metric, targets, count):
    """A metric in which no direction is free."""
    if metric is None:  # no gradient reaches this block, but some reach another
        return np.zeros(targets.shape)
    diagonal = metric if metric.ndim == 1 else np.diagonal(metric)
    least = max(LEAST_WEIGHT, min(WEIGHT_OF_FEW * len(diagonal) / count, 1.0))
    mean = diagonal.mean() or np.finfo("float64").tiny
    if metric.ndim == 1:
        return (1 - least) * metric + least * mean
    return (1 - least) * metric + least * mean * np.eye(len(metric))


def _root(matrix):
    """`C` with `C C^T`, lower triangular; of a diagonal, the diagonal of `C`."""
    if matrix.ndim == 1:
        return np.sqrt(np.maximum(matrix, 1e-9 * matrix.max()))
    size = np.trace(matrix) / len(matrix)
    floor = (1e-9 * size or 1e-30) * np.eye(len(matrix))
    return linalg.cholesky(matrix + floor, lower=True, check_finite=False)


def _square(root):
    return root**2 if root.ndim == 1 else root @ root.T


def _times(values, root):
    """The last axis of `values` times `root`."""
    return values * root if root.ndim == 1 else values @ root


def _over(values, root):
    """The last axis of `values` times the inverse of `root`."""
    if root.ndim == 1:
        return values / root
    flat = values.reshape(-1, values.shape[-1]).T
    solved = linalg.solve_triangular(root, flat, lower=True, trans="T", check_finite=False)
    return solved.T.reshape(values.shape)
