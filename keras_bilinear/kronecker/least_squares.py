"""The least squares of one block of a kernel, arranged for the alternating fit."""

import math

import numpy as np

from keras_bilinear.kronecker.factorization import Factorization
from keras_bilinear.kronecker.nearest import arrange, input_index, output_index, take
from keras_bilinear.kronecker.output_metric import OutputMetric
from keras_bilinear.kronecker.statistics import Moments

# Weight of the kernel itself beside the examples, for directions that the examples do not show:
# the least weight, and the weight where there are as many examples as inputs.
LEAST_PRIOR, PRIOR = 1e-3, 0.1


class LeastSquares:
    """The least squares of one block, its axes in the order of the factors' axes.

    The inputs of the left and of the right factor are `a` and `b`, their outputs `u` and `v`.
    With a metric, outputs are changed such that their plain squared errors are what errors
    cost.

    Args:
        kernel: the block, `(inputs, outputs)`.
        moments: the means over examples of the block.
        count: number of examples.
        size: the mean square of an input.
        factorization: the shapes, whose blocks share the right factor.
        metric: what errors of the outputs cost.
        block: position of the block among those that `metric` is for.

    Attributes:
        kernel: the block, `(a, b, u, v)`, of changed outputs.
        cross: means over examples of inputs times targets, `(a, b, u, v)`.
        diagonal: whether the Gram matrix of the inputs is diagonal.
        gram: the Gram matrix of the inputs, `(a * a, b * b)`; its diagonal, `(a, b)`, if
            `diagonal`.
        squares: mean over examples of the squared norm of the changed targets.
        prior: weight of the kernel itself beside the examples.
        prior_squares: squared norm of the kernel.
        known: which inputs are not padding, `(a, b)`.
        mask: which outputs are not padding, `(u, v)`.
    """

    def __init__(
        self,
        kernel: np.ndarray,
        moments: Moments,
        count: int,
        size: float,
        factorization: Factorization,
        metric: OutputMetric,
        block: int,
    ):
        inputs, outputs = input_index(factorization), output_index(factorization)
        a, b = inputs.shape
        gram = moments.gram
        # The prior weighs all inputs alike, by their mean square.
        diagonal = gram if gram.ndim == 1 else np.diagonal(gram)
        prior = max(LEAST_PRIOR, PRIOR * len(diagonal) / count)
        # Of constant inputs, or zeros, the examples show only how their squares were rounded.
        prior *= max(diagonal.mean(), 1e-3 * size) or 1.0
        self.mask = (outputs >= 0).astype("float64")
        self.kernel = metric.change(arrange(np.asarray(kernel, "float64"), factorization), block)
        self.cross = metric.change(arrange(moments.cross, factorization), block)
        # Rounding may leave less than nothing of targets that hardly vary.
        self.squares = max(metric.total(moments.targets, block), 0.0)
        self.prior, self.prior_squares = prior, np.square(self.kernel).sum()
        self.diagonal = gram.ndim == 1
        if self.diagonal:
            self.gram = take(gram, inputs).reshape(a, b)
        else:
            gram = take(gram, inputs, inputs).reshape(a, b, a, b)
            self.gram = np.ascontiguousarray(gram.transpose(0, 2, 1, 3)).reshape(a * a, b * b)
        self.known = (inputs >= 0).astype("float64")

    def as_matrix(self, values: np.ndarray) -> np.ndarray:
        """`(a, b, u, v)` as `(inputs, outputs)`, where the factors are of low rank."""
        return values.reshape(self.known.size, -1)

    def relative(self, error: float) -> float:
        """Root of a mean squared error over the error of the answer zero."""
        return math.sqrt(max(error, 0.0) / self.squares) if self.squares else 0.0

    def traces(self) -> tuple[np.ndarray, np.ndarray]:
        """The partial traces of the Gram matrix with the prior, `(a, a)` and `(b, b)`."""
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

    def normal(self, other: np.ndarray, mask: np.ndarray, side: str, prior: float) -> np.ndarray:
        """The matrix of the normal equations of one side, `(n, rank, n, rank)`.

        Args:
            other: the factor of the other side, `(rank, m, outputs)`.
            mask: which outputs of `other` count, `(outputs,)`.
            side: the side to solve for, `"left"` or `"right"`.
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

    def target(self, other: np.ndarray, side: str, prior: float) -> np.ndarray:
        """The right-hand side of the normal equations of one side, `(n, rank, outputs)`.

        The arguments are those of `normal`.
        """
        cross = (self.cross + prior * self.kernel) * self.mask
        axes = (1, 3) if side == "left" else (0, 2)
        return np.tensordot(other, cross, ((1, 2), axes)).swapaxes(0, 1)

    def error(self, left: np.ndarray, right: np.ndarray, prior: float) -> float:
        """Mean squared error of two factors over the examples, with the prior's share.

        Args:
            left: `(rank, a, u)`.
            right: `(rank, b, v)`.
            prior: weight of the prior.
        """
        total = 0.0
        target = self.target(right, "left", prior)
        rank, n, _ = left.shape
        left = left.swapaxes(0, 1)
        for columns, mask in columns_by_mask(self.mask):
            matrix = self.normal(right, mask, "left", prior).reshape(n * rank, n * rank)
            values = left[:, :, columns].reshape(n * rank, -1)
            total += np.sum(values * (matrix @ values))
            total -= 2 * np.sum(values * target[:, :, columns].reshape(n * rank, -1))
        return max(total + self.squares + prior * self.prior_squares, 0.0)


def columns_by_mask(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The outputs of one side in groups with the same mask of outputs on the other side.

    Args:
        mask: `(outputs, outputs of the other side)`.

    Returns:
        For each group the indices of its outputs, and the mask.
    """
    rows, which = np.unique(mask, axis=0, return_inverse=True)
    which = which.reshape(-1)
    return [(np.flatnonzero(which == i), row) for i, row in enumerate(rows) if row.any()]
