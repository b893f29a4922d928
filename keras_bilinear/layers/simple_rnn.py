import keras
from keras import ops

from keras_bilinear.layers.converter import register
from keras_bilinear.layers.recurrent import BilinearCell, BilinearRNN, RecurrentConverter


@register(keras.layers.SimpleRNNCell, converter=RecurrentConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearSimpleRNNCell(BilinearCell, keras.layers.SimpleRNNCell):
    """One step of a simple recurrent layer with bilinear kernels.

    The cell stands for `keras.layers.SimpleRNNCell` and takes its arguments. Its input
    kernel and its recurrent kernel are sums of Kronecker products. It runs in
    `keras.layers.RNN`.

    Args:
        units: positive integer, number of units: the width of the output.
        activation: activation function of the output; `None` applies none.
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
    """A simple recurrent layer with bilinear kernels.

    The layer stands for `keras.layers.SimpleRNN` and takes its arguments. Its input
    kernel and its recurrent kernel are sums of Kronecker products. Masks, states,
    dropout and `keras.layers.Bidirectional` work as in the stock layer.

    Args:
        units: positive integer, number of units: the width of the output.
        activation: activation function of the output; `None` applies none.
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
        return_sequences: whether to return the outputs of all steps, not only the last one.
        return_state: whether to return the last state as well.
        go_backwards: whether to read the sequence from its end, and return it reversed.
        stateful: whether the next batch starts with the last state of this batch.
        unroll: whether to write the steps out instead of running a loop.
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
