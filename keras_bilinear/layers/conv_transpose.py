import math
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import keras
import numpy as np
from keras import activations, constraints, initializers, ops, regularizers

from keras_bilinear.kronecker import Tensor
from keras_bilinear.kronecker.convolution import convolve_transpose
from keras_bilinear.kronecker.cost import (
    choose_transposed_order,
    count_transposed_between,
    count_transposed_macs,
)
from keras_bilinear.kronecker.factorization import (
    Factorization,
    check_factors,
    check_positive_int,
    choose_aligned_factors,
)
from keras_bilinear.layers.base import SHARED, BilinearLayer, convert
from keras_bilinear.layers.conv import (
    MOST_PATCHES,
    check_pattern,
    choose_places,
    choose_positions,
    count_positions,
    shape_of_any_size,
    split_window,
)
from keras_bilinear.layers.converter import (
    MOST_INPUTS,
    Converter,
    check_width,
    converter_of,
    is_bilinear,
    register,
)
from keras_bilinear.layers.data_format import add_bias, channel_axis, with_channels_last
from keras_bilinear.layers.kernel import KroneckerKernel

# Arguments that the stock layer checks, completes and keeps.
_OF_FULL = (
    "kernel_size",
    "strides",
    "padding",
    "output_padding",
    "data_format",
    "dilation_rate",
    "activation",
    "use_bias",
    "kernel_initializer",
    "bias_initializer",
    "kernel_regularizer",
    "bias_regularizer",
    "kernel_constraint",
    "bias_constraint",
)


