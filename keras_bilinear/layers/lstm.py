import operator
from functools import partial

import keras
from keras import ops

from keras_bilinear.layers.converter import register
from keras_bilinear.layers.recurrent import BilinearCell, BilinearRNN, RecurrentConverter


class LSTMGates(BilinearCell):
    """The gates of a long short-term memory: what its cells, dense or convolutional, share."""

    gates = 4

    def _bias_initializer(self):
        if not self.unit_forget_bias:
            return self.bias_initializer

        def initialize(shape, dtype=None):
            units = shape[0] // 4
            first, others = (
                self.bias_initializer((size,), dtype=dtype) for size in (units, 2 * units)
            )
            return ops.concatenate([first, ops.ones((units,), dtype), others])

        return initialize

    def make_step(self, mask):
        project = self._projection(self._recurrent_kernel, mask)

        def step(x, states):
            state, carry = states
            i, f, c, o = map(operator.add, x, project(state))
            carry = self.recurrent_activation(f) * carry
            carry = carry + self.recurrent_activation(i) * self.activation(c)
            output = self.recurrent_activation(o) * self.activation(carry)
            return output, [output, carry]

        return step


@register(keras.layers.LSTMCell, converter=RecurrentConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearLSTMCell(LSTMGates, keras.layers.LSTMCell):
    """One step of a long short-term memory with bilinear kernels.

    The cell stands for `keras.layers.LSTMCell` and takes its arguments. Each gate's
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
        unit_forget_bias: whether the bias of the forget gate starts at 1.
        kernel_regularizer: regularizer of each factor of the input kernel.
        recurrent_regularizer: regularizer of each factor of the recurrent kernel.
        bias_regularizer: regularizer of the bias.
        kernel_constraint: constraint of each factor of the input kernel.
        recurrent_constraint: constraint of each factor of the recurrent kernel.
        bias_constraint: constraint of the bias.
        dropout: float from 0 to 1, share of the inputs that training drops.
        recurrent_dropout: float from 0 to 1, share of the state that training drops.
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
        states: the hidden and the carry state, two tensors of shape `(batch_size, units)`.
        training: whether to drop inputs and states.

    Raises:
        ValueError: if an argument is not valid, or if the number of features is not known.

    Example:

    >>> layer = keras.layers.RNN(BilinearLSTMCell(64, rank=2))
    >>> layer(np.ones((2, 10, 36), "float32")).shape == (2, 64)
    True

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """


@register(keras.layers.LSTM, converter=RecurrentConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearLSTM(keras.layers.LSTM, BilinearRNN):
    """A long short-term memory with bilinear kernels.

    The layer stands for `keras.layers.LSTM` and takes its arguments. Each gate's input
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

    >>> layer = BilinearLSTM(64, rank=2)
    >>> layer(np.ones((2, 10, 36), "float32")).shape == (2, 64)
    True
    >>> layer.count_params()  # an LSTM layer has 25,856
    2048

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    cell_class = BilinearLSTMCell
    __init__ = BilinearRNN.__init__

    def inner_loop(self, sequences, initial_state, mask, training=False):
        loop = super().inner_loop if self._runs_on_gpu() else partial(BilinearRNN.inner_loop, self)
        return loop(sequences, initial_state, mask, training=training)
