import operator
from functools import partial

import keras
import numpy as np
from keras import ops

from keras_bilinear.layers.converter import register
from keras_bilinear.layers.recurrent import BilinearCell, BilinearRNN, RecurrentConverter


class GRUConverter(RecurrentConverter):
    """Between `keras.layers.GRU`, or its cell, and `BilinearGRU`, or its cell."""

    def add_to_bias(
        self, bilinear: keras.Layer, bias: np.ndarray, missing: np.ndarray, index: int
    ) -> np.ndarray:
        if bias.ndim == 1:
            return bias + missing
        # With `reset_after` each kernel has a bias of its own.
        return bias + missing * (np.arange(2) == index)[:, None]

    def state_rows(self, cell: keras.Layer, inputs: np.ndarray, states: np.ndarray) -> list:
        rows = super().state_rows(cell, inputs, states)
        if cell.reset_after:
            return rows
        # The candidate sees the state as the reset gate leaves it.
        return [*rows[:2], states * _reset_gate(cell, inputs, states)]

    def state_gradients(self, cell: keras.Layer, rows: dict[str, list], gradients: list) -> list:
        if not cell.reset_after:
            return gradients
        # The reset gate multiplies what the recurrent kernel makes for the candidate.
        reset = _reset_gate(cell, rows["kernel"][0], rows["recurrent_kernel"][0])
        return [*gradients[:2], gradients[2] * reset]


def _reset_gate(cell, inputs, states):
    """What the reset gate of a full cell is in some steps, `(steps, units)`."""
    weights = (cell.kernel, cell.recurrent_kernel, cell.bias)
    kernel, recurrent, bias = (
        0.0 if values is None else ops.convert_to_tensor(values)[..., cell.units : 2 * cell.units]
        for values in weights
    )
    if cell.bias is not None and cell.reset_after:  # a bias for each of the kernels
        bias = ops.sum(bias, axis=0)
    reset = ops.add(ops.matmul(inputs, kernel), ops.matmul(states, recurrent))
    return ops.convert_to_numpy(cell.recurrent_activation(ops.add(reset, bias)))