class ConvTransposeConverter(Converter):
    """Between the transposed convolutions of Keras and `BilinearConv1DTranspose`, `2D` and `3D`."""

    def to_matrix(self, full: keras.Layer, kernel: np.ndarray) -> np.ndarray:
        return np.swapaxes(kernel, -1, -2)

    def from_matrix(self, bilinear: keras.Layer, kernel: Any) -> Any:
        return ops.swapaxes(kernel, -1, -2)

    def input_dim(self, layer: keras.Layer) -> int:
        return super().input_dim(layer) if is_bilinear(layer) else layer.kernel.shape[-1]

    def input_shape(self, layer: keras.Layer) -> tuple:
        return shape_of_any_size(layer, self.input_dim(layer))

    def options(self, full: keras.Layer) -> dict[str, Any]:
        # Keras 3.13 leaves the output padding out of the configuration.
        return {**super().options(full), "output_padding": full.output_padding}

    def can_calibrate(self, full: keras.Layer) -> bool:
        return math.prod(full.kernel_size) * self.input_dim(full) <= MOST_INPUTS

    def rows(self, full: keras.Layer, inputs: np.ndarray, **call: Any) -> dict[str, list]:
        axis = channel_axis(full.data_format)
        check_width(full, inputs, self.input_dim(full), axis)
        places = list(full.compute_output_shape(inputs.shape))
        del places[axis]
        patches = _patches(full, np.moveaxis(inputs, axis, -1), places, MOST_PATCHES)
        return {"kernel": [patches.reshape(len(patches), -1)]}

    def output_rows(self, full: keras.Layer, outputs: np.ndarray) -> np.ndarray:
        return choose_positions(np.moveaxis(outputs, channel_axis(full.data_format), -1))

    def applications(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        return count_positions(layer, inputs)


class TransposedKernel(KroneckerKernel):
    """The kernel of a transposed convolution.

    Its factorization has the inputs before the outputs, like every factorization. The stock
    layer has them the other way round.
    """

    _choose_order = staticmethod(choose_transposed_order)

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for each input position."""
        return count_transposed_macs(self.factorization, self.order, self._strides)

    @property
    def between(self) -> int:
        """Numbers between both factors for each input position."""
        return count_transposed_between(self.factorization, self.order, self._strides)

    @staticmethod
    def _fans(factorization):
        # Keras takes the last axis but one of a kernel for the inputs. Here it is the outputs.
        *window, inputs, outputs = factorization.full_shape
        return math.prod(window) * outputs, math.prod(window) * inputs

    def convolve_transpose(
        self, x: Tensor, data_format: str = "channels_last", **options: Any
    ) -> Tensor:
        """The transposed convolution of `x` with the kernel.

        Args:
            x: `(n, *positions, input_dim)`, or with the channels first.
            data_format: `"channels_last"` or `"channels_first"`.
            **options: `strides`, `padding`, `output_padding` and `dilation_rate` of
                `keras.ops.conv_transpose`.
        """
        if self.materialized:
            kernel = ops.cast(ops.swapaxes(self.materialize(), -1, -2), x.dtype)
            return ops.conv_transpose(x, kernel, data_format=data_format, **options)
        if self.factorization.pointwise and max(options["strides"]) == 1:
            return with_channels_last(self.project, x, data_format)

        def apply(x):
            return self._convolve_blocks(convolve_transpose, x, **options)

        return with_channels_last(apply, x, data_format)


class BilinearConvTranspose(BilinearLayer):
    """A transposed convolution whose kernel is a sum of Kronecker products.

    `BilinearConv1DTranspose`, `BilinearConv2DTranspose` and `BilinearConv3DTranspose` fix the
    number of dimensions.

    The channels are split into two axes each, `c = (c1, c2)` of the input and `u = (u1, u2)`
    of the output. The stock layer's kernel has the window `k` before the outputs and these
    before the inputs, and is

        "channel"   W[k, u, c] = sum_r L_r[c1, u1] R_r[k, c2, u2]
        "spatial"   W[k, u, c] = sum_r L_r[k1, c1, u1] R_r[k2, c2, u2]

    with `k1` the first axis of the window and `k2` the others. A factor with a window is a
    small transposed convolution with the other share of the channels folded into the batch;
    one without is a matrix product over its share of the channels. Where strides make the
    outputs longer, the factor that goes first sees fewer positions.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer or one for each axis.
        strides: an integer or one for each axis: the factor by which outputs are longer.
        padding: `"valid"` or `"same"`.
        output_padding: an integer or one for each axis, below the stride: by how much the
            outputs are longer than their least length; `None` infers it.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        dilation_rate: an integer or one for each axis. Strides and dilation above 1 exclude
            each other.
        activation: activation function; `None` applies none.
        use_bias: whether to add a bias for each filter.
        kernel_initializer: initializer of the full kernel. The factors start such that their
            product has the variance that it gives.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        kernel_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(c1, c2)` with a product of at least the input channels; the channels
            are padded with zeros where it is more. `None` chooses both splits together: the
            near-square pair whose kernel can have the highest matrix rank.
        output_factors: `(u1, u2)` with a product of at least `filters`; the filters are cut
            where it is more. `None` chooses them.
        implementation: `"factorized"` applies one factor after the other, `"materialized"`
            forms the kernel first; `"auto"` takes the faster way by a model that is
            fitted to measurements of convolutions on this backend; on a GPU it forms all
            kernels but large ones.
        pattern: which factor has the window. `"channel"` gives it to the right factor;
            `"spatial"` gives its first axis to the left factor and the others to the right
            factor; `"auto"` is `"channel"`.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    own_arguments = (*SHARED, "pattern")

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        output_padding: int | Sequence[int] | None = None,
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
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
        full = self.full_class(
            filters,
            kernel_size,
            strides=strides,
            padding=padding,
            output_padding=output_padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            name=self.name,
        )
        self.filters = check_positive_int("filters", filters)
        check_pattern(pattern)
        check_factors("output_factors", output_factors, self.filters)
        for name in _OF_FULL:
            setattr(self, name, getattr(full, name))
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
        if len(input_shape) != len(self.kernel_size) + 2:
            raise ValueError(
                f"The input of `{type(self).__name__}` must have {len(self.kernel_size) + 2} axes. "
                f"Received: input_shape={input_shape}"
            )
        windows = split_window(self.kernel_size, self.pattern)
        factors = {}
        if math.prod(self.kernel_size) > 1:
            # The layer is the adjoint of a convolution from the filters to the channels. Its
            # kernel can have the highest matrix rank with the factors that suit this one.
            outputs, inputs = choose_aligned_factors(self.filters, channels, **windows)
            factors = {
                "input_factors": self.input_factors or inputs,
                "output_factors": self.output_factors or outputs,
            }
        return {"kernel": self.factorization_of(channels, self.filters, **windows, **factors)}

    def build(self, input_shape: tuple):
        kernel = self.add_kernel(
            "kernel",
            self.factorize(input_shape)["kernel"],
            self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
            kernel_class=TransposedKernel,
            strides=self.strides,
        )
        self._kernel = cast("TransposedKernel", kernel)
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
            ndim=len(self.kernel_size) + 2, axes={axis: input_shape[axis]}
        )
        self.built = True

    def call(self, inputs, training: bool | None = None):
        del training  # changes nothing
        x = self._kernel.convolve_transpose(
            inputs,
            data_format=self.data_format,
            strides=self.strides,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation_rate=self.dilation_rate,
        )
        x = add_bias(x, self.bias, self.data_format)
        return x if self.activation is None else self.activation(x)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        full = converter_of(self).unbuilt_full(self)
        return tuple(full.compute_output_shape(input_shape))

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "output_padding": self.output_padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation_rate,
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
            calibration_data: inputs of the layer, an array or an iterable of arrays.
            pattern: `"auto"`, `"channel"` or `"spatial"`.

        Returns:
            A built layer with the same name and options.

        Raises:
            TypeError: if `layer` is not of the stock class, or `calibration_data` neither an
                array nor iterable.
            ValueError: if `layer` is not built, is quantized or holds NaN or infinite
                weights, if the calibration data are no finite inputs of the layer, or if
                another argument is not valid.
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


def _patches(layer, inputs, places, most):
    """What at most so many outputs of a transposed convolution are made of: `(n, *window, c)`.

    An output at `q` gets the input at `p` by the place `k` of the window where
    `q = stride * p + rate * k - crop`; where no input is there, the patch has zeros.

    Args:
        layer: the stock layer.
        inputs: `(n, *positions, c)`.
        places: `(n, *new_positions)`.
        most: the largest number of patches.
    """
    examples, *positions = choose_places(places, most)
    dimensions, index = len(positions), []
    seen = np.ones((1,) * (dimensions + 1), bool)
    for axis, (at, size, new_size, window, stride, rate) in enumerate(
        zip(
            positions,
            inputs.shape[1:-1],
            places[1:],
            layer.kernel_size,
            layer.strides,
            layer.dilation_rate,
            strict=True,
        )
    ):
        longest = (size - 1) * stride + (window - 1) * rate + 1
        crop = max(longest - new_size, 0) // 2 if layer.padding == "same" else 0
        source = at[:, None] + crop - rate * np.arange(window)
        meets = (source % stride == 0) & (source >= 0) & (source < size * stride)
        shape = [len(at), *(window if other == axis else 1 for other in range(dimensions))]
        index.append(np.where(meets, source // stride, 0).reshape(shape))
        seen = seen & meets.reshape(shape)
    examples = examples.reshape(-1, *(1,) * dimensions)
    return inputs[(examples, *index)] * seen[..., None]


@register(keras.layers.Conv1DTranspose, converter=ConvTransposeConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearConv1DTranspose(BilinearConvTranspose):
    """A transposed convolution over one axis whose kernel is a sum of Kronecker products.

    The layer stands for `keras.layers.Conv1DTranspose` and takes its arguments. The channels
    of inputs and outputs are split into two axes each, and each factor of the kernel is a
    small layer over its own share of them. By default the left factor has no window and is a
    matrix product; the right factor has the whole window and is a transposed convolution.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer or one for each axis.
        strides: an integer or one for each axis: the factor by which outputs are longer.
        padding: `"valid"` or `"same"`.
        output_padding: an integer or one for each axis, below the stride: by how much the
            outputs are longer than their least length; `None` infers it.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        dilation_rate: an integer or one for each axis. Strides and dilation above 1 exclude
            each other.
        activation: activation function; `None` applies none.
        use_bias: whether to add a bias for each filter.
        kernel_initializer: initializer of the full kernel. The factors start such that their
            product has the variance that it gives.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        kernel_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(c1, c2)` with a product of at least the input channels; the channels
            are padded with zeros where it is more. `None` chooses both splits together: the
            near-square pair whose kernel can have the highest matrix rank.
        output_factors: `(u1, u2)` with a product of at least `filters`; the filters are cut
            where it is more. `None` chooses them.
        implementation: `"factorized"` applies one factor after the other, `"materialized"`
            forms the kernel first; `"auto"` takes the faster way by a model that is
            fitted to measurements of convolutions on this backend; on a GPU it forms all
            kernels but large ones.
        pattern: which factor has the window. `"channel"` gives it to the right factor;
            `"spatial"` gives its first axis to the left factor and the others to the right
            factor; `"auto"` is `"channel"`.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch_size, steps, channels)`, or with the channels first.

    Output shape:
        `(batch_size, new_steps, filters)`, likewise.

    Raises:
        ValueError: if an argument is not valid, as in the stock layer, or if the input does
            not fit.

    Example:

    >>> layer = BilinearConv1DTranspose(32, 3, strides=2, padding="same", rank=2)
    >>> layer(np.ones((2, 8, 64), "float32")).shape == (2, 16, 32)
    True
    >>> layer.count_params()  # a Conv1DTranspose layer has 6,176
    352

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """


@register(keras.layers.Conv2DTranspose, converter=ConvTransposeConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearConv2DTranspose(BilinearConvTranspose):
    """A transposed convolution over two axes whose kernel is a sum of Kronecker products.

    The layer stands for `keras.layers.Conv2DTranspose` and takes its arguments. The channels
    of inputs and outputs are split into two axes each, and each factor of the kernel is a
    small layer over its own share of them. By default the left factor has no window and is a
    matrix product; the right factor has the whole window and is a transposed convolution.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer or one for each axis.
        strides: an integer or one for each axis: the factor by which outputs are longer.
        padding: `"valid"` or `"same"`.
        output_padding: an integer or one for each axis, below the stride: by how much the
            outputs are longer than their least length; `None` infers it.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        dilation_rate: an integer or one for each axis. Strides and dilation above 1 exclude
            each other.
        activation: activation function; `None` applies none.
        use_bias: whether to add a bias for each filter.
        kernel_initializer: initializer of the full kernel. The factors start such that their
            product has the variance that it gives.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        kernel_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(c1, c2)` with a product of at least the input channels; the channels
            are padded with zeros where it is more. `None` chooses both splits together: the
            near-square pair whose kernel can have the highest matrix rank.
        output_factors: `(u1, u2)` with a product of at least `filters`; the filters are cut
            where it is more. `None` chooses them.
        implementation: `"factorized"` applies one factor after the other, `"materialized"`
            forms the kernel first; `"auto"` takes the faster way by a model that is
            fitted to measurements of convolutions on this backend; on a GPU it forms all
            kernels but large ones.
        pattern: which factor has the window. `"channel"` gives it to the right factor;
            `"spatial"` gives its first axis to the left factor and the others to the right
            factor; `"auto"` is `"channel"`.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch_size, rows, columns, channels)`, or with the channels first.

    Output shape:
        `(batch_size, new_rows, new_columns, filters)`, likewise.

    Raises:
        ValueError: if an argument is not valid, as in the stock layer, or if the input does
            not fit.

    Example:

    >>> layer = BilinearConv2DTranspose(32, 3, strides=2, padding="same", rank=2)
    >>> layer(np.ones((2, 8, 8, 64), "float32")).shape == (2, 16, 16, 32)
    True
    >>> layer.count_params()  # a Conv2DTranspose layer has 18,464
    736

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """


@register(keras.layers.Conv3DTranspose, converter=ConvTransposeConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearConv3DTranspose(BilinearConvTranspose):
    """A transposed convolution over three axes whose kernel is a sum of Kronecker products.

    The layer stands for `keras.layers.Conv3DTranspose` and takes its arguments. The channels
    of inputs and outputs are split into two axes each, and each factor of the kernel is a
    small layer over its own share of them. By default the left factor has no window and is a
    matrix product; the right factor has the whole window and is a transposed convolution.

    Args:
        filters: positive integer, number of output channels.
        kernel_size: size of the window, an integer or one for each axis.
        strides: an integer or one for each axis: the factor by which outputs are longer.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`; `None` is
            `keras.config.image_data_format()`.
        output_padding: an integer or one for each axis, below the stride: by how much the
            outputs are longer than their least length; `None` infers it.
        dilation_rate: an integer or one for each axis. Strides and dilation above 1 exclude
            each other.
        activation: activation function; `None` applies none.
        use_bias: whether to add a bias for each filter.
        kernel_initializer: initializer of the full kernel. The factors start such that their
            product has the variance that it gives.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        kernel_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(c1, c2)` with a product of at least the input channels; the channels
            are padded with zeros where it is more. `None` chooses both splits together: the
            near-square pair whose kernel can have the highest matrix rank.
        output_factors: `(u1, u2)` with a product of at least `filters`; the filters are cut
            where it is more. `None` chooses them.
        implementation: `"factorized"` applies one factor after the other, `"materialized"`
            forms the kernel first; `"auto"` takes the faster way by a model that is
            fitted to measurements of convolutions on this backend; on a GPU it forms all
            kernels but large ones.
        pattern: which factor has the window. `"channel"` gives it to the right factor;
            `"spatial"` gives its first axis to the left factor and the others to the right
            factor; `"auto"` is `"channel"`.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch_size, depth, rows, columns, channels)`, or with the channels first.

    Output shape:
        `(batch_size, new_depth, new_rows, new_columns, filters)`, likewise.

    Raises:
        ValueError: if an argument is not valid, as in the stock layer, or if the input does
            not fit.

    Example:

    >>> layer = BilinearConv3DTranspose(32, 3, strides=2, padding="same", rank=2)
    >>> layer(np.ones((2, 4, 4, 4, 64), "float32")).shape == (2, 8, 8, 8, 32)
    True
    >>> layer.count_params()  # a Conv3DTranspose layer has 55,328
    1888

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    # As in the stock layer, the data format comes before the padding of the outputs.
    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        data_format: str | None = None,
        output_padding: int | Sequence[int] | None = None,
        dilation_rate: int | Sequence[int] = 1,
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
            filters=filters,
            kernel_size=kernel_size,
            strides=strides,
            padding=padding,
            output_padding=output_padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            rank=rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
            pattern=pattern,
            **kwargs,
        )
