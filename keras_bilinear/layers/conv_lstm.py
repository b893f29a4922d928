import types
from collections.abc import Callable, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops, tree

from keras_bilinear.keras_private import graph
from keras_bilinear.keras_private.gradients import gradients as gradients_of
from keras_bilinear.kronecker import Tensor, products
from keras_bilinear.kronecker.convolution import convolve_gates
from keras_bilinear.kronecker.factorization import Factorization, recurrent_input_factors
from keras_bilinear.layers.base import convert
from keras_bilinear.layers.conv import (
    MOST_PATCHES,
    check_pattern,
    choose_patches,
    choose_positions,
    count_positions,
    split_window,
)
from keras_bilinear.layers.converter import check_width, register
from keras_bilinear.layers.kernel import GateKernel
from keras_bilinear.layers.lstm import LSTMGates
from keras_bilinear.layers.recurrent import RECURRENT, BilinearRNN, RecurrentConverter


class ConvLSTMConverter(RecurrentConverter):
    """Between the convolutional LSTMs of Keras and `BilinearConvLSTM1D` and `2D`."""

    width = None

    def input_shape(self, layer: keras.Layer) -> tuple:
        *batch, channels = super().input_shape(layer)
        positions = layer.cell.spatial_dims
        channels_last = layer.data_format == "channels_last"
        of_step = (*positions, channels) if channels_last else (channels, *positions)
        return (*batch, *of_step)

    def rows(
        self,
        full: keras.Layer,
        inputs: np.ndarray,
        mask: Any = None,
        initial_state: Any = None,
        **call: Any,
    ) -> dict[str, list]:
        cell, axis = full.cell, -1 if full.data_format == "channels_last" else 2
        check_width(full, inputs, self.input_dim(full), axis)
        inputs, states = self.steps(full, inputs, mask, initial_state)
        if axis == 2:
            inputs, states = (np.moveaxis(x, 1, -1) for x in (inputs, states))
        ones = (1,) * len(cell.kernel_size)
        recurrent = types.SimpleNamespace(
            kernel_size=cell.kernel_size, strides=ones, dilation_rate=ones, padding="same"
        )
        patches = {
            "kernel": choose_patches(cell, inputs, MOST_PATCHES),
            "recurrent_kernel": choose_patches(recurrent, states, MOST_PATCHES),
        }
        gates = self.count_blocks(full)
        return {name: [rows.reshape(len(rows), -1)] * gates for name, rows in patches.items()}

    def gradients(
        self,
        full: keras.Layer,
        inputs: np.ndarray,
        rows: dict[str, list],
        gradients: Any,
        mask: Any = None,
        initial_state: Any = None,
        **call: Any,
    ) -> dict[str, list]:
        cell, axis = full.cell, -1 if full.data_format == "channels_last" else 2
        gates = self.count_blocks(full)
        kernel, *others = cell.get_weights()
        state, _ = cell.compute_output_shape((len(inputs), *inputs.shape[2:]))
        positions = np.delete(inputs.shape, [0, 1, axis])
        places, index = _place_that_passes_on(
            cell, positions, np.delete(state, [0, axis if axis < 0 else axis - 1])
        )
        # What is added to the products of the input kernel comes in as further channels. One
        # place of the window passes them on as they are.
        passing = np.zeros((*kernel.shape[:-2], kernel.shape[-1], kernel.shape[-1]), "float32")
        passing[places] = np.eye(kernel.shape[-1])
        runner = self._runner(full)
        shape = [None, *inputs.shape[1:]]
        shape[axis] += kernel.shape[-1]
        runner.build(tuple(shape))
        runner.cell.set_weights([np.concatenate([kernel, passing], axis=-2), *others])
        tensor = ops.convert_to_tensor(inputs)

        def run(added):
            with_added = ops.concatenate([tensor, *added], axis=axis)
            return tree.flatten(runner(with_added, mask=mask, initial_state=initial_state))

        shape = [*inputs.shape]
        shape[axis] = kernel.shape[-1]
        found = gradients_of(run, [np.zeros(shape, "float32")], lambda _: tree.flatten(gradients))
        found = np.moveaxis(found[0], axis, -1)[:, :, *np.ix_(*index)]
        if full.go_backwards:
            found = found[:, ::-1]
        found = choose_positions(found[self._seen(full, inputs, mask)])
        found = np.split(found, gates, axis=-1)
        return {"kernel": found, "recurrent_kernel": found}

    def applications(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        examples, steps, *of_step = inputs
        state, _ = layer.cell.compute_output_shape((examples, *of_step))
        return steps * count_positions(layer, state)


def _place_that_passes_on(cell, positions, new_positions):
    """A place of the window of a convolution, and the inputs that it takes to the outputs.

    Args:
        cell: what has the options of the convolution.
        positions: sizes of the inputs.
        new_positions: sizes of the outputs.

    Returns:
        An index of the window, and for each axis the position of the input for each output.
    """
    places, index = [], []
    for window, stride, rate, size, new_size in zip(
        cell.kernel_size, cell.strides, cell.dilation_rate, positions, new_positions, strict=True
    ):
        missing = max((new_size - 1) * stride + (window - 1) * rate + 1 - size, 0)
        before = missing // 2 if cell.padding == "same" else 0
        place = -(-before // rate)
        places.append(place)
        index.append(np.arange(new_size) * stride + place * rate - before)
    return tuple(places), index


class ConvGateKernel(GateKernel):
    """The kernels of a cell's gates, each a convolution and a Kronecker sum.

    Args:
        layer: the layer that owns the variables.
        factorization: the shapes.
        initializer: initializer of the full kernel of all gates.
        options: `strides`, `padding`, `dilation_rate` and `data_format` of the convolution.
        **kwargs: other arguments of `KroneckerKernel`.
    """

    def __init__(
        self,
        layer: keras.Layer,
        factorization: Factorization,
        initializer: Callable,
        options: dict[str, Any],
        **kwargs: Any,
    ):
        super().__init__(layer, factorization, initializer, strides=options["strides"], **kwargs)
        self._options = dict(options)
        self._channels_first = self._options.pop("data_format") == "channels_first"

    def full(self, left: Tensor, right: Tensor, gates: Sequence[int] | None = None) -> Tensor:
        factorization = self.factorization
        left, right = self._pick(left, right, gates)
        kernels = [products.materialize(left[i], right[i]) for i in range(left.shape[0])]
        kernels = [
            kernel[..., : factorization.input_dim, : factorization.output_dim] for kernel in kernels
        ]
        return ops.concatenate(kernels, axis=-1)

    def projection(
        self, gates: Sequence[int] | None = None
    ) -> Callable[[Tensor], Sequence[Tensor]]:
        """Prepares convolutions by the kernels of all gates, or of some gates that are neighbours.

        What depends on the factors alone is computed here, once, and not at each call of the
        function.

        Args:
            gates: numbers of the gates; `None` for all.

        Returns:
            A function that takes `(..., n, *positions, input_dim)`, or with the channels before
            the positions, and returns a tensor for each gate.
        """
        gates = gates or range(self.factorization.blocks)
        convolve = self._materialized(gates) if self.materialized else self._factorized(gates)
        axes = len(self.factorization.window) + 2

        def apply(x):
            before = ops.shape(x)[: 1 - axes]
            if len(before) == 1:
                return convolve(x)
            outputs = convolve(ops.reshape(x, (-1, *ops.shape(x)[1 - axes :])))
            return [ops.reshape(y, (*before, *ops.shape(y)[1:])) for y in outputs]

        return apply

    def _materialized(self, gates):
        kernel, axis = self.materialize(gates), 1 if self._channels_first else -1
        data_format = "channels_first" if self._channels_first else "channels_last"

        def convolve(x):
            y = ops.conv(x, ops.cast(kernel, x.dtype), data_format=data_format, **self._options)
            return ops.split(y, len(gates), axis=axis)

        return convolve

    def _factorized(self, gates):
        factorization = self.factorization
        left, right = self._pick(*self.factors(), gates)
        padding = ((0, 0),) * (len(factorization.window) + 1)
        padding = (*padding, (0, factorization.padded_input_dim - factorization.input_dim))

        def restore(y, dtype):
            y = ops.reshape(y, (*ops.shape(y)[:-3], factorization.padded_output_dim))
            y = ops.cast(y[..., : factorization.output_dim], dtype)
            return ops.moveaxis(y, -1, 1) if self._channels_first else y

        def convolve(x):
            dtype = x.dtype
            if self._channels_first:
                x = ops.moveaxis(x, 1, -1)
            if factorization.padded_input_dim > factorization.input_dim:
                x = ops.pad(x, padding)
            x = ops.reshape(x, (*ops.shape(x)[:-1], 1, *factorization.input_factors))
            outputs = convolve_gates(x, left, right, self.order, **self._options)
            return [restore(y, dtype) for y in outputs]

        return convolve


class BilinearConvLSTMCell(LSTMGates, graph.conv_lstm_cell):
    """One step of a convolutional long short-term memory with bilinear kernels.

    The gates lie side by side in both kernels of the stock cell. In the bilinear cell each gate
    has factors of its own. Subclasses fix the number of dimensions.

    Args:
        *args: arguments of the stock cell, but for the number of dimensions.
        pattern: which factors have the window: `"channel"` the right factor, `"spatial"` the
            left factor its first axis and the right factor the others; `"auto"` is `"channel"`.
        **kwargs: other arguments of the stock cell and of `BilinearCell`.
    """

    own_arguments = (*RECURRENT, "pattern")
    units_argument = "filters"
    dimensions: int

    def __init__(self, *args, pattern: str = "auto", **kwargs):
        super().__init__(self.dimensions, *args, **kwargs)
        check_pattern(pattern)
        self.pattern = pattern

    def factorize(self, input_shape: tuple) -> dict[str, Factorization]:
        *positions, channels = self._positions_and_channels(input_shape)
        if None in (*positions, channels):
            raise ValueError(
                f"The positions and the channels of the input of `{type(self).__name__}` must be "
                f"known. Received: input_shape={input_shape}"
            )
        # Refuses sizes that leave no output.
        self.compute_output_shape((None, *input_shape[1:]))
        blocks = {"blocks": self.gates, "share_right": False}
        windows = split_window(self.kernel_size, self.pattern)
        kernel = self.factorization_of(channels, self.filters, **blocks, **windows)
        # The recurrent kernel gets the outputs of the cell, and so has their factors.
        factors = kernel.output_factors
        recurrent_kernel = self.factorization_of(
            self.filters,
            self.filters,
            input_factors=recurrent_input_factors(self.filters, factors),
            output_factors=factors,
            rank=self.recurrent_rank or self.rank,
            **blocks,
            **windows,
        )
        return {"kernel": kernel, "recurrent_kernel": recurrent_kernel}

    def build(self, input_shape: tuple, states_shape: tuple | None = None):
        super().build(input_shape)
        *positions, self.input_dim = self._positions_and_channels(input_shape)
        self.spatial_dims = tuple(positions)

    def _positions_and_channels(self, input_shape):
        _, *of_step = input_shape
        return of_step if self.data_format == "channels_last" else (*of_step[1:], of_step[0])

    def _kernel_options(self, name: str) -> dict[str, Any]:
        ones = (1,) * self.dimensions
        options = {"strides": ones, "padding": "same", "dilation_rate": ones}
        if name == "kernel":
            options = {option: getattr(self, option) for option in options}
        options["data_format"] = self.data_format
        return {"kernel_class": ConvGateKernel, "options": options}

    @property
    def kernel(self):
        """The input kernel that the factors stand for, a new tensor of full size."""
        return self._built_kernel().materialize()

    def input_projection(self, mask):
        project = self._projection(self._kernel, mask)
        if self.bias is None:
            return project
        biases = ops.split(ops.convert_to_tensor(self.bias), self.gates)
        if self.data_format == "channels_first":
            biases = [ops.reshape(bias, (-1, *(1,) * self.dimensions)) for bias in biases]
        return lambda inputs: [
            ops.add(block, bias) for block, bias in zip(project(inputs), biases, strict=True)
        ]

    def projects_in_steps(self, batch_size):
        del batch_size
        return False  # One convolution of all steps is always as fast.


class BilinearConvLSTM1DCell(BilinearConvLSTMCell):
    """The cell of `BilinearConvLSTM1D`."""

    dimensions = 1


class BilinearConvLSTM2DCell(BilinearConvLSTMCell):
    """The cell of `BilinearConvLSTM2D`."""

    dimensions = 2


class BilinearConvLSTM(BilinearRNN):
    """A long short-term memory of convolutions whose kernels are sums of Kronecker products.

    `BilinearConvLSTM1D` and `BilinearConvLSTM2D` fix the number of dimensions and explain the
    arguments. The inputs of all steps are convolved at once, before the loop, with
    the steps folded into the batch; in the loop, only the state is. Kernels that are
    materialized are formed once for each call.
    """

    own_arguments = BilinearConvLSTMCell.own_arguments

    def __init__(
        self,
        *args,
        rank: int = 1,
        recurrent_rank: int | None = None,
        input_factors: Sequence[int] | None = None,
        output_factors: Sequence[int] | None = None,
        implementation: str = "auto",
        pattern: str = "auto",
        **kwargs,
    ):
        own = {
            "rank": rank,
            "recurrent_rank": recurrent_rank,
            "input_factors": input_factors,
            "output_factors": output_factors,
            "implementation": implementation,
            "pattern": pattern,
        }
        self._set_up(args, kwargs, own)

    @classmethod
    def from_full(
        cls,
        layer: keras.layers.Layer,
        rank: int = 1,
        recurrent_rank: int | None = None,
        input_factors: Sequence[int] | None = None,
        output_factors: Sequence[int] | None = None,
        implementation: str = "auto",
        calibration_data=None,
        pattern: str = "auto",
    ) -> Self:
        """Makes a bilinear layer from a built full layer, gate by gate.

        The factors are the Kronecker sums nearest to the kernels of the gates. With calibration
        data, factors and bias are fitted such that the outputs of both convolutions differ
        least on them; the recurrent kernels on the states that the full layer reaches.

        Args:
            layer: a built layer of exactly the stock class. It stays as it is.
            rank: number of Kronecker terms.
            recurrent_rank: number of terms of each gate's recurrent kernel; `None` takes
                `rank`.
            input_factors: `(c1, c2)`; `None` chooses them.
            output_factors: `(u1, u2)`; `None` chooses them.
            implementation: `"auto"`, `"factorized"` or `"materialized"`.
            calibration_data: sequences, an array or an iterable of arrays.
            pattern: `"auto"`, `"channel"` or `"spatial"`.

        Returns:
            A built layer with the same name and options.

        Raises:
            TypeError: if `layer` is not of the stock class, or `calibration_data` neither an
                array nor iterable.
            ValueError: if `layer` is not built or holds NaN or infinite weights, if the
                calibration data are no finite inputs of the layer, or if another argument
                is not valid.
        """
        return convert(
            cls,
            layer,
            calibration_data,
            rank=rank,
            recurrent_rank=recurrent_rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
            pattern=pattern,
        )


@register(keras.layers.ConvLSTM1D, converter=ConvLSTMConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearConvLSTM1D(keras.layers.ConvLSTM1D, BilinearConvLSTM):
    """A long short-term memory of convolutions over one axis, with Kronecker sums for kernels.

    The layer stands for `keras.layers.ConvLSTM1D` and takes its arguments. The input kernel and
    the recurrent kernel have four gates each, and the kernel of each gate is a Kronecker sum
    of its own, like the kernel of `keras_bilinear.BilinearConv1D`.
    The inputs of all steps are convolved at once, before the loop over the steps.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer.
        strides: an integer.
        padding: `"valid"` or `"same"`, of the inputs. The state is padded always.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        dilation_rate: an integer. Strides and dilation above 1 exclude each other.
        activation: activation function of the output; `None` applies none.
        recurrent_activation: activation function of the gates; `None` applies none.
        use_bias: whether to add a bias vector.
        kernel_initializer: initializer of the full input kernel. The factors start such that
            their product has the variance that it gives.
        recurrent_initializer: initializer of the full recurrent kernel, likewise.
        bias_initializer: initializer of the bias.
        unit_forget_bias: whether the bias of the forget gate starts at 1.
        kernel_regularizer: regularizer of each factor of the input kernel.
        recurrent_regularizer: regularizer of each factor of the recurrent kernel.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        kernel_constraint: constraint of each factor of the input kernel.
        recurrent_constraint: constraint of each factor of the recurrent kernel.
        bias_constraint: constraint of the bias.
        dropout: float from 0 to 1, share of the inputs that training drops.
        recurrent_dropout: float from 0 to 1, share of the state that training drops.
        seed: integer, seed of the dropout; `None` draws one.
        return_sequences: whether to return the outputs of all steps, not only the last one.
        return_state: whether to return the last state as well.
        go_backwards: whether to read the sequence from its end, and return it reversed.
        stateful: whether the next batch starts with the last state of this batch.
        unroll: whether to write the steps out instead of running a loop.
        rank: positive integer, number of Kronecker terms of each gate's input kernel.
        recurrent_rank: positive integer, number of terms of each gate's recurrent kernel;
            `None` takes `rank`.
        input_factors: `(c1, c2)` with a product of at least the input channels; `None`
            chooses both splits together: the near-square pair whose kernel can have the
            highest matrix rank.
        output_factors: `(u1, u2)` with a product of at least `filters`; `None` chooses both
            splits together. The recurrent kernel has them on both sides, reversed on the side
            of the inputs when one factor is 1 (low rank).
        implementation: `"factorized"` applies one factor after the other, `"materialized"`
            forms the kernels first, once for each call of the layer; `"auto"` takes what
            was measured to be faster for convolutions, and forms them on a GPU.
        pattern: which factors have the window. `"channel"` gives it to the right factors;
            `"spatial"` gives its first axis to the left factors and the others to the right
            factors; `"auto"` is `"channel"`.
        **kwargs: other arguments of the stock layer.

    Input shape:
        `(batch_size, timesteps, rows, channels)`, or with the channels before the
        positions, which must be known.

    Output shape:
        `(batch_size, new_rows, filters)`, likewise; with `return_sequences=True`
        with the time steps after the batch; with `return_state=True` a tuple of this and the
        states.

    Raises:
        ValueError: if an argument is not valid, as in the stock layer, or if the input does
            not fit.

    Example:

    >>> layer = BilinearConvLSTM1D(32, 3, padding="same", rank=2)
    >>> layer(np.ones((2, 5, 8, 16), "float32")).shape == (2, 8, 32)
    True
    >>> layer.count_params()  # a ConvLSTM1D layer has 18,560
    2688

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    cell_class = BilinearConvLSTM1DCell
    __init__ = BilinearConvLSTM.__init__


@register(keras.layers.ConvLSTM2D, converter=ConvLSTMConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearConvLSTM2D(keras.layers.ConvLSTM2D, BilinearConvLSTM):
    """A long short-term memory of convolutions over two axes, with Kronecker sums for kernels.

    The layer stands for `keras.layers.ConvLSTM2D` and takes its arguments. The input kernel and
    the recurrent kernel have four gates each, and the kernel of each gate is a Kronecker sum
    of its own, like the kernel of `keras_bilinear.BilinearConv2D`.
    The inputs of all steps are convolved at once, before the loop over the steps.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer or one for each axis.
        strides: an integer or one for each axis.
        padding: `"valid"` or `"same"`, of the inputs. The state is padded always.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        dilation_rate: an integer or one for each axis. Strides and dilation above 1 exclude
            each other.
        activation: activation function of the output; `None` applies none.
        recurrent_activation: activation function of the gates; `None` applies none.
        use_bias: whether to add a bias vector.
        kernel_initializer: initializer of the full input kernel. The factors start such that
            their product has the variance that it gives.
        recurrent_initializer: initializer of the full recurrent kernel, likewise.
        bias_initializer: initializer of the bias.
        unit_forget_bias: whether the bias of the forget gate starts at 1.
        kernel_regularizer: regularizer of each factor of the input kernel.
        recurrent_regularizer: regularizer of each factor of the recurrent kernel.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        kernel_constraint: constraint of each factor of the input kernel.
        recurrent_constraint: constraint of each factor of the recurrent kernel.
        bias_constraint: constraint of the bias.
        dropout: float from 0 to 1, share of the inputs that training drops.
        recurrent_dropout: float from 0 to 1, share of the state that training drops.
        seed: integer, seed of the dropout; `None` draws one.
        return_sequences: whether to return the outputs of all steps, not only the last one.
        return_state: whether to return the last state as well.
        go_backwards: whether to read the sequence from its end, and return it reversed.
        stateful: whether the next batch starts with the last state of this batch.
        unroll: whether to write the steps out instead of running a loop.
        rank: positive integer, number of Kronecker terms of each gate's input kernel.
        recurrent_rank: positive integer, number of terms of each gate's recurrent kernel;
            `None` takes `rank`.
        input_factors: `(c1, c2)` with a product of at least the input channels; `None`
            chooses both splits together: the near-square pair whose kernel can have the
            highest matrix rank.
        output_factors: `(u1, u2)` with a product of at least `filters`; `None` chooses both
            splits together. The recurrent kernel has them on both sides, reversed on the side
            of the inputs when one factor is 1 (low rank).
        implementation: `"factorized"` applies one factor after the other, `"materialized"`
            forms the kernels first, once for each call of the layer; `"auto"` takes what
            was measured to be faster for convolutions, and forms them on a GPU.
        pattern: which factors have the window. `"channel"` gives it to the right factors;
            `"spatial"` gives its first axis to the left factors and the others to the right
            factors; `"auto"` is `"channel"`.
        **kwargs: other arguments of the stock layer.

    Input shape:
        `(batch_size, timesteps, rows, columns, channels)`, or with the channels before the
        positions, which must be known.

    Output shape:
        `(batch_size, new_rows, new_columns, filters)`, likewise; with `return_sequences=True`
        with the time steps after the batch; with `return_state=True` a tuple of this and the
        states.

    Raises:
        ValueError: if an argument is not valid, as in the stock layer, or if the input does
            not fit.

    Example:

    >>> layer = BilinearConvLSTM2D(32, 3, padding="same", rank=2)
    >>> layer(np.ones((2, 5, 8, 8, 16), "float32")).shape == (2, 8, 8, 32)
    True
    >>> layer.count_params()  # a ConvLSTM2D layer has 55,424
    7296

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    cell_class = BilinearConvLSTM2DCell
    __init__ = BilinearConvLSTM.__init__
