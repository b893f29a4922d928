"""The kernels of bilinear layers: trainable factors that stand for a full kernel.

A `KroneckerKernel` has one pair of factors; a `GateKernel` has a pair for each gate of a cell.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import keras
import numpy as np
from keras import ops

from keras_bilinear.kronecker import Tensor, products
from keras_bilinear.kronecker.convolution import convolve
from keras_bilinear.kronecker.cost import choose_order, count_between, count_macs
from keras_bilinear.kronecker.factorization import Factorization, Order
from keras_bilinear.kronecker.fit import fit_kronecker_sum
from keras_bilinear.kronecker.initializers import KernelInitializers, as_float, draw_full
from keras_bilinear.kronecker.nearest import nearest_kronecker_sum
from keras_bilinear.kronecker.statistics import InputStatistics, Statistics
from keras_bilinear.kronecker.target import EXPORTED, differentiable, exporting, runtime
from keras_bilinear.layers.data_format import with_channels_last


class KroneckerKernel:
    """Two trainable factors of a layer that stand for one kernel.

    The kernel is `W = gain * sum_r kron(L_r, R_r)`, cut to its true size.

    The gain (see `keras_bilinear.kronecker.initializers`) serves the optimizers whose steps do
    not depend on the size of the gradient. It would enter the steps of SGD, which do, squared,
    and SGD would diverge. So the kernel divides the gradients of the stored factors by the
    gain, in and out of training. SGD then moves the kernel as if there were no gain, and Adam
    and its kin do not see the difference.

    Args:
        layer: the layer that owns the variables.
        factorization: the shapes.
        initializer: initializer of the full kernel, see `FactorInitializers`. What gives only
            the shape of the full kernel is replaced by the nearest sum.
        regularizer: applied to each stored factor.
        constraint: applied to each stored factor.
        implementation: `"auto"`, `"factorized"` or `"materialized"`. `"auto"` forms the kernel
            only where that is faster, see `keras_bilinear.kronecker.cost`.
        strides: strides of a convolution along each spatial axis.
        name: name of the kernel; the names of the variables end with it.
        draw: calls an initializer for the kernel of the full layer, and brings it to
            `factorization.full_shape`; `None` calls it for that shape.

    Attributes:
        factorization: the shapes.
        gain: the constant that multiplies the product of the stored factors.
        left: the stored left factor, a variable of `factorization.left_shape`.
        right: the stored right factor, a variable of `factorization.right_shape`.
    """

    def __init__(
        self,
        layer: keras.Layer,
        factorization: Factorization,
        initializer: Callable,
        regularizer: Callable | None = None,
        constraint: Callable | None = None,
        implementation: str = "auto",
        strides: Sequence[int] = (),
        name: str = "kernel",
        draw: Callable[[Callable], np.ndarray] | None = None,
    ):
        fan_in, fan_out = self._fans(factorization)

        def nearest():
            if draw is None:
                return self.nearest(draw_full(initializer, factorization.full_shape))
            return self.nearest(draw(initializer))

        self._initializers = KernelInitializers(
            initializer, factorization, fan_in, fan_out, nearest
        )
        self.gain = self._initializers.gain
        self._implementation, self._strides = implementation, strides
        self.count_as(factorization)
        shared = {"regularizer": regularizer, "constraint": constraint, "trainable": True}
        self.left = layer.add_weight(
            name=f"left_{name}",
            shape=factorization.left_shape,
            initializer=self._initializers.left,
            **shared,
        )
        self.right = layer.add_weight(
            name=f"right_{name}",
            shape=factorization.right_shape,
            initializer=self._initializers.right,
            **shared,
        )

    _choose_order = staticmethod(choose_order)

    def count_as(self, factorization: Factorization) -> None:
        """Takes the shapes by which `macs` and `between` count, but leaves the variables alone.

        After `__init__` this is for a kernel that is there only to count.

        Args:
            factorization: the shapes.
        """
        self.factorization = factorization
        options = factorization, self._implementation, self._strides
        self._order = self._choose_order(*options)
        with exporting():
            self._exported_order = self._choose_order(*options)

    @staticmethod
    def _fans(factorization: Factorization) -> tuple[int, int]:
        """Fan-in and fan-out of the full layer's kernel."""
        *window, inputs, outputs = factorization.full_shape
        return math.prod(window) * inputs, math.prod(window) * outputs

    def factors(self) -> tuple[Tensor, Tensor]:
        """The left and the right factor, whose Kronecker sum is the (padded) kernel.

        They include the gain, and gradients pass through them to the stored factors.
        """
        left, right = ops.convert_to_tensor(self.left), ops.convert_to_tensor(self.right)
        if differentiable():
            left = _scale_gradient(left, 1 / self.gain)
            right = _scale_gradient(right, 1 / self.gain)
        # The smaller factor takes the gain.
        if math.prod(left.shape) <= math.prod(right.shape):
            return ops.multiply(left, self.gain), right
        return left, ops.multiply(right, self.gain)

    @property
    def order(self) -> Order:
        """The `Order` in which the factors are applied."""
        return self._exported_order if runtime() == EXPORTED else self._order

    @property
    def materialized(self) -> bool:
        """Whether each call forms the full kernel."""
        return self.order is Order.MATERIALIZED

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for each row, or for each output position."""
        return count_macs(self.factorization, self.order, self._strides)

    @property
    def between(self) -> int:
        """Numbers between both factors for each row, or for each output position."""
        return count_between(self.factorization, self.order, self._strides)

    def materialize(self) -> Tensor:
        """The kernel, a new tensor of `factorization.full_shape`."""
        return self.full(*self.factors())

    def full(self, left: Tensor, right: Tensor) -> Tensor:
        """The kernel of other factors, without the gain.

        Args:
            left: a tensor or array of `factorization.left_shape`, but for the rank.
            right: likewise, of `factorization.right_shape`.

        Returns:
            A tensor of `factorization.full_shape`.
        """
        factorization = self.factorization
        kernel = products.materialize(left, right)
        leading = (*factorization.window, factorization.padded_input_dim, factorization.blocks)
        kernel = ops.reshape(kernel, (*leading, factorization.padded_output_dim))
        kernel = kernel[..., : factorization.input_dim, :, : factorization.output_dim]
        return ops.reshape(kernel, factorization.full_shape)

    def project(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Multiplies the last axis of a tensor by the kernel, which must be pointwise.

        Args:
            x: `(..., input_dim)`; if `transposed`, `(..., output_dim)`.
            transposed: whether to multiply by the transposed kernel.

        Returns:
            `(..., output_dim)`; if `transposed`, `(..., input_dim)`.
        """
        factorization = self.factorization
        if self.materialized:
            kernel = self.materialize()
            return ops.matmul(x, ops.transpose(kernel) if transposed else kernel)
        left, right = (
            ops.reshape(factor, (factorization.rank, *factor.shape[-2:]))
            for factor in self.factors()
        )
        if transposed:
            factorization = factorization.transposed
            left, right = products.transpose(left, right)
        # A transposed projection has an order of its own.
        order = factorization.order if transposed else self.order
        project = self._with_padding(
            lambda x: [products.project(x, left, right, order)], factorization
        )
        return project(x)[0]

    @staticmethod
    def _with_padding(project, factorization):
        """Makes a function of padded rows a function of any tensor with true sizes."""

        def project_padded(x):
            leading = _known_shape(x, axes=-1)
            padding = factorization.padded_input_dim - factorization.input_dim
            if padding:
                x = ops.pad(x, ((0, 0),) * len(leading) + ((0, padding),))
            return [_restore(y, leading, factorization) for y in project(x)]

        return project_padded

    def convolve(self, x: Tensor, data_format: str = "channels_last", **options: Any) -> Tensor:
        """The convolution of `x` with the kernel.

        Args:
            x: `(n, *positions, blocks * input_dim)`, or with the channels first.
            data_format: `"channels_last"` or `"channels_first"`.
            **options: `strides`, `padding` and `dilation_rate` of `keras.ops.conv`.
        """
        factorization = self.factorization
        if self.materialized:
            kernel = ops.cast(self.materialize(), x.dtype)
            return ops.conv(x, kernel, data_format=data_format, **options)

        def convolve_channels_last(x):
            if factorization.pointwise:
                steps = (slice(None, None, step) for step in options["strides"])
                return self.project(x[(slice(None), *steps)])
            return self._convolve_blocks(convolve, x, **options)

        return with_channels_last(convolve_channels_last, x, data_format)

    def _convolve_blocks(self, convolve, x, **options):
        """Convolves by a function that takes the channels of `x` as padded blocks."""
        factorization = self.factorization
        leading = ops.shape(x)[:-1]
        padding = factorization.padded_input_dim - factorization.input_dim
        if padding:
            x = ops.reshape(x, (*leading, factorization.blocks, factorization.input_dim))
            x = ops.pad(x, ((0, 0),) * (len(leading) + 1) + ((0, padding),))
        x = ops.reshape(x, (*leading, factorization.blocks, *factorization.input_factors))
        left, right = self.factors()
        y = convolve(x, left, right, self.order, factorization.blocks, **options)
        leading = ops.shape(y)[:-3]
        if factorization.padded_output_dim != factorization.output_dim:
            y = ops.reshape(y, (*leading, factorization.blocks, factorization.padded_output_dim))
            y = y[..., : factorization.output_dim]
        return ops.reshape(y, (*leading, factorization.blocks * factorization.output_dim))

    def rows(self, indices: Tensor) -> Tensor:
        """Looks up rows of the kernel, as an embedding does.

        Args:
            indices: integers of any shape.

        Returns:
            `(*indices.shape, output_dim)`.
        """
        if self.materialized:
            return ops.take(self.materialize(), indices, axis=0)
        rows = products.rows(indices, *self.factors())
        return _restore(rows, _known_shape(indices), self.factorization)

    def assign(self, kernel: np.ndarray) -> None:
        """Stores the Kronecker sum that is nearest to a full kernel.

        Args:
            kernel: an array of `factorization.full_shape`.
        """
        self.assign_factors(*self.nearest(kernel))

    def nearest(self, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The left and the right factor that are nearest to a full kernel, see `read_factors`."""
        return nearest_kronecker_sum(kernel, self.factorization)

    def fit(self, statistics: Sequence[Statistics], centred: bool) -> np.ndarray | float:
        """Stores the Kronecker sum that fits examples best.

        Args:
            statistics: the statistics of the examples for each block.
            centred: whether a bias takes the means.

        Returns:
            What to add to the bias for each output of the kernel, 0 if not `centred`.
        """
        self._fit(statistics, centred)
        if not centred:
            return 0.0
        factorization = self.factorization
        kernel = ops.convert_to_numpy(self.materialize()).astype("float64")
        kernel = kernel.reshape(-1, len(statistics), factorization.output_dim)
        # Only matrix products have a bias.
        means = [of_block.means() for of_block in cast("Sequence[InputStatistics]", statistics)]
        return np.concatenate(
            [target - input @ kernel[:, i] for i, (input, target) in enumerate(means)]
        )

    def _fit(self, statistics: Sequence[Statistics], centred: bool) -> None:
        fit = fit_kronecker_sum(statistics, self.factorization, centred)
        self.assign_factors(fit.left, fit.right)

    def read_factors(self) -> tuple[np.ndarray, np.ndarray]:
        """The left and the right factor as float64 arrays.

        Each has the root of the gain in it, so their Kronecker sum is the (padded) kernel.
        """
        left, right = (
            math.sqrt(self.gain) * ops.convert_to_numpy(variable).astype("float64")
            for variable in (self.left, self.right)
        )
        return left, right

    def assign_factors(self, left: np.ndarray, right: np.ndarray) -> None:
        """Stores factors whose Kronecker sum is the (padded) kernel.

        Args:
            left: an array of `factorization.left_shape`.
            right: an array of `factorization.right_shape`.
        """
        stored = self._initializers.store(left, right)
        for variable, values in zip((self.left, self.right), stored, strict=True):
            variable.assign(as_float(values, variable.dtype))


def _scale_gradient(x, scale):
    """`x` itself, bit for bit, but with its gradient multiplied by `scale`."""
    constant = ops.stop_gradient(x)
    return ops.add(constant, ops.multiply(ops.subtract(x, constant), scale))


def _known_shape(x, axes=None):
    """Leading dimensions of `x`, with `-1` for a single unknown dimension."""
    static = x.shape[:axes]
    if sum(size is None for size in static) > 1:
        return ops.shape(x)[:axes]
    return tuple(-1 if size is None else size for size in static)


def _restore(y, leading, factorization):
    """Cuts the padding off `(n, padded_output_dim)` and restores the leading dimensions."""
    if factorization.padded_output_dim != factorization.output_dim:
        y = y[:, : factorization.output_dim]
    return y if len(leading) == 1 else ops.reshape(y, (*leading, factorization.output_dim))


class GateKernel(KroneckerKernel):
    """The kernels of a cell's gates, side by side as in the stock cell, each a Kronecker sum."""

    def materialize(self, gates: Sequence[int] | None = None) -> Tensor:
        """The kernel of all gates, or of some gates that are neighbours.

        Args:
            gates: numbers of the gates, ascending; `None` for all.

        Returns:
            `(input_dim, gates * units)`.
        """
        return self.full(*self.factors(), gates)

    def full(self, left: Tensor, right: Tensor, gates: Sequence[int] | None = None) -> Tensor:
        factorization = self.factorization
        kernel = products.materialize_blocks(*self._pick(left, right, gates))
        kernel = kernel[: factorization.input_dim, :, : factorization.output_dim]
        return ops.reshape(kernel, (factorization.input_dim, -1))

    def _pick(self, left, right, gates):
        """The factors of all gates, or of some gates that are neighbours."""
        if not gates or len(gates) == self.factorization.blocks:
            return left, right
        return left[gates[0] : gates[-1] + 1], right[gates[0] : gates[-1] + 1]

    def projection(
        self, gates: Sequence[int] | None = None
    ) -> Callable[[Tensor], Sequence[Tensor]]:
        """Prepares products with the kernels of all gates, or of some gates that are neighbours.

        What depends on the factors alone is computed here, once for all calls of the function.

        Args:
            gates: numbers of the gates, ascending; `None` for all.

        Returns:
            A function from `(..., input_dim)` to `(..., units)` for each gate.
        """
        factorization = self.factorization
        gates = gates or range(factorization.blocks)
        if self.materialized:
            kernel = self.materialize(gates)
            return lambda x: split_blocks(ops.matmul(x, kernel), len(gates))
        left, right = self._pick(*self.factors(), gates)
        return self._with_padding(products.projection(left, right, self.order), factorization)

    def nearest(self, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        factorization = self.factorization
        return _stack_gates(
            nearest_kronecker_sum(block, factorization.block)
            for block in np.split(kernel, factorization.blocks, axis=-1)
        )

    def _fit(self, statistics: Sequence[Statistics], centred: bool) -> None:
        fits = [
            fit_kronecker_sum([of_gate], self.factorization.block, centred)
            for of_gate in statistics
        ]
        self.assign_factors(*_stack_gates((fit.left, fit.right) for fit in fits))


def _stack_gates(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The left and the right factors of all gates from a pair for each gate."""
    left, right = (np.stack(side) for side in zip(*pairs, strict=True))
    return left, right


def split_blocks(x: Tensor, count: int) -> Sequence[Tensor]:
    """Splits the last axis into `count` blocks of the same size."""
    return [x] if count == 1 else ops.split(x, count, axis=-1)
