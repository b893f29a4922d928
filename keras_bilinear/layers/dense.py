from collections.abc import Callable, Sequence

import keras
from keras import activations, constraints, initializers, ops, regularizers

from keras_bilinear.kronecker.factorization import Factorization, check_factors, check_positive_int
from keras_bilinear.layers.base import BilinearLayer
from keras_bilinear.layers.converter import Converter, register


class DenseConverter(Converter):
    """Between `keras.layers.Dense` and `BilinearDense`."""

    width = "units"


@register(keras.layers.Dense, converter=DenseConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearDense(BilinearLayer):
    """A densely connected layer whose kernel is a sum of Kronecker products.

    The input is reshaped into a matrix `X` of shape `(d1, d2)` and multiplied
    from both sides:

        Y = sum_r L_r^T X R_r        output = activation(flatten(Y) + bias)

    which is `keras.layers.Dense` with the kernel `sum_r kron(L_r, R_r)`. With
    one term and square factors it stores `2 D` numbers instead of `D^2` and
    needs `2 D^1.5` multiplications instead of `D^2`.

    Args:
        units: positive integer, width of the output.
        activation: activation function; `None` applies none.
        use_bias: whether to add a bias vector.
        kernel_initializer: initializer of the full kernel. The factors start
            such that their product has the variance that it gives.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        kernel_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(d1, d2)` with a product of at least the input width;
            the input is padded with zeros where it is more. `None` chooses
            near-square factors.
        output_factors: `(u1, u2)` with a product of at least `units`; the output
            is cut where it is more. `None` chooses near-square factors.
        implementation: `"factorized"` multiplies by one factor after the other,
            `"materialized"` forms the kernel first. `"auto"` takes the way with
            fewer multiplications for each input row; on a GPU it forms all kernels
            but large ones.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch_size, ..., input_dim)`, of rank 2 or more.

    Output shape:
        `(batch_size, ..., units)`.

    Raises:
        ValueError: if `units`, `rank`, the factors or `implementation` are not
            valid, or the last dimension of the input is not known.

    Example:

    >>> layer = BilinearDense(1024, activation="relu", rank=2)
    >>> layer(np.ones((8, 784), "float32")).shape == (8, 1024)
    True
    >>> layer.count_params()  # a Dense layer has 803,840
    4608

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    def __init__(
        self,
        units: int,
        activation: str | Callable | None = None,
        use_bias: bool = True,
        kernel_initializer: str | dict | Callable = "glorot_uniform",
        bias_initializer: str | dict | Callable = "zeros",
        kernel_regularizer: str | dict | Callable | None = None,
        bias_regularizer: str | dict | Callable | None = None,
        activity_regularizer: str | dict | Callable | None = None,
        kernel_constraint: str | dict | Callable | None = None,
        bias_constraint: str | dict | Callable | None = None,
        rank: int = 1,
        input_factors: Sequence[int] | None = None,
        output_factors: Sequence[int] | None = None,
        implementation: str = "auto",
        **kwargs,
    ):
        units = check_positive_int("units", units)
        super().__init__(
            rank=rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        check_factors("output_factors", output_factors, units)
        self.units = units
        self.activation = activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.bias_constraint = constraints.get(bias_constraint)
        self.bias = None
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True

    def factorize(self, input_shape: tuple) -> dict[str, Factorization]:
        if input_shape[-1] is None:
            raise ValueError(
                "The last dimension of the input of `BilinearDense` must be known. "
                f"Received: input_shape={input_shape}"
            )
        return {"kernel": self.factorization_of(input_shape[-1], self.units)}

    def build(self, input_shape: tuple):
        self._kernel = self.add_kernel(
            "kernel",
            self.factorize(input_shape)["kernel"],
            self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.units,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: input_shape[-1]})
        self.built = True

    def call(self, inputs, training: bool | None = None):
        del training  # changes nothing
        inputs = ops.convert_to_tensor(inputs, sparse=False)
        x = self._kernel.project(inputs)
        if self.bias is not None:
            x = ops.add(x, self.bias)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "units": self.units,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "activity_regularizer": regularizers.serialize(self.activity_regularizer),
            "kernel_constraint": constraints.serialize(self.kernel_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
        }