@register(keras.layers.GRUCell, converter=GRUConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearGRUCell(BilinearCell, keras.layers.GRUCell):
    """One step of a gated recurrent unit with bilinear kernels.

    The cell stands for `keras.layers.GRUCell` and takes its arguments. Each gate's
    input kernel and recurrent kernel are sums of Kronecker products. It runs in
    `keras.layers.RNN`.

    Args:
        units: positive integer, number of units: the width of the output.
        activation: activation function of the output; `None` applies none.
        recurrent_activation: activation function of the gates; `None` applies none.
        use_bias: whether to add a bias vector.
        kernel_initializer: initializer of the full input kernel. The factors start such that
            their product has the variance that it gives.
        recurrent_initializer: initializer of the full recurrent kernel, likewise.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of each factor of the input kernel.
        recurrent_regularizer: regularizer of each factor of the recurrent kernel.
        bias_regularizer: regularizer of the bias.
        kernel_constraint: constraint of each factor of the input kernel.
        recurrent_constraint: constraint of each factor of the recurrent kernel.
        bias_constraint: constraint of the bias.
        dropout: float from 0 to 1, share of the inputs that training drops.
        recurrent_dropout: float from 0 to 1, share of the state that training drops.
        reset_after: whether the reset gate acts after the product with the recurrent kernel
            (as in cuDNN) or before.
        seed: integer, seed of the dropout; `None` draws one.
        rank: positive integer, number of Kronecker terms of each gate's input kernel.
        recurrent_rank: positive integer, number of terms of each gate's recurrent kernel;
            `None` takes `rank`.
        input_factors: `(d1, d2)` with a product of at least the number of features; `None`
            chooses near-square factors.
        output_factors: `(u1, u2)` with a product of at least `units`; `None` chooses
            near-square factors. The recurrent kernel has them on both sides, reversed on
            the side of the inputs when one factor is 1 (low rank).
        implementation: `"factorized"` applies one factor after the other; `"materialized"`
            forms the kernels, once for each call; `"auto"` takes what was measured to be
            faster for batches and, on a GPU, forms the kernels and runs the stock layer's
            loop.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: a tensor of shape `(batch_size, features)`.
        states: a tensor of shape `(batch_size, units)`, or a list with it.
        training: whether to drop inputs and states.

    Raises:
        ValueError: if an argument is not valid, or if the number of features is not known.

    Example:

    >>> layer = keras.layers.RNN(BilinearGRUCell(64, rank=2))
    >>> layer(np.ones((2, 10, 36), "float32")).shape == (2, 64)
    True

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    gates = 3

    def _bias_shape(self):
        shape = super()._bias_shape()
        return (2, *shape) if self.reset_after else shape

    def _input_bias(self):
        bias = super()._input_bias()
        return bias[0] if self.reset_after else bias

    def make_step(self, mask):
        kernel = self._recurrent_kernel
        if self.reset_after:
            project = self._projection(kernel, mask)
            bias = None if self.bias is None else ops.split(self.bias[1], 3)

            def candidate(r, state, recurrent):
                return r * recurrent

        else:
            project = self._projection(kernel, mask, (0, 1))
            project_reset = self._projection(kernel, None, (2,))
            bias = None

            def candidate(r, state, recurrent):
                masked = state * mask[2] if mask is not None else state
                return project_reset(r * masked)[0]

        def step(x, states):
            (state,) = states
            recurrent = project(state)
            if bias is not None:
                recurrent = list(map(operator.add, recurrent, bias))
            z = self.recurrent_activation(x[0] + recurrent[0])
            r = self.recurrent_activation(x[1] + recurrent[1])
            new = self.activation(x[2] + candidate(r, state, recurrent[-1]))
            output = new + z * (state - new)
            return output, [output]

        return step


@register(keras.layers.GRU, converter=GRUConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearGRU(keras.layers.GRU, BilinearRNN):
    """A gated recurrent unit with bilinear kernels.

    The layer stands for `keras.layers.GRU` and takes its arguments. Each gate's input
    kernel and recurrent kernel are sums of Kronecker products. Masks, states, dropout
    and `keras.layers.Bidirectional` work as in the stock layer.

    Args:
        units: positive integer, number of units: the width of the output.
        activation: activation function of the output; `None` applies none.
        recurrent_activation: activation function of the gates; `None` applies none.
        use_bias: whether to add a bias vector.
        kernel_initializer: initializer of the full input kernel. The factors start such that
            their product has the variance that it gives.
        recurrent_initializer: initializer of the full recurrent kernel, likewise.
        bias_initializer: initializer of the bias.
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
        reset_after: whether the reset gate acts after the product with the recurrent kernel
            (as in cuDNN) or before.
        use_cudnn: whether to run the stock layer's cuDNN loop: `True`, `False`, or `"auto"`
            where a GPU allows it.
        rank: positive integer, number of Kronecker terms of each gate's input kernel.
        recurrent_rank: positive integer, number of terms of each gate's recurrent kernel;
            `None` takes `rank`.
        input_factors: `(d1, d2)` with a product of at least the number of features; `None`
            chooses near-square factors.
        output_factors: `(u1, u2)` with a product of at least `units`; `None` chooses
            near-square factors. The recurrent kernel has them on both sides, reversed on
            the side of the inputs when one factor is 1 (low rank).
        implementation: `"factorized"` applies one factor after the other; `"materialized"`
            forms the kernels, once for each call; `"auto"` takes what was measured to be
            faster for batches and, on a GPU, forms the kernels and runs the stock layer's
            loop.
        **kwargs: other arguments of the stock layer.

    Call arguments:
        sequences: a tensor of shape `(batch_size, timesteps, features)`.
        initial_state: the states to start with; `None` starts with zeros.
        mask: a boolean tensor of shape `(batch_size, timesteps)`; steps where it is false
            are skipped. `None` skips none.
        training: whether to drop inputs and states.

    Input shape:
        `(batch_size, timesteps, features)`.

    Output shape:
        `(batch_size, units)`, or `(batch_size, timesteps, units)` with
        `return_sequences=True`; with `return_state=True` a tuple of this and
        the states.

    Raises:
        ValueError: if an argument is not valid, or if the number of features is not known.

    Example:

    >>> layer = BilinearGRU(64, rank=2)
    >>> layer(np.ones((2, 10, 36), "float32")).shape == (2, 64)
    True
    >>> layer.count_params()  # a GRU layer has 19,584
    1728

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    cell_class = BilinearGRUCell
    __init__ = BilinearRNN.__init__

    def inner_loop(self, sequences, initial_state, mask, training=False):
        loop = super().inner_loop if self._runs_on_gpu() else partial(BilinearRNN.inner_loop, self)
        return loop(sequences, initial_state, mask, training=training)
