import operator
from functools import partial

import keras
from keras import ops

from keras_bilinear.layers.converter import register
from keras_bilinear.layers.recurrent import BilinearCell, BilinearRNN, RecurrentConverter


@register(keras.layers.LSTMCell, converter=RecurrentConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearLSTMCell(BilinearCell, keras.layers.LSTMCell):
    """One step of a long short-term memory whose kernels are sums of Kronecker products.

    It stands for `keras.layers.LSTMCell` and takes its arguments, and `rank`,
    `recurrent_rank`, `input_factors`, `output_factors` and `implementation`, by
    name. What they mean says `keras_bilinear.layers.recurrent.BilinearCell`.

    Example:

    >>> layer = keras.layers.RNN(BilinearLSTMCell(64, rank=2))
    >>> layer(np.ones((2, 10, 36), "float32")).shape == (2, 64)
    True

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

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


@register(keras.layers.LSTM, converter=RecurrentConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearLSTM(keras.layers.LSTM, BilinearRNN):
    """A long short-term memory whose kernels are sums of Kronecker products, each gate's its own.

    It stands for `keras.layers.LSTM` and takes its arguments, and `rank`,
    `recurrent_rank`, `input_factors`, `output_factors` and `implementation`, by
    name. What they mean says `keras_bilinear.layers.recurrent.BilinearCell`.

    Input shape:
        `(batch_size, timesteps, features)`.

    Output shape:
        `(batch_size, units)`, or `(batch_size, timesteps, units)` with
        `return_sequences=True`; with `return_state=True` a tuple of this and
        the states.

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
