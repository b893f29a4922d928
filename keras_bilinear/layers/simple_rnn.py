import keras
from keras import ops

from keras_bilinear.layers.converter import register
from keras_bilinear.layers.recurrent import BilinearCell, BilinearRNN, RecurrentConverter


@register(keras.layers.SimpleRNNCell, converter=RecurrentConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearSimpleRNNCell(BilinearCell, keras.layers.SimpleRNNCell):
    """One step of a simple recurrent layer whose kernels are sums of Kronecker products.

    It stands for `keras.layers.SimpleRNNCell` and takes its arguments, and `rank`,
    `recurrent_rank`, `input_factors`, `output_factors` and `implementation`, by
    name. What they mean says `keras_bilinear.layers.recurrent.BilinearCell`.

    Example:

    >>> layer = keras.layers.RNN(BilinearSimpleRNNCell(64, rank=2))
    >>> layer(np.ones((2, 10, 36), "float32")).shape == (2, 64)
    True

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    gates = 1

    def dropout_masks(self, inputs, state, training):
        # Unlike the others, the stock cell takes a rate of 1 at its word.
        if not training:
            return None, None
        return self.get_dropout_mask(inputs), self.get_recurrent_dropout_mask(state)

    def make_step(self, mask):
        project = self._projection(self._recurrent_kernel, mask)

        def step(x, states):
            ((x,), (recurrent,)) = x, project(states[0])
            output = ops.add(x, recurrent)
            if self.activation is not None:
                output = self.activation(output)
            return output, [output]

        return step


@register(keras.layers.SimpleRNN, converter=RecurrentConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearSimpleRNN(keras.layers.SimpleRNN, BilinearRNN):
    """A simple recurrent layer whose kernels are sums of Kronecker products, each gate's its own.

    It stands for `keras.layers.SimpleRNN` and takes its arguments, and `rank`,
    `recurrent_rank`, `input_factors`, `output_factors` and `implementation`, by
    name. What they mean says `keras_bilinear.layers.recurrent.BilinearCell`.

    Input shape:
        `(batch_size, timesteps, features)`.

    Output shape:
        `(batch_size, units)`, or `(batch_size, timesteps, units)` with
        `return_sequences=True`; with `return_state=True` a tuple of this and
        the states.

    Example:

    >>> layer = BilinearSimpleRNN(64, rank=2)
    >>> layer(np.ones((2, 10, 36), "float32")).shape == (2, 64)
    True
    >>> layer.count_params()  # a SimpleRNN layer has 6,464
    512

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    cell_class = BilinearSimpleRNNCell
    __init__ = BilinearRNN.__init__
