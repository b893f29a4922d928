import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import activations, constraints, initializers, ops, regularizers

from keras_bilinear.kronecker.factorization import Factorization, check_factors, check_positive_int
from keras_bilinear.layers.base import BilinearLayer
from keras_bilinear.layers.conv import (
    MOST_PATCHES,
    choose_places,
    choose_positions,
    count_positions,
    shape_of_any_size,
)
from keras_bilinear.layers.converter import (
    Converter,
    check_width,
    converter_of,
    register,
)
from keras_bilinear.layers.data_format import add_bias, channel_axis, with_channels_last

# Arguments that the stock layer checks, completes and keeps.
_OF_FULL = (
    "kernel_size",
    "strides",
    "padding",
    "data_format",
    "dilation_rate",
    "activation",
    "use_bias",
    "depthwise_initializer",
    "pointwise_initializer",
    "bias_initializer",
    "depthwise_regularizer",
    "pointwise_regularizer",
    "bias_regularizer",
    "depthwise_constraint",
    "pointwise_constraint",
    "bias_constraint",
)


class SeparableConvConverter(Converter):
    """Between the separable convolutions of Keras and `BilinearSeparableConv1D` and `2D`."""

    kernel_names = ("pointwise_kernel",)
    shared_names = ("depthwise_kernel", "bias")
    constraint_names = ("pointwise_constraint",)

    def to_matrix(self, full: keras.Layer, kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(kernel.shape[-2:])

    def from_matrix(self, bilinear: keras.Layer, kernel: Any) -> Any:
        return ops.reshape(kernel, (*(1,) * len(bilinear.kernel_size), *kernel.shape))

    def input_shape(self, layer: keras.Layer) -> tuple:
        return shape_of_any_size(layer, layer.depthwise_kernel.shape[-2])

    def rows(self, full: keras.Layer, inputs: np.ndarray, **call: Any) -> dict[str, list]:
        axis = channel_axis(full.data_format)
        check_width(full, inputs, full.depthwise_kernel.shape[-2], axis)
        rows = ops.convert_to_numpy(_convolve_depthwise(full, ops.convert_to_tensor(inputs)))
        rows = np.moveaxis(rows, axis, -1)
        return {"pointwise_kernel": [rows[choose_places(rows.shape[:-1], MOST_PATCHES)]]}

    def output_rows(self, full: keras.Layer, outputs: np.ndarray) -> np.ndarray:
        return choose_positions(np.moveaxis(outputs, channel_axis(full.data_format), -1))

    def applications(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        return count_positions(layer, outputs)

    def macs(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        depthwise = count_positions(layer, outputs) * math.prod(layer.depthwise_kernel.shape)
        return depthwise + super().macs(layer, inputs, outputs)

    def workspace(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        # The pointwise kernel multiplies what the depthwise kernel makes.
        between = count_positions(layer, outputs) * self.input_dim(layer)
        return between + super().workspace(layer, inputs, outputs)


class BilinearSeparableConv(BilinearLayer):
    """A separable convolution whose pointwise kernel is a sum of Kronecker products.

    `BilinearSeparableConv1D` and `BilinearSeparableConv2D` fix the number of dimensions. The
    depthwise kernel, one small filter for each channel, stays full.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer or one for each axis.
        strides: an integer or one for each axis.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        dilation_rate: an integer or one for each axis.
        depth_multiplier: positive integer, number of channels that the first step makes of
            each input channel.
        activation: activation function; `None` applies none.
        use_bias: whether to add a bias for each filter.
        depthwise_initializer: initializer of the depthwise kernel.
        pointwise_initializer: initializer of the full pointwise kernel. The factors start such
            that their product has the variance that it gives.
        bias_initializer: initializer of the bias.
        depthwise_regularizer: regularizer of the depthwise kernel.
        pointwise_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        depthwise_constraint: constraint of the depthwise kernel.
        pointwise_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(d1, d2)` with a product of at least `depth_multiplier` times the
            input channels; `None` chooses near-square factors.
        output_factors: `(u1, u2)`, with a product of at least `filters`; `None` chooses near-square
            factors.
        implementation: `"factorized"` applies one factor after the other, `"materialized"`
            forms the pointwise kernel first; `"auto"` takes what has fewer multiplications
            and, on a GPU, forms all kernels but large ones.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
        depth_multiplier: int = 1,
        activation: str | Callable | None = None,
        use_bias: bool = True,
        depthwise_initializer: str | dict | Callable = "glorot_uniform",
        pointwise_initializer: str | dict | Callable = "glorot_uniform",
        bias_initializer: str | dict | Callable = "zeros",
        depthwise_regularizer: str | dict | Callable | None = None,
        pointwise_regularizer: str | dict | Callable | None = None,
        bias_regularizer: str | dict | Callable | None = None,
        activity_regularizer: str | dict | Callable | None = None,
        depthwise_constraint: str | dict | Callable | None = None,
        pointwise_constraint: str | dict | Callable | None = None,
        bias_constraint: str | dict | Callable | None = None,
        rank: int = 1,
        input_factors: Sequence[int] | None = None,
        output_factors: Sequence[int] | None = None,
        implementation: str = "auto",
        **kwargs,
    ):
        super().__init__(
            rank=rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        full = self.full_class(
            filters,
            kernel_size,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            depth_multiplier=depth_multiplier,
            activation=activation,
            use_bias=use_bias,
            depthwise_initializer=depthwise_initializer,
            pointwise_initializer=pointwise_initializer,
            bias_initializer=bias_initializer,
            depthwise_regularizer=depthwise_regularizer,
            pointwise_regularizer=pointwise_regularizer,
            bias_regularizer=bias_regularizer,
            depthwise_constraint=depthwise_constraint,
            pointwise_constraint=pointwise_constraint,
            bias_constraint=bias_constraint,
            name=self.name,
        )
        self.filters = check_positive_int("filters", filters)
        self.depth_multiplier = check_positive_int("depth_multiplier", depth_multiplier)
        check_factors("output_factors", output_factors, self.filters)
        for name in _OF_FULL:
            setattr(self, name, getattr(full, name))
        self.depthwise_kernel = self.bias = None
        self.input_spec = keras.layers.InputSpec(min_ndim=len(self.kernel_size) + 2)

    def factorize(self, input_shape: tuple) -> dict[str, Factorization]:
        channels = input_shape[channel_axis(self.data_format)]
        if channels is None:
            raise ValueError(
                f"The channel dimension of the input of `{type(self).__name__}` must be known. "
                f"Received: input_shape={input_shape}"
            )
        # Refuses sizes that leave no output.
        self.compute_output_shape(input_shape)
        inputs = channels * self.depth_multiplier
        return {"pointwise_kernel": self.factorization_of(inputs, self.filters)}

    def build(self, input_shape: tuple):
        self._kernel = self.add_kernel(
            "pointwise_kernel",
            self.factorize(input_shape)["pointwise_kernel"],
            self.pointwise_initializer,
            regularizer=self.pointwise_regularizer,
            constraint=self.pointwise_constraint,
            variables="kernel",
        )
        axis = channel_axis(self.data_format)
        channels = input_shape[axis]
        self.depthwise_kernel = self.add_weight(
            name="depthwise_kernel",
            shape=(*self.kernel_size, channels, self.depth_multiplier),
            initializer=self.depthwise_initializer,
            regularizer=self.depthwise_regularizer,
            constraint=self.depthwise_constraint,
        )
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.filters,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        self.input_spec = keras.layers.InputSpec(
            min_ndim=len(self.kernel_size) + 2, axes={axis: channels}
        )
        self.built = True

    @property
    def pointwise_kernel(self):
        """The pointwise kernel that the factors stand for, a new tensor of full size."""
        return self.kernel

    def call(self, inputs, training: bool | None = None):
        del training  # changes nothing
        x = _convolve_depthwise(self, inputs)
        x = with_channels_last(self._kernel.project, x, self.data_format)
        x = add_bias(x, self.bias, self.data_format)
        return x if self.activation is None else self.activation(x)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        full = converter_of(self).unbuilt_full(self)
        return full.compute_output_shape(input_shape)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation_rate,
            "depth_multiplier": self.depth_multiplier,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "depthwise_initializer": initializers.serialize(self.depthwise_initializer),
            "pointwise_initializer": initializers.serialize(self.pointwise_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "depthwise_regularizer": regularizers.serialize(self.depthwise_regularizer),
            "pointwise_regularizer": regularizers.serialize(self.pointwise_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "activity_regularizer": regularizers.serialize(self.activity_regularizer),
            "depthwise_constraint": constraints.serialize(self.depthwise_constraint),
            "pointwise_constraint": constraints.serialize(self.pointwise_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
        }


def _convolve_depthwise(layer, x):
    """What the depthwise kernel of a layer, be it stock or bilinear, makes of inputs."""
    return ops.depthwise_conv(
        x,
        ops.cast(layer.depthwise_kernel, x.dtype),
        strides=layer.strides,
        padding=layer.padding,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
    )


@register(keras.layers.SeparableConv1D, converter=SeparableConvConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearSeparableConv1D(BilinearSeparableConv):
    """A separable convolution over one axis whose pointwise kernel is a sum of Kronecker products.

    The layer stands for `keras.layers.SeparableConv1D` and takes its arguments. It convolves
    each channel by itself with a full kernel, and then mixes the channels at each position by
    `W = sum_r kron(L_r, R_r)`, as `keras_bilinear.BilinearDense` does. Nearly all numbers of
    the stock layer are in this pointwise kernel.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer or one for each axis.
        strides: an integer or one for each axis.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        dilation_rate: an integer or one for each axis.
        depth_multiplier: positive integer, number of channels that the first step makes of
            each input channel.
        activation: activation function; `None` applies none.
        use_bias: whether to add a bias for each filter.
        depthwise_initializer: initializer of the depthwise kernel.
        pointwise_initializer: initializer of the full pointwise kernel. The factors start such
            that their product has the variance that it gives.
        bias_initializer: initializer of the bias.
        depthwise_regularizer: regularizer of the depthwise kernel.
        pointwise_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        depthwise_constraint: constraint of the depthwise kernel.
        pointwise_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(d1, d2)` with a product of at least `depth_multiplier` times the
            input channels; `None` chooses near-square factors.
        output_factors: `(u1, u2)`, with a product of at least `filters`; `None` chooses near-square
            factors.
        implementation: `"factorized"` applies one factor after the other, `"materialized"`
            forms the pointwise kernel first; `"auto"` takes what has fewer multiplications
            and, on a GPU, forms all kernels but large ones.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch_size, steps, channels)`, or with the channels first.

    Output shape:
        `(batch_size, new_steps, filters)`, likewise.

    Raises:
        ValueError: if an argument is not valid, as in the stock layer, or if the input does
            not fit.

    Example:

    >>> layer = BilinearSeparableConv1D(128, 3, padding="same", activation="relu", rank=2)
    >>> layer(np.ones((2, 16, 64), "float32")).shape == (2, 16, 128)
    True
    >>> layer.count_params()  # a SeparableConv1D layer has 8,512
    704

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """


@register(keras.layers.SeparableConv2D, converter=SeparableConvConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearSeparableConv2D(BilinearSeparableConv):
    """A separable convolution over two axes whose pointwise kernel is a sum of Kronecker products.

    The layer stands for `keras.layers.SeparableConv2D` and takes its arguments. It convolves
    each channel by itself with a full kernel, and then mixes the channels at each position by
    `W = sum_r kron(L_r, R_r)`, as `keras_bilinear.BilinearDense` does. Nearly all numbers of
    the stock layer are in this pointwise kernel.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer or one for each axis.
        strides: an integer or one for each axis.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        dilation_rate: an integer or one for each axis.
        depth_multiplier: positive integer, number of channels that the first step makes of
            each input channel.
        activation: activation function; `None` applies none.
        use_bias: whether to add a bias for each filter.
        depthwise_initializer: initializer of the depthwise kernel.
        pointwise_initializer: initializer of the full pointwise kernel. The factors start such
            that their product has the variance that it gives.
        bias_initializer: initializer of the bias.
        depthwise_regularizer: regularizer of the depthwise kernel.
        pointwise_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        depthwise_constraint: constraint of the depthwise kernel.
        pointwise_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(d1, d2)` with a product of at least `depth_multiplier` times the
            input channels; `None` chooses near-square factors.
        output_factors: `(u1, u2)`, with a product of at least `filters`; `None` chooses near-square
            factors.
        implementation: `"factorized"` applies one factor after the other, `"materialized"`
            forms the pointwise kernel first; `"auto"` takes what has fewer multiplications
            and, on a GPU, forms all kernels but large ones.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch_size, rows, columns, channels)`, or with the channels first.

    Output shape:
        `(batch_size, new_rows, new_columns, filters)`, likewise.

    Raises:
        ValueError: if an argument is not valid, as in the stock layer, or if the input does
            not fit.

    Example:

    >>> layer = BilinearSeparableConv2D(128, 3, padding="same", activation="relu", rank=2)
    >>> layer(np.ones((2, 8, 8, 64), "float32")).shape == (2, 8, 8, 128)
    True
    >>> layer.count_params()  # a SeparableConv2D layer has 8,896
    1088

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """
