"""What a fit has to know of the examples: sums over the inputs of a kernel."""

import numpy as np

# A larger Gram matrix is kept in float32.
LARGE_GRAM = 4096


class InputStatistics:
    """Sums over examples of the inputs and outputs of a kernel: all that its fit needs.

    Args:
        kernel: `(input_dim, output_dim)`, of a full layer.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        inputs, outputs = kernel.shape
        self._count = 0
        self._inputs = np.zeros(inputs)
        self._targets = np.zeros(outputs)
        self._gram = np.zeros((inputs, inputs), "float64" if inputs <= LARGE_GRAM else "float32")
        self._cross = np.zeros((inputs, outputs))
        self._squares = np.zeros(outputs)

    def add(self, inputs, full_inputs):
        """Adds examples.

        Args:
            inputs: `(n, input_dim)`, what the fitted kernel is going to see.
            full_inputs: of the same shape, what the full one sees; their products
                with the full kernel are the targets.
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
    def count(self):
        """Number of examples."""
        return self._count

    @property
    def size(self):
        """The mean square of an input."""
        return np.trace(self._gram) / (len(self._gram) * self._count)

    def means(self):
        """The mean input and the mean target."""
        return self._inputs / self._count, self._targets / self._count

    def second(self, centred=False):
        """Means over examples of `x x^T`, `x y^T` and `y^2`, or of what differs from the means."""
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
    """The same numbers, such that sums of their products do not overflow."""
    if np.issubdtype(x.dtype, np.integer):
        return x.astype("float32" if x.dtype.itemsize < 4 else "float64")
    return x


class IndexCounts:
    """As `InputStatistics`, of an embedding: of `x x^T` there is only the diagonal.

    Args:
        kernel: `(input_dim, output_dim)`, of a full layer.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self._counts = np.zeros(len(kernel))

    def add(self, indices, full_indices=None):
        """Adds examples: an array of row numbers."""
        self._counts += np.bincount(indices, minlength=len(self._counts))

    @property
    def count(self):
        return int(self._counts.sum())

    @property
    def size(self):
        return 1 / len(self._counts)

    def second(self, centred=False):
        frequencies = self._counts / self.count
        cross = frequencies[:, None] * self.kernel
        return frequencies, cross, frequencies @ np.square(self.kernel, dtype="float64")
