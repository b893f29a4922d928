"""What a fit has to know of the examples: sums over the inputs of a kernel.

`InputStatistics` has them for a matrix product, `IndexCounts` for an embedding.
"""

from typing import Protocol

import numpy as np

# A larger Gram matrix is kept in float32.
LARGE_GRAM = 4096


class Statistics(Protocol):
    """What a fit reads of `InputStatistics` or of `IndexCounts`."""

    kernel: np.ndarray

    @property
    def count(self) -> int: ...

    @property
    def size(self) -> float: ...

    def second(self, centred: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


class InputStatistics:
    """Sums over examples of the inputs and outputs of a kernel: all that its fit needs.

    Args:
        kernel: a block of the kernel of a full layer, `(input_dim, output_dim)`.
    """

    def __init__(self, kernel: np.ndarray):
        self.kernel = kernel
        inputs, outputs = kernel.shape
        self._count = 0
        self._inputs = np.zeros(inputs)
        self._targets = np.zeros(outputs)
        self._gram = np.zeros((inputs, inputs), "float64" if inputs <= LARGE_GRAM else "float32")
        self._cross = np.zeros((inputs, outputs))
        self._squares = np.zeros(outputs)

    def add(self, inputs: np.ndarray, full_inputs: np.ndarray) -> None:
        """Adds examples.

        Args:
            inputs: `(n, input_dim)`, what the fitted kernel is going to multiply.
            full_inputs: what the full kernel multiplies, of the same shape; the products
                are the targets.
        """
        inputs, full_inputs = _floats(inputs), _floats(full_inputs)
        targets = full_inputs @ self.kernel
        self._count += len(inputs)
        self._inputs += inputs.sum(0, dtype="float64")
        self._targets += targets.sum(0, dtype="float64")
        self._gram += inputs.T @ inputs
        self._cross += inputs.T @ targets
        self._squares += np.square(targets, dtype="float64").sum(0)

    @property
    def count(self) -> int:
        """Number of examples."""
        return self._count

    @property
    def size(self) -> float:
        """The mean square of an input."""
        return np.trace(self._gram) / (len(self._gram) * self._count)

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean input, `(input_dim,)`, and the mean target, `(output_dim,)`."""
        return self._inputs / self._count, self._targets / self._count

    def second(self, centred: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Means over examples of `x x^T`, `x y^T` and `y^2`.

        Args:
            centred: whether the means of inputs `x` and targets `y` are subtracted first.
        """
        gram, cross, squares = (
            sums / self._count for sums in (self._gram, self._cross, self._squares)
        )
        if centred:
            inputs, targets = self.means()
            gram -= np.outer(*[inputs.astype(gram.dtype)] * 2)
            cross -= np.outer(inputs, targets)
            squares = np.maximum(squares - targets**2, 0)
        return gram, cross, squares


def _floats(x):
    """The same numbers in a dtype in which sums of their products do not overflow."""
    if np.issubdtype(x.dtype, np.integer):
        return x.astype("float32" if x.dtype.itemsize < 4 else "float64")
    return x


class IndexCounts:
    """How often an embedding looks up each of its rows.

    An index stands for a row of zeros with a single 1. So these are `InputStatistics` whose
    mean of `x x^T` is diagonal, and only its diagonal is stored.

    Args:
        kernel: the table of a full embedding, `(input_dim, output_dim)`.
    """

    def __init__(self, kernel: np.ndarray):
        self.kernel = kernel
        self._counts = np.zeros(len(kernel))

    def add(self, indices: np.ndarray, full_indices: np.ndarray | None = None) -> None:
        """Adds examples.

        Args:
            indices: numbers of rows, `(n,)`.
            full_indices: not used, as the full embedding looks up the same rows.
        """
        self._counts += np.bincount(indices, minlength=len(self._counts))

    @property
    def count(self) -> int:
        """Number of examples."""
        return int(self._counts.sum())

    @property
    def size(self) -> float:
        """The mean square of an input."""
        return 1 / len(self._counts)

    def second(self, centred: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Means over examples of the diagonal of `x x^T`, of `x y^T`, and of `y^2`.

        Args:
            centred: not used, as an embedding has no bias.
        """
        frequencies = self._counts / self.count
        cross = frequencies[:, None] * self.kernel
        return frequencies, cross, frequencies @ np.square(self.kernel, dtype="float64")
