"""Where the channels of images lie: last, or before the positions."""

from collections.abc import Callable

from keras import ops

from keras_bilinear.kronecker import Tensor


def channel_axis(data_format: str) -> int:
    """The axis of the channels, for inputs and outputs of a convolution."""
    return -1 if data_format == "channels_last" else 1


def with_channels_last(function: Callable, x: Tensor, data_format: str) -> Tensor:
    """What a function that takes the channels last makes of a tensor.

    Args:
        function: takes and returns a tensor of `(n, *positions, channels)`.
        x: a tensor, with the channels where `data_format` says.
        data_format: `"channels_last"` or `"channels_first"`.

    Returns:
        A tensor with the channels in the same place, of the dtype of `x`.
    """
    dtype, last = x.dtype, len(x.shape) - 1
    if data_format == "channels_last":
        return ops.cast(function(x), dtype)
    y = ops.cast(function(ops.transpose(x, (0, *range(2, last + 1), 1))), dtype)
    return ops.transpose(y, (0, last, *range(1, last)))


def add_bias(x: Tensor, bias: Tensor | None, data_format: str) -> Tensor:
    """Adds a number to each channel of a tensor; a bias of `None` adds nothing."""
    if bias is None:
        return x
    if data_format == "channels_first":
        bias = ops.reshape(bias, (1, -1) + (1,) * (len(x.shape) - 2))
    return ops.add(x, bias)
