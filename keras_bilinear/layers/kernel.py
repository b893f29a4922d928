"""The kernels of bilinear layers: factors that stand for one."""

import math

import numpy as np
from keras import ops

from keras_bilinear.kronecker import products
from keras_bilinear.kronecker.convolution import convolve
from keras_bilinear.kronecker.cost import choose_order, count_between, count_macs
from keras_bilinear.kronecker.factorization import Order
from keras_bilinear.kronecker.fit import fit_kronecker_sum
from keras_bilinear.kronecker.initializers import FactorInitializers, split_into_blocks
from keras_bilinear.kronecker.nearest import nearest_kronecker_sum
from keras_bilinear.kronecker.target import EXPORTED, differentiable, exporting, runtime


class KroneckerKernel:
    """Two trainable factors of a layer that stand for one kernel.

    The kernel is `W = gain * sum_r kron(L_r, R_r)`, cut to its true size.

    The gain (see `keras_bilinear.kronecker.initializers`) serves the optimizers whose
    steps do not depend on the size of the gradient. It would enter the steps of
    those that do (SGD) squared, and they would diverge. So the gradients of the
    stored factors are divided by the gain, whether the layer is called for
    training or not: SGD moves the kernel as if there were none, and Adam and its
    kin do not see the difference.

    Args:
        layer: the layer that owns the variables.
        factorization: the shapes.
        initializer: initializer of the full kernel, see `FactorInitializers`.
        regularizer: applied to each stored factor.
        constraint: applied to each stored factor.
        implementation: `"auto"`, `"factorized"` or `"materialized"`. `"auto"`
            materializes only where that is faster, see `keras_bilinear.kronecker.cost`.
        strides: those of a convolution.
        name: of the kernel; those of the factors end with it.
    """

    def __init__(
        self,
        layer,
        factorization,
        initializer,
        regularizer=None,
        constraint=None,
        implementation="auto",
        strides=(),
        name="kernel",
    ):
        coupled, window = factorization.coupled, math.prod(factorization.window)
        stacked = not factorization.share_right
        initializers = [
            FactorInitializers(
                of_block,
                coupled.left_shape,
                coupled.right_shape,
                fan_in=window * factorization.input_dim,
                fan_out=window * factorization.blocks * factorization.output_dim,
            )
            for of_block in (
                split_into_blocks(initializer, factorization.blocks) if stacked else [initializer]
            )
        ]

        def initialize(side):
            def of_all_blocks(shape, dtype=None):
                return ops.stack(
                    [getattr(of_block, side)(shape[1:], dtype) for of_block in initializers]
                )

            return of_all_blocks if stacked else getattr(initializers[0], side)

        self.factorization = factorization
        self.gain = initializers[0].gain
        self._strides = strides
        self._order = choose_order(factorization, implementation, strides)
        with exporting():
            self._exported_order = choose_order(factorization, implementation, strides)
        shared = {"regularizer": regularizer, "constraint": constraint, "trainable": True}
        self.left = layer.add_weight(
            name=f"left_{name}",
            shape=factorization.left_shape,
            initializer=initialize("left"),
            **shared,
        )
        self.right = layer.add_weight(
            name=f"right_{name}",
            shape=factorization.right_shape,
            initializer=initialize("right"),
            **shared,
        )

    def factors(self):
        """`(left, right)` tensors whose Kronecker sum is the (padded) kernel, gain included."""
        left, right = ops.convert_to_tensor(self.left), ops.convert_to_tensor(self.right)
        if differentiable():
            left = _scale_gradient(left, 1 / self.gain)
            right = _scale_gradient(right, 1 / self.gain)
        # The smaller factor takes the gain.
        if math.prod(left.shape) <= math.prod(right.shape):
            return ops.multiply(left, self.gain), right
        return left, ops.multiply(right, self.gain)

    @property
    def order(self):
        """The `Order` in which the factors are applied."""
        return self._exported_order if runtime() == EXPORTED else self._order

    @property
    def materialized(self):
        """Whether the full kernel is formed at each call."""
        return self.order is Order.MATERIALIZED

    @property
    def macs(self):
        """Multiply-accumulate operations for each row, or for each output position."""
        return count_macs(self.factorization, self.order, self._strides)

    @property
    def between(self):
        """Numbers between both factors for each row, or for each output position."""
        return count_between(self.factorization, self.order, self._strides)

    def materialize(self):
        """The kernel, of `factorization.full_shape`."""
        return self.full(*self.factors())

    def full(self, left, right):
        """What two factors stand for, of any rank and without gain."""
        plan = self.factorization
        kernel = products.materialize(left, right)
        leading = (*plan.window, plan.padded_input_dim, plan.blocks)
        kernel = ops.reshape(kernel, (*leading, plan.padded_output_dim))
        kernel = kernel[..., : plan.input_dim, :, : plan.output_dim]
        return ops.reshape(kernel, plan.full_shape)

    def project(self, x, transposed=False):
        """`x @ W`, or `x @ W^T`, over the last axis of an `x` of any rank.

        For pointwise kernels.
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
    def _with_padding(project, plan):
        """Makes a function of padded rows one of an `x` of any rank and of the true sizes."""

        def project_padded(x):
            leading = _known_shape(x, axes=-1)
            padding = plan.padded_input_dim - plan.input_dim
            if padding:
                x = ops.pad(x, ((0, 0),) * len(leading) + ((0, padding),))
            return [_restore(y, leading, plan) for y in project(x)]

        return project_padded

    def convolve(self, x, data_format="channels_last", **options):
        """The convolution of `x` with the kernel.

        Args:
            x: `(n, *positions, blocks * input_dim)`, or with the channels first.
            data_format: `"channels_last"` or `"channels_first"`.
            **options: `strides`, `padding` and `dilation_rate` of `keras.ops.conv`.
        """
        plan = self.factorization
        if self.materialized:
            kernel = ops.cast(self.materialize(), x.dtype)
            return ops.conv(x, kernel, data_format=data_format, **options)
        dtype = x.dtype
        channels_first = data_format == "channels_first"
        axes = range(1, 1 + len(plan.window))
        if channels_first:
            x = ops.transpose(x, (0, *(axis + 1 for axis in axes), 1))
        if plan.pointwise:
            steps = (slice(None, None, step) for step in options["strides"])
            y = self.project(x[(slice(None), *steps)])
        else:
            y = self._convolve_blocks(x, **options)
        y = ops.cast(y, dtype)
        return ops.transpose(y, (0, len(y.shape) - 1, *axes)) if channels_first else y

    def _convolve_blocks(self, x, **options):
        plan = self.factorization
        leading = ops.shape(x)[:-1]
        padding = plan.padded_input_dim - plan.input_dim
        if padding:
            x = ops.reshape(x, (*leading, plan.blocks, plan.input_dim))
            x = ops.pad(x, ((0, 0),) * (len(leading) + 1) + ((0, padding),))
        x = ops.reshape(x, (*leading, plan.blocks, *plan.input_factors))
        left, right = self.factors()
        y = convolve(x, left, right, self.order, plan.blocks, **options)
        leading = ops.shape(y)[:-3]
        if plan.padded_output_dim != plan.output_dim:
            y = ops.reshape(y, (*leading, plan.blocks, plan.padded_output_dim))
            y = y[..., : plan.output_dim]
        return ops.reshape(y, (*leading, plan.blocks * plan.output_dim))

    def rows(self, indices):
        """Rows of the kernel: `indices.shape + (output_dim,)`."""
        if self.materialized:
            return ops.take(self.materialize(), indices, axis=0)
        rows = products.rows(indices, *self.factors())
        return _restore(rows, _known_shape(indices), self.factorization)

    def assign(self, kernel):
        """Stores the Kronecker sum that is nearest to a full kernel."""
        self.assign_factors(*nearest_kronecker_sum(kernel, self.factorization))

    def fit(self, statistics, centred):
        """Stores the Kronecker sum that is fitted to examples.

        Args:
            statistics: one of `keras_bilinear.kronecker.fit` for each block.
            centred: whether a bias takes the means.

        Returns:
            For each block what is to be added to the bias, side by side.
        """
        self._fit(statistics, centred)
        if not centred:
            return 0.0
        plan = self.factorization
        kernel = ops.convert_to_numpy(self.materialize()).astype("float64")
        kernel = kernel.reshape(-1, len(statistics), plan.output_dim)
        means = [one.means() for one in statistics]
        return np.concatenate(
            [target - input @ kernel[:, i] for i, (input, target) in enumerate(means)]
        )

    def _fit(self, statistics, centred):
        fit = fit_kronecker_sum(statistics, self.factorization, centred)
        self.assign_factors(fit.left, fit.right)

    def read_factors(self):
        """Left and right kernel as float64 arrays, with their share of the gain."""
        gain = math.sqrt(self.gain)
        arrays = (ops.convert_to_numpy(one).astype("float64") for one in (self.left, self.right))
        return tuple(gain * array for array in arrays)

    def assign_factors(self, left, right):
        """Stores arrays such as `read_factors` gives."""
        for variable, values in ((self.left, left), (self.right, right)):
            # NumPy has no bfloat16, and not every backend rounds float64 to it.
            dtype = "float64" if variable.dtype == "float64" else "float32"
            variable.assign((values / math.sqrt(self.gain)).astype(dtype))


def _scale_gradient(x, scale):
    """`x` itself, bit for bit, but with its gradient multiplied by `scale`."""
    constant = ops.stop_gradient(x)
    return ops.add(constant, ops.multiply(ops.subtract(x, constant), scale))


def _known_shape(x, axes=None):
    """Leading dimensions of `x`, with `-1` for one that is not known."""
    static = x.shape[:axes]
    if sum(size is None for size in static) > 1:
        return ops.shape(x)[:axes]
    return tuple(-1 if size is None else size for size in static)


def _restore(y, leading, factorization):
    """Cuts the padding off `(n, padded_output_dim)` and gives it its leading dimensions back."""
    if factorization.padded_output_dim != factorization.output_dim:
        y = y[:, : factorization.output_dim]
    return y if len(leading) == 1 else ops.reshape(y, (*leading, factorization.output_dim))


class GateKernel(KroneckerKernel):
    """The kernels of a cell's gates, side by side as in the stock cell, each a Kronecker sum."""

    def materialize(self, gates=None):
        """The kernel of all gates, or of some, of `(input_dim, gates * units)`."""
        return self.full(*self.factors(), gates)

    def full(self, left, right, gates=None):
        plan = self.factorization
        kernel = products.materialize_gates(*self._pick(left, right, gates))
        kernel = kernel[: plan.input_dim, :, : plan.output_dim]
        return ops.reshape(kernel, (plan.input_dim, -1))

    def _pick(self, left, right, gates):
        """The factors of some gates that are neighbours, or of all."""
        if not gates or len(gates) == self.factorization.blocks:
            return left, right
        return left[gates[0] : gates[-1] + 1], right[gates[0] : gates[-1] + 1]

    def projection(self, gates=None):
        """A function that multiplies an `x` of any rank by the kernels of all gates, or of some.

        It returns one tensor for each gate. What depends on the factors alone
        is computed here, once, and not at each call of the function.
        """
        plan = self.factorization
        gates = gates or range(plan.blocks)
        if self.materialized:
            kernel = self.materialize(gates)
            return lambda x: split_blocks(ops.matmul(x, kernel), len(gates))
        left, right = self._pick(*self.factors(), gates)
        return self._with_padding(products.projection(left, right, self.order), plan)

    def assign(self, kernel):
        plan = self.factorization
        self._assign_gates(
            nearest_kronecker_sum(block, plan.block)
            for block in np.split(kernel, plan.blocks, axis=1)
        )

    def _fit(self, statistics, centred):
        fits = [fit_kronecker_sum([one], self.factorization.block, centred) for one in statistics]
        self._assign_gates((fit.left, fit.right) for fit in fits)

    def _assign_gates(self, pairs):
        self.assign_factors(*(np.stack(side) for side in zip(*pairs, strict=True)))


def split_blocks(x, count):
    return [x] if count == 1 else ops.split(x, count, axis=-1)
