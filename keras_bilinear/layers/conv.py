import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import activations, constraints, initializers, ops, regularizers

from keras_bilinear.kronecker.factorization import Factorization, check_factors, check_positive_int
from keras_bilinear.layers.base import SHARED, BilinearLayer, convert
from keras_bilinear.layers.converter import (
    Converter,
    check_width,
    converter_of,
    register,
)
from keras_bilinear.layers.data_format import add_bias, channel_axis

PATTERNS = ("auto", "channel", "spatial")
# Patches of one batch of calibration data that count.
MOST_PATCHES = 8192


def check_pattern(pattern: Any) -> None:
    """Checks that a pattern is one of `PATTERNS`.

    Raises:
        ValueError: if it is not.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"`pattern` must be one of {PATTERNS}. Received: pattern={pattern!r}")


def split_window(kernel_size: tuple[int, ...], pattern: str) -> dict[str, tuple[int, ...]]:
    """The windows of the left and the right factor, as arguments of `Factorization.create`."""
    ones = (1,) * len(kernel_size)
    left, right = ones, kernel_size
    if pattern == "spatial":
        left, right = kernel_size[:1] + ones[1:], ones[:1] + kernel_size[1:]
    return {"left_window": left, "right_window": right}


def shape_of_any_size(layer: Any, channels: int) -> tuple:
    """The shape of inputs of a convolution with so many channels, at positions not known."""
    positions = (None,) * len(layer.kernel_size)
    channels_last = layer.data_format == "channels_last"
    return (None, *positions, channels) if channels_last else (None, channels, *positions)


def count_positions(layer: Any, shape: tuple) -> int:
    """How many positions inputs or outputs of that shape have, in all examples together."""
    return math.prod(shape) // shape[channel_axis(layer.data_format)]


class ConvConverter(Converter):
    """Between the convolutions of Keras and `BilinearConv1D`, `2D` and `3D`."""

    width = "filters"

    def count_blocks(self, full: keras.Layer) -> int:
        return full.groups

    def input_shape(self, layer: keras.Layer) -> tuple:
        return shape_of_any_size(layer, self.input_dim(layer) * layer.groups)

    def rows(self, full: keras.Layer, inputs: np.ndarray, **call: Any) -> dict[str, list]:
        channels_last = full.data_format == "channels_last"
        width = self.input_dim(full) * full.groups
        check_width(full, inputs, width, -1 if channels_last else 1)
        if not channels_last:
            inputs = np.moveaxis(inputs, 1, -1)
        patches = choose_patches(full, inputs, MOST_PATCHES)
        blocks = np.split(patches, full.groups, axis=-1)
        return {"kernel": [block.reshape(len(patches), -1) for block in blocks]}

    def output_rows(self, full: keras.Layer, outputs: np.ndarray) -> np.ndarray:
        return choose_positions(np.moveaxis(outputs, channel_axis(full.data_format), -1))

    def applications(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        return count_positions(layer, outputs)


class BilinearConv(BilinearLayer):
    """A convolution whose kernel is a sum of Kronecker products, in any number of dimensions.

    `BilinearConv1D`, `BilinearConv2D` and `BilinearConv3D` fix that number.

    The channels are split into two axes each, `c = (c1, c2)` of the input and
    `u = (u1, u2)` of the output, and each factor is a small convolution over its
    own share of them. Where the window `k` belongs is the pattern:

        "channel"   W[k, c, u] = sum_r L_r[c1, u1] R_r[k, c2, u2]
        "spatial"   W[k, c, u] = sum_r L_r[k1, c1, u1] R_r[k2, c2, u2]

    with `k1` the first axis of the window and `k2` the others. The paper reshapes
    each patch of the input into a matrix and multiplies it from both sides. Here
    the rows of that matrix are `(k1, c1)` and its columns `(k2, c2)` in the spatial
    pattern, which stores as little as the paper's; in the channel pattern they
    are `c1` and `(k, c2)`. As every axis of the tensor stays an axis, the layer is
    two small convolutions, one after the other, each with the other share of
    the channels folded into the batch. No patches are formed.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer or one for each axis.
        strides: an integer or one for each axis.
        padding: `"valid"` or `"same"`; in one dimension also `"causal"`.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        dilation_rate: an integer or one for each axis. Strides and dilation
            above 1 exclude each other.
        groups: positive integer that divides input channels and filters. The
            groups share the right factor, and each has a left factor of its own.
        activation: activation function; `None` applies none.
        use_bias: whether to add a bias for each filter.
        kernel_initializer: initializer of the full kernel. The factors start
            such that their product has the variance that it gives.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        kernel_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(c1, c2)` with a product of at least the input channels
            of one group; the channels are padded with zeros where it is more.
            `None` chooses both splits together: the near-square pair whose
            kernel can have the highest matrix rank.
        output_factors: `(u1, u2)` with a product of at least the filters of one
            group; the filters are cut where it is more. `None` chooses them.
        implementation: `"factorized"` applies one factor after the other,
            `"materialized"` forms the kernel first. `"auto"` takes the faster way
            by a model that is fitted to measurements on this backend; on a GPU
            it forms all kernels but large ones.
        pattern: which factor has the window. `"channel"` gives it to the right
            factor; `"spatial"` gives its first axis to the left factor and the
            others to the right factor; `"auto"` is `"channel"`.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        ValueError: if an argument is not valid, as in the stock layer, or if
            the input does not fit.

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    own_arguments = (*SHARED, "pattern")

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
        groups: int = 1,
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
        pattern: str = "auto",
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
        # The stock layer checks and completes what it knows.
        full = self.full_class(
            filters,
            kernel_size,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            groups=groups,
            name=self.name,
        )
        self.filters = check_positive_int("filters", filters)
        self.groups = check_positive_int("groups", groups)
        check_pattern(pattern)
        check_factors("output_factors", output_factors, self.filters // self.groups)
        self.kernel_size = full.kernel_size
        self.strides = full.strides
        self.padding = full.padding
        self.data_format = full.data_format
        self.dilation_rate = full.dilation_rate
        self.activation = activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.bias_constraint = constraints.get(bias_constraint)
        self.pattern = pattern
        self.bias = None
        self.input_spec = keras.layers.InputSpec(min_ndim=len(self.kernel_size) + 2)

    def factorize(self, input_shape: tuple) -> dict[str, Factorization]:
        channels = input_shape[channel_axis(self.data_format)]
        if channels is None:
            raise ValueError(
                f"The channel dimension of the input of `{type(self).__name__}` must be known. "
                f"Received: input_shape={input_shape}"
            )
        if channels % self.groups:
            raise ValueError(
                "The number of input channels must be evenly divisible by the number of groups. "
                f"Received groups={self.groups}, but the input has {channels} channels (full "
                f"input shape is {input_shape})."
            )
        # Refuses sizes that leave no output.
        self.compute_output_shape(input_shape)
        return {
            "kernel": self.factorization_of(
                channels // self.groups,
                self.filters // self.groups,
                blocks=self.groups,
                **split_window(self.kernel_size, self.pattern),
            )
        }

    def build(self, input_shape: tuple):
        self._kernel = self.add_kernel(
            "kernel",
            self.factorize(input_shape)["kernel"],
            self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
            strides=self.strides,
        )
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.filters,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        axis = channel_axis(self.data_format)
        self.input_spec = keras.layers.InputSpec(
            min_ndim=len(self.kernel_size) + 2, axes={axis: input_shape[axis]}
        )
        self.built = True

    def call(self, inputs, training: bool | None = None):
        del training  # changes nothing
        x, padding = inputs, self.padding
        channels_last = self.data_format == "channels_last"
        if padding == "causal":
            before = self.dilation_rate[0] * (self.kernel_size[0] - 1)
            both = ((before, 0), (0, 0)) if channels_last else ((0, 0), (before, 0))
            x, padding = ops.pad(x, ((0, 0), *both)), "valid"
        x = self._kernel.convolve(
            x,
            data_format=self.data_format,
            strides=self.strides,
            padding=padding,
            dilation_rate=self.dilation_rate,
        )
        x = add_bias(x, self.bias, self.data_format)
        if self.activation is not None:
            x = self.activation(x)
        return x

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
            "groups": self.groups,
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

    @classmethod
    def from_full(
        cls,
        layer: keras.layers.Layer,
        rank: int = 1,
        input_factors: Sequence[int] | None = None,
        output_factors: Sequence[int] | None = None,
        implementation: str = "auto",
        calibration_data=None,
        pattern: str = "auto",
    ) -> Self:
        """Makes a bilinear layer from a built full layer.

        The factors are the Kronecker sum nearest to the full kernel, in the shapes that
        `pattern` gives them. With calibration data, the factors and the bias are fitted such
        that the outputs before the activation differ least on them.

        Args:
            layer: a built layer of exactly the stock class. It stays as it is.
            rank: number of Kronecker terms.
            input_factors: `(c1, c2)`; `None` chooses them.
            output_factors: `(u1, u2)`; `None` chooses them.
            implementation: `"auto"`, `"factorized"` or `"materialized"`.
            calibration_data: inputs of the layer: an array, or an iterable of arrays, each
                of which is read once. `None` takes the nearest sum.
            pattern: `"auto"`, `"channel"` or `"spatial"`.

        Returns:
            A built layer with the same name and options; a constraint of the kernel becomes
            a constraint of each factor.

        Raises:
            TypeError: if `layer` is not of the stock class, or `calibration_data` is neither
                an array nor iterable.
            ValueError: if `layer` is not built, is quantized or holds NaN or infinite
                weights; if there are no calibration data, or they are not finite or no
                inputs of the layer; or if another argument is not valid.
        """
        return convert(
            cls,
            layer,
            calibration_data,
            rank=rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
            pattern=pattern,
        )


def choose_patches(layer: Any, inputs: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the patches that a convolution sees, chosen by the shape alone.

    Args:
        layer: what has the options of the convolution, such as the stock layer: `kernel_size`,
            `strides`, `padding` and `dilation_rate`.
        inputs: `(n, *positions, c)`.
        most: the largest number of patches.

    Returns:
        `(patches, *window, c)`.
    """
    axes = range(1, inputs.ndim - 1)
    spans = [
        (size - 1) * rate + 1
        for size, rate in zip(layer.kernel_size, layer.dilation_rate, strict=True)
    ]
    padding = [(0, 0)]
    for size, span, stride in zip(inputs.shape[1:-1], spans, layer.strides, strict=True):
        missing = {
            "valid": 0,
            "causal": span - 1,
            "same": max((-(-size // stride) - 1) * stride + span - size, 0),
        }[layer.padding]
        before = missing if layer.padding == "causal" else missing // 2
        padding.append((before, missing - before))
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(inputs, [*padding, (0, 0)]), spans, tuple(axes)
    )
    strides = (slice(None, None, stride) for stride in layer.strides)
    rates = (slice(None, None, rate) for rate in layer.dilation_rate)
    windows = windows[(slice(None), *strides, slice(None), *rates)]
    chosen = choose_places(windows.shape[: inputs.ndim - 1], most)
    return np.moveaxis(windows[chosen], 1, -1)


def choose_positions(gradients: np.ndarray) -> np.ndarray:
    """The gradients at the positions that calibration looks at, `(n, channels)`.

    They are as much larger as there are more positions in all, so that the sum of their squares
    stays the same, on average.

    Args:
        gradients: `(n, *positions, channels)`.
    """
    chosen = choose_places(gradients.shape[:-1], MOST_PATCHES)
    share = len(chosen[0]) / max(1, math.prod(gradients.shape[:-1]))
    return gradients[chosen] / np.sqrt(share).astype(gradients.dtype)


def choose_places(shape: tuple[int, ...], most: int) -> tuple[np.ndarray, ...]:
    """An index of at most so many random places of an array, by its shape alone."""
    chosen = np.random.default_rng(0).permutation(math.prod(shape))[:most]
    return np.unravel_index(np.sort(chosen), shape)


@register(keras.layers.Conv1D, converter=ConvConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearConv1D(BilinearConv):
    """A convolution over one axis whose kernel is a sum of Kronecker products.

    The layer stands for `keras.layers.Conv1D` and takes its arguments. The
    channels are split into two axes each, and each factor is a small convolution
    over its share of them. No patches are formed.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer.
        strides: an integer.
        padding: `"valid"`, `"same"` or `"causal"`.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        dilation_rate: an integer. Strides and dilation above 1 exclude each
            other.
        groups: positive integer that divides input channels and filters. The
            groups share the right factor, and each has a left factor of its own.
        activation: activation function; `None` applies none.
        use_bias: whether to add a bias for each filter.
        kernel_initializer: initializer of the full kernel. The factors start
            such that their product has the variance that it gives.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        kernel_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(c1, c2)` with a product of at least the input channels
            of one group; the channels are padded with zeros where it is more.
            `None` chooses both splits together: the near-square pair whose
            kernel can have the highest matrix rank.
        output_factors: `(u1, u2)` with a product of at least the filters of one
            group; the filters are cut where it is more. `None` chooses them.
        implementation: `"factorized"` applies one factor after the other,
            `"materialized"` forms the kernel first. `"auto"` takes the faster way
            by a model that is fitted to measurements on this backend; on a GPU
            it forms all kernels but large ones.
        pattern: which factor has the window. `"channel"` gives it to the right
            factor, `"spatial"` to the left factor; `"auto"` is `"channel"`.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch_size, steps, channels)`, or with the channels first.

    Output shape:
        `(batch_size, new_steps, filters)`, likewise.

    Raises:
        ValueError: if an argument is not valid, as in the stock layer, or if
            the input does not fit.

    Example:

    >>> layer = BilinearConv1D(128, 3, padding="same", activation="relu", rank=2)
    >>> layer(np.ones((2, 16, 64), "float32")).shape == (2, 16, 128)
    True
    >>> layer.count_params()  # a Conv1D layer has 24,704
    1024

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """


@register(keras.layers.Conv2D, converter=ConvConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearConv2D(BilinearConv):
    """A convolution over two axes whose kernel is a sum of Kronecker products.

    The layer stands for `keras.layers.Conv2D` and takes its arguments. The
    channels are split into two axes each, and each factor is a small convolution
    over its share of them. No patches are formed.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer or one for each axis.
        strides: an integer or one for each axis.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        dilation_rate: an integer or one for each axis. Strides and dilation
            above 1 exclude each other.
        groups: positive integer that divides input channels and filters. The
            groups share the right factor, and each has a left factor of its own.
        activation: activation function; `None` applies none.
        use_bias: whether to add a bias for each filter.
        kernel_initializer: initializer of the full kernel. The factors start
            such that their product has the variance that it gives.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        kernel_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(c1, c2)` with a product of at least the input channels
            of one group; the channels are padded with zeros where it is more.
            `None` chooses both splits together: the near-square pair whose
            kernel can have the highest matrix rank.
        output_factors: `(u1, u2)` with a product of at least the filters of one
            group; the filters are cut where it is more. `None` chooses them.
        implementation: `"factorized"` applies one factor after the other,
            `"materialized"` forms the kernel first. `"auto"` takes the faster way
            by a model that is fitted to measurements on this backend; on a GPU
            it forms all kernels but large ones.
        pattern: which factor has the window. `"channel"` gives it to the right
            factor; `"spatial"` gives its first axis to the left factor and the
            others to the right factor; `"auto"` is `"channel"`.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch_size, rows, columns, channels)`, or with the channels first.

    Output shape:
        `(batch_size, new_rows, new_columns, filters)`, likewise.

    Raises:
        ValueError: if an argument is not valid, as in the stock layer, or if
            the input does not fit.

    Example:

    >>> layer = BilinearConv2D(128, 3, padding="same", activation="relu", rank=2)
    >>> layer(np.ones((2, 8, 8, 64), "float32")).shape == (2, 8, 8, 128)
    True
    >>> layer.count_params()  # a Conv2D layer has 73,856
    2560

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """


@register(keras.layers.Conv3D, converter=ConvConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearConv3D(BilinearConv):
    """A convolution over three axes whose kernel is a sum of Kronecker products.

    The layer stands for `keras.layers.Conv3D` and takes its arguments. The
    channels are split into two axes each, and each factor is a small convolution
    over its share of them. No patches are formed.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer or one for each axis.
        strides: an integer or one for each axis.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        dilation_rate: an integer or one for each axis. Strides and dilation
            above 1 exclude each other.
        groups: positive integer that divides input channels and filters. The
            groups share the right factor, and each has a left factor of its own.
        activation: activation function; `None` applies none.
        use_bias: whether to add a bias for each filter.
        kernel_initializer: initializer of the full kernel. The factors start
            such that their product has the variance that it gives.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        kernel_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(c1, c2)` with a product of at least the input channels
            of one group; the channels are padded with zeros where it is more.
            `None` chooses both splits together: the near-square pair whose
            kernel can have the highest matrix rank.
        output_factors: `(u1, u2)` with a product of at least the filters of one
            group; the filters are cut where it is more. `None` chooses them.
        implementation: `"factorized"` applies one factor after the other,
            `"materialized"` forms the kernel first. `"auto"` takes the faster way
            by a model that is fitted to measurements on this backend; on a GPU
            it forms all kernels but large ones.
        pattern: which factor has the window. `"channel"` gives it to the right
            factor; `"spatial"` gives its first axis to the left factor and the
            others to the right factor; `"auto"` is `"channel"`.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch_size, depth, rows, columns, channels)`, or with the channels first.

    Output shape:
        `(batch_size, new_depth, new_rows, new_columns, filters)`, likewise.

    Raises:
        ValueError: if an argument is not valid, as in the stock layer, or if
            the input does not fit.

    Example:

    >>> layer = BilinearConv3D(128, 3, padding="same", activation="relu", rank=2)
    >>> layer(np.ones((2, 4, 4, 4, 64), "float32")).shape == (2, 4, 4, 4, 128)
    True
    >>> layer.count_params()  # a Conv3D layer has 221,312
    7168

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """
