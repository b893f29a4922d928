"""What a fit has to know of the examples: sums over the inputs of a kernel and the gradients.

`InputStatistics` has them for a matrix product, `IndexCounts` for an embedding.

The gradients are those of the model's loss at the outputs of the kernel. With them a fit weighs
errors by what they do to the loss. To second order, a change `D` of the kernel raises the loss by
half the mean of `(x^T D g)^2` over inputs `x` and gradients `g`. The fit takes `tr(D^T A D G)` for
it, with a matrix `A` for the inputs and a matrix `G` for the outputs, as K-FAC does (Martens and
Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015). As in
GFWSVD (arXiv 2505.17974), inputs with large gradients count more, and gradients with large inputs.
"""

import dataclasses
from typing import Protocol

import numpy as np

# Larger matrices are kept in float32.
LARGE = 1024
# Of more outputs than this only the diagonals of the matrices are kept.
MOST_OUTPUTS = 4096
# The share of the means that are weighted by squared norms. In the others all examples count alike:
# a few large gradients do not outvote all other examples.
WEIGHTED = 0.5


@dataclasses.dataclass(frozen=True)
class Moments:
    """Means over examples of products of inputs `x` and targets `y`, weighted.

    Attributes:
        gram: of `x x^T`, `(input_dim, input_dim)`; its diagonal, `(input_dim,)`, for an embedding.
        cross: of `x y^T`, `(input_dim, output_dim)`.
        targets: of `y y^T`, `(output_dim, output_dim)`, or its diagonal, `(output_dim,)`.
        metric: what errors of the outputs cost, a matrix or a diagonal as `targets` is. The mean
            of `e^T metric e` over errors `e` is the rise of the loss for each row. `None` if
            no gradients are known, and all outputs count alike.
    """

    gram: np.ndarray
    cross: np.ndarray
    targets: np.ndarray
    metric: np.ndarray | None


class Statistics(Protocol):
    """What a fit reads of `InputStatistics` or of `IndexCounts`."""

    kernel: np.ndarray

    @property
    def count(self) -> int: ...

    @property
    def size(self) -> float: ...

    def moments(self, centred: bool = False) -> Moments: ...


class InputGradients:
    """Sums over the gradients at the outputs of a kernel.

    Args:
        outputs: number of outputs.
    """

    def __init__(self, outputs: int):
        self.count = 0
        self._inputs = self._gradients = self._both = 0.0
        self._plain, self._weighted = _zeros_of_products(outputs), _zeros_of_products(outputs)

    def add(self, inputs: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """Adds examples; returns the squared norms of the gradients, which weigh the inputs.

        Args:
            inputs: what the full kernel multiplies, `(n, input_dim)`.
            gradients: the gradients of the loss at what it makes, `(n, output_dim)`.
        """
        return self.add_norms(np.square(_floats(inputs), dtype="float64").sum(1), gradients)

    def add_norms(self, input_norms: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """The same, with the squared norms of the inputs, `(n,)`."""
        norms = np.square(gradients, dtype="float64").sum(1)
        self.count += len(gradients)
        self._inputs += input_norms.sum()
        self._gradients += norms.sum()
        self._both += norms @ input_norms
        self._plain += _sum_of_products(gradients, None, self._plain.ndim)
        self._weighted += _sum_of_products(gradients, input_norms, self._plain.ndim)
        return norms

    def any(self) -> bool:
        """Whether some gradient, at an input that is not zero, is not zero."""
        return self._both > 0

    def matrix(self) -> np.ndarray:
        """The mean of `g g^T` over gradients `g`, weighted, or its diagonal."""
        return _mix(self._plain, self.count, self._weighted, self._inputs)

    def of_inputs(self, plain: np.ndarray, weighted: np.ndarray) -> np.ndarray:
        """A mean over inputs, weighted.

        Args:
            plain: the sum over inputs.
            weighted: their sum, each weighed by what `add` returns.
        """
        return _mix(plain, self.count, weighted, self._gradients)

    def scale(self) -> float:
        """The mean over examples of `|x|^2 |g|^2` over that which both means have as a product."""
        inputs = _mix(self._inputs, self.count, self._both, self._gradients)
        gradients = _mix(self._gradients, self.count, self._both, self._inputs)
        return float(self._both / self.count / (inputs * gradients))


def _mix(plain, count, weighted, weight):
    """The mixture of a plain mean and a weighted one, from the sums."""
    return (1 - WEIGHTED) / count * plain + WEIGHTED / weight * weighted


def _zeros_of_products(size: int) -> np.ndarray:
    """Where products of vectors are added up: a matrix or, for long vectors, its diagonal."""
    return np.zeros((size, size), _dtype(size)) if size <= MOST_OUTPUTS else np.zeros(size)


def _dtype(size: int) -> str:
    return "float64" if size <= LARGE else "float32"


def _sum_of_products(rows: np.ndarray, weights: np.ndarray | None, axes: int) -> np.ndarray:
    """The weighted sum of `y y^T` over rows `y`, or of its diagonal if `axes` is 1."""
    weighted = rows if weights is None else rows * weights[:, None].astype(rows.dtype)
    return weighted.T @ rows if axes == 2 else np.einsum("ij,ij->j", weighted, rows)


class _Sums:
    """Weighted sums over inputs, targets and their products.

    Args:
        shape: shape of the kernel, `(input_dim, output_dim)`.
        targets: zeros of the shape of the sum of `y y^T` over targets `y`.
    """

    def __init__(self, shape: tuple[int, ...], targets: np.ndarray):
        inputs, outputs = shape
        self.inputs, self.means = np.zeros(inputs), np.zeros(outputs)
        self.gram = np.zeros((inputs, inputs), _dtype(inputs))
        self.cross = np.zeros((inputs, outputs))
        self.targets = targets

    def add(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray | None) -> None:
        """Adds examples, with a weight for each of them or for none."""
        weighted = inputs if weights is None else inputs * weights[:, None].astype(inputs.dtype)
        self.inputs += weighted.sum(0, dtype="float64")
        self.gram += weighted.T @ inputs
        self.cross += weighted.T @ targets
        targets = targets.astype(self.targets.dtype)
        self.means += targets.sum(0) if weights is None else weights @ targets
        self.targets += _sum_of_products(targets, weights, self.targets.ndim)


class InputStatistics:
    """Sums over examples of the inputs and outputs of a kernel: all that its fit needs.

    Args:
        kernel: a block of the kernel of a full layer, `(input_dim, output_dim)`.

    Attributes:
        gradients: the `InputGradients` at the outputs of the full kernel, for the same examples;
            empty, if gradients are not known.
    """

    def __init__(self, kernel: np.ndarray):
        self.kernel = kernel
        self.gradients = InputGradients(kernel.shape[1])
        self._count = 0
        # Without gradients, only the diagonal of the products of targets counts.
        self._plain = _Sums(kernel.shape, np.zeros(kernel.shape[1]))
        self._weighted: _Sums | None = None

    def add(
        self, inputs: np.ndarray, full_inputs: np.ndarray, norms: np.ndarray | None = None
    ) -> None:
        """Adds examples.

        Args:
            inputs: `(n, input_dim)`, what the fitted kernel is going to multiply.
            full_inputs: what the full kernel multiplies, of the same shape; the products
                are the targets.
            norms: what `gradients` returns for these examples; `None` if gradients are not known.
                Either all calls give norms, or none does.
        """
        inputs, full_inputs = _floats(inputs), _floats(full_inputs)
        targets = full_inputs @ self.kernel
        if norms is not None:
            if self._weighted is None:
                for_each = (_zeros_of_products(targets.shape[1]) for _ in range(2))
                self._plain, self._weighted = (_Sums(self.kernel.shape, x) for x in for_each)
            self._weighted.add(inputs, targets, norms)
        self._plain.add(inputs, targets, None)
        self._count += len(inputs)

    @property
    def count(self) -> int:
        """Number of examples."""
        return self._count

    @property
    def size(self) -> float:
        """The mean square of an input."""
        return np.trace(self._plain.gram) / (len(self._plain.gram) * self._count)

    def _mean(self, name: str) -> np.ndarray:
        """The mean over examples of one of the sums."""
        plain = getattr(self._plain, name)
        if self._weighted is None or not self.gradients.any():
            return plain / self._count
        return self.gradients.of_inputs(plain, getattr(self._weighted, name)).astype(plain.dtype)

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean input, `(input_dim,)`, and the mean target, `(output_dim,)`, weighted."""
        return self._mean("inputs"), self._mean("means")

    def moments(self, centred: bool = False) -> Moments:
        """The means of products of inputs and targets.

        Args:
            centred: whether the means of inputs and targets are subtracted first.
        """
        gram, cross, targets = map(self._mean, ("gram", "cross", "targets"))
        if centred:
            inputs, means = self.means()
            gram -= np.outer(*[inputs.astype(gram.dtype)] * 2)
            cross -= np.outer(inputs, means)
            if targets.ndim == 1:
                targets = np.maximum(targets - means**2, 0)
            else:
                targets -= np.outer(means, means)
        metric = None
        if self.gradients.any():
            # The half is that of the second order.
            metric = 0.5 * self.gradients.scale() * self.gradients.matrix()
        return Moments(gram, cross, targets, metric)


def _floats(x):
    """The same numbers in a dtype in which sums of their products do not overflow."""
    if np.issubdtype(x.dtype, np.integer):
        return x.astype("float32" if x.dtype.itemsize < 4 else "float64")
    return x


class IndexGradients:
    """Sums over the gradients at the rows of a table, and at what it projects back to its rows.

    Args:
        inputs: number of rows.
        outputs: width of a row.
    """

    def __init__(self, inputs: int, outputs: int):
        self._lookups, self._projections = _Uses(inputs, outputs), _Uses(inputs, outputs)

    def add(self, rows: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """Adds examples; returns squared norms, one for each.

        Args:
            rows: numbers of rows, `(n,)`. Or, where the table projects back to its rows, what it
                multiplies, `(n, output_dim)`.
            gradients: the gradients of the loss at the rows, `(n, output_dim)`, or at what the
                table makes, `(n, input_dim)`.
        """
        if rows.ndim == 1:
            size = len(self._lookups.plain)
            norms = self._lookups.gradients.add_norms(np.ones(len(rows)), gradients)
            self._lookups.weighted += np.bincount(rows, norms, size)
            self._lookups.plain += np.bincount(rows, minlength=size)
            return norms
        # Inputs and gradients change sides: what the table makes are inputs of its transpose.
        squares = np.square(gradients, dtype="float64")
        norms = self._projections.gradients.add_norms(squares.sum(1), rows)
        self._projections.weighted += norms @ squares
        self._projections.plain += squares.sum(0)
        return norms

    def any(self) -> bool:
        """Whether some gradient is not zero."""
        return any(uses.gradients.any() for uses in (self._lookups, self._projections))

    def product(self) -> tuple[np.ndarray, np.ndarray]:
        """A diagonal for the rows, and a matrix for the columns.

        With a diagonal that is divided by its trace, the product stands for what errors of the
        table raise the loss by, in all examples.
        """
        # Such a product stands for each use. A single product stands for their sum, that of its
        # partial traces.
        uses = [uses for uses in (self._lookups, self._projections) if uses.gradients.any()]
        products = [of_use.product() for of_use in uses]
        return (
            np.sum([rows * _trace(matrix) for rows, matrix in products], axis=0),
            np.sum([rows.sum() * matrix for rows, matrix in products], axis=0),
        )


class _Uses:
    """Sums over one kind of use of a table."""

    def __init__(self, inputs: int, outputs: int):
        self.plain, self.weighted = np.zeros(inputs), np.zeros(inputs)
        self.gradients = InputGradients(outputs)

    def product(self) -> tuple[np.ndarray, np.ndarray]:
        """As that of `IndexGradients`, but with the product as it is."""
        scale = 0.5 * self.gradients.scale() * self.gradients.count
        return self.gradients.of_inputs(self.plain, self.weighted), scale * self.gradients.matrix()


class IndexCounts:
    """How often an embedding looks up each of its rows.

    An index stands for a row of zeros with a single 1. So these are `InputStatistics` whose
    mean of `x x^T` is diagonal, and only its diagonal is stored.

    Args:
        kernel: the table of a full embedding, `(input_dim, output_dim)`.

    Attributes:
        gradients: the `IndexGradients` at the table, for the same examples; empty, if gradients
            are not known.
    """

    def __init__(self, kernel: np.ndarray):
        self.kernel = kernel
        self.gradients = IndexGradients(*kernel.shape)
        self._count = 0
        self._counts = np.zeros(len(kernel))

    def add(
        self,
        rows: np.ndarray,
        full_rows: np.ndarray | None = None,
        norms: np.ndarray | None = None,
    ) -> None:
        """Adds examples.

        Args:
            rows: numbers of rows, `(n,)`. Or, where the table projects back to its rows, what it
                multiplies, `(n, output_dim)`: the fit knows of these by `gradients` alone.
            full_rows: not used, as the full embedding looks up the same rows.
            norms: not used, as `gradients` have all weights.
        """
        if rows.ndim == 1:
            self._counts += np.bincount(rows, minlength=len(self._counts))
        self._count += len(rows)

    @property
    def count(self) -> int:
        """Number of examples."""
        return self._count

    @property
    def size(self) -> float:
        """The mean square of an input."""
        return 1 / len(self.kernel)

    def moments(self, centred: bool = False) -> Moments:
        """The means of products of inputs and targets.

        Args:
            centred: not used, as an embedding has no bias.
        """
        kernel = np.asarray(self.kernel, "float64")
        if not self.gradients.any():
            frequencies = self._counts / max(self._counts.sum(), 1.0)
            cross = frequencies[:, None] * kernel
            return Moments(frequencies, cross, frequencies @ np.square(kernel), None)
        weights, metric = self.gradients.product()
        frequencies, metric = weights / weights.sum(), metric / self._count
        targets = _sum_of_products(kernel, frequencies, metric.ndim)
        return Moments(frequencies, frequencies[:, None] * kernel, targets, metric)


def _trace(matrix: np.ndarray) -> float:
    """The trace of a matrix, or of its diagonal."""
    return float(matrix.sum() if matrix.ndim == 1 else np.trace(matrix))
