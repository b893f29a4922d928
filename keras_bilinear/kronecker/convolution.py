"""Convolutions by the factors of a kernel, one after the other.

`convolve` is the convolution, `convolve_transpose` its adjoint and `convolve_gates` several
convolutions of the same inputs. They keep track of axes by their names (`_Named`), as the fastest
order of the axes in memory depends on the runtime.
"""

import math
from typing import Any

from keras import ops

from keras_bilinear.kronecker import Tensor
from keras_bilinear.kronecker.factorization import Order
from keras_bilinear.kronecker.target import EXPORTED, holds_integers, runtime

# LiteRT's library for floats, XNNPACK, transposes no tensors with more axes.
_MOST_AXES_IN_A_FILE = 6


def convolve(
    x: Tensor, left: Tensor, right: Tensor, order: Order, groups: int = 1, **options: Any
) -> Tensor:
    """Convolves by the Kronecker sum without forming it.

    Each factor convolves its own share of the channels. The other share is folded into the
    batch or, in an exported file, into the positions; no patches are extracted. A factor
    whose window is 1 along each axis is a matrix product.

    Args:
        x: `(n, *positions, groups, d1, d2)`.
        left: `(rank, *left_window, d1, groups * u1)`.
        right: `(rank, *right_window, d2, u2)`.
        order: an `Order`, not `MATERIALIZED`.
        groups: number of groups of channels.
        **options: `strides` and `dilation_rate` (one number for each spatial axis) and
            `padding` of the whole convolution.

    Returns:
        `(n, *new_positions, groups, u1, u2)`.
    """
    return _convolve_twice(x, left, right, order, groups, options)


def convolve_transpose(
    x: Tensor, left: Tensor, right: Tensor, order: Order, groups: int = 1, **options: Any
) -> Tensor:
    """Convolves, transposed, by the Kronecker sum without forming it.

    Like `convolve`: each factor that has a window is a transposed convolution of its own share
    of the channels.

    Args:
        x: `(n, *positions, 1, d1, d2)`.
        left: `(rank, *left_window, d1, u1)`.
        right: `(rank, *right_window, d2, u2)`.
        order: an `Order`, not `MATERIALIZED`.
        groups: number of groups of channels, which must be 1.
        **options: `strides`, `dilation_rate` (one number for each spatial axis),
            `output_padding` (likewise, or `None`) and `padding` of the whole transposed
            convolution.

    Returns:
        `(n, *new_positions, 1, u1, u2)`.
    """
    return _convolve_twice(x, left, right, order, groups, options, transposed=True)


def convolve_gates(
    x: Tensor, left: Tensor, right: Tensor, order: Order, **options: Any
) -> list[Tensor]:
    """Convolves by several Kronecker sums, one for each gate of a cell.

    Like `convolve`. The factors that come first are one operation for all gates; the factors
    that come second are an operation for each gate.

    Args:
        x: `(n, *positions, 1, d1, d2)`.
        left: `(gates, rank, *left_window, d1, u1)`.
        right: `(gates, rank, *right_window, d2, u2)`.
        order: an `Order`, not `MATERIALIZED`.
        **options: `strides`, `dilation_rate` (one number for each spatial axis) and `padding`.

    Returns:
        A list with a tensor of `(n, *new_positions, 1, u1, u2)` for each gate.
    """
    gates, rank, *left_window, d1, u1 = left.shape
    d2, u2 = right.shape[-2:]
    sizes = {"gate": gates, "rank": rank, "group": 1, "d1": d1, "d2": d2, "u1": u1, "u2": u2}
    axes = tuple(range(len(left_window)))
    x = _Named(x, ("n", *axes, "group", "d1", "d2"), sizes)
    left = _Named(left, ("gate", "rank", *axes, "d1", ("group", "u1")), sizes)
    right = _Named(right, ("gate", "rank", *axes, "d2", "u2"), sizes)
    has_left_window, left_options, right_options = _share_options(left_window, options)
    apply_left = _convolve_groups if has_left_window else _multiply
    if order is Order.LEFT_FIRST:
        x = apply_left(x, left, ("d1",), ("gate", "u1", "rank"), axes, "d2", left_options)
        inputs, batch = _with_terms("d2"), ("n", "group", "u1")
        outputs = [
            _convolve(of_gate, kernel, inputs, ("u2",), axes, batch, right_options)
            for of_gate, kernel in zip(x.unstack("gate"), right.unstack("gate"), strict=True)
        ]
    else:
        channels, batch = ("gate", *_with_terms("u2")), ("n", "group", "d1")
        x = _convolve(x, right, ("d2",), channels, axes, batch, right_options)
        outputs = [
            apply_left(of_gate, kernel, ("d1", "rank"), ("u1",), axes, "u2", left_options)
            for of_gate, kernel in zip(x.unstack("gate"), left.unstack("gate"), strict=True)
        ]
    return [of_gate.merge("n", *axes, "group", "u1", "u2") for of_gate in outputs]


def _convolve_twice(x, left, right, order, groups, options, transposed=False):
    """Convolves by both factors, each along the axes on which it has a window."""
    convolve_left = _convolve_transposed_groups if transposed else _convolve_groups
    convolve_right = _convolve_transposed if transposed else _convolve
    rank, *left_window, d1, u1 = left.shape
    d2, u2 = right.shape[-2:]
    sizes = {"rank": rank, "group": groups, "d1": d1, "d2": d2, "u1": u1 // groups, "u2": u2}
    axes = tuple(range(len(left_window)))
    x = _Named(x, ("n", *axes, "group", "d1", "d2"), sizes)
    left = _Named(left, ("rank", *axes, "d1", ("group", "u1")), sizes)
    right = _Named(right, ("rank", *axes, "d2", "u2"), sizes)
    has_left_window, left_options, right_options = _share_options(left_window, options)
    apply_left = convolve_left if has_left_window else _multiply
    if order is Order.LEFT_FIRST:
        x = apply_left(x, left, ("d1",), ("u1", "rank"), axes, "d2", left_options)
        inputs = _with_terms("d2")
        x = convolve_right(x, right, inputs, ("u2",), axes, ("n", "group", "u1"), right_options)
    else:
        outputs = _with_terms("u2")
        x = convolve_right(x, right, ("d2",), outputs, axes, ("n", "group", "d1"), right_options)
        x = apply_left(x, left, ("d1", "rank"), ("u1",), axes, "u2", left_options)
    return x.merge("n", *axes, "group", "u1", "u2")


def _share_options(left_window, options):
    """Whether the left factor has a window, and the options of the left and the right factor.

    Along each axis the factor with a window there strides.
    """
    of_left = [size > 1 for size in left_window]
    of_right = [not is_left for is_left in of_left]
    return any(of_left), _on_axes(of_left, **options), _on_axes(of_right, **options)


class _Named:
    """A tensor whose axes have names, whatever their order in memory."""

    def __init__(self, tensor, axes, sizes):
        """Names the axes of `tensor`. An axis with a tuple of names is split, by their `sizes`."""
        self.sizes = dict(sizes)
        names, shape = [], []
        for axis, size in zip(axes, ops.shape(tensor), strict=True):
            if isinstance(axis, tuple):
                names += axis
                shape += [sizes[name] for name in axis]
            else:
                names.append(axis)
                shape.append(size)
                self.sizes[axis] = size
        self.names = tuple(names)
        self.tensor = tensor if len(names) == len(axes) else ops.reshape(tensor, shape)

    def merge(self, *groups):
        """The tensor with these axes; the axes of a tuple of names become one axis."""
        groups = [group if isinstance(group, tuple) else (group,) for group in groups]
        order = [self.names.index(name) for group in groups for name in group]
        tensor = self.tensor
        if order != sorted(order):
            tensor = _transpose(tensor, order)
        if len(groups) == len(order) == len(tensor.shape):
            return tensor
        return ops.reshape(tensor, [math.prod(self.sizes[n] for n in group) for group in groups])

    def pick(self, name, index):
        """The tensor at one index of an axis, without that axis."""
        tensor = ops.take(self.tensor, index, axis=self.names.index(name))
        return _Named(tensor, tuple(n for n in self.names if n != name), self.sizes)

    def unstack(self, name):
        """The tensors at all indices of an axis, without that axis."""
        tensors = ops.unstack(self.tensor, axis=self.names.index(name))
        names = tuple(n for n in self.names if n != name)
        return [_Named(tensor, names, self.sizes) for tensor in tensors]


def _transpose(x, order):
    """`x` with its axes in another order. In a file, axes that stay neighbours may become one."""
    shape = ops.shape(x)
    # ONNX files made of sizes that are not known do not run.
    is_known = all(isinstance(size, int) for size in shape)
    if len(order) <= _MOST_AXES_IN_A_FILE or runtime() != EXPORTED or not is_known:
        return ops.transpose(x, order)
    runs = []
    for axis in order:
        if runs and axis == runs[-1][-1] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    first = sorted(runs)
    x = ops.reshape(x, [math.prod(shape[axis] for axis in run) for run in first])
    return ops.transpose(x, [first.index(run) for run in runs])


def _on_axes(applies, strides, dilation_rate, padding, output_padding=None):
    """The options of the convolution by one factor, which strides on some of the axes."""
    options = {
        "strides": tuple(s if used else 1 for s, used in zip(strides, applies, strict=True)),
        "dilation_rate": tuple(
            d if used else 1 for d, used in zip(dilation_rate, applies, strict=True)
        ),
        "padding": padding,
        "data_format": "channels_last",
    }
    if output_padding is not None:
        pairs = zip(output_padding, applies, strict=True)
        options["output_padding"] = tuple(size if used else 0 for size, used in pairs)
    return options


def _with_terms(name):
    """The channels of a right factor together with the terms, in the order of their axes.

    The transposes of a LiteRT file take the least time like this: transposes of floats with
    the channels innermost, transposes of integers with the terms innermost.
    """
    return (name, "rank") if holds_integers() else ("rank", name)


def _convolve(x, kernel, inputs, outputs, axes, batch, options, group=()):
    """Convolves the channels `inputs` to `outputs`, with the axes `batch` folded into the batch.

    In a file, all but the first axis of `batch` are folded into the last axis of positions
    instead, beside which they lie in memory. A window that is dilated by their size meets
    the same index of them at each place.
    """
    n, *others = batch
    *first, last = axes
    window = kernel.sizes[last]
    beside = _folds_beside([x.sizes[axis] for axis in axes], window, x.sizes["rank"], options)
    if beside:
        spread = math.prod(x.sizes[name] for name in others)
        *dilation, own = options["dilation_rate"]
        if window > 1:
            options = {**options, "dilation_rate": (*dilation, own * spread)}
        batch, last = n, (last, *others)
    merged = x.merge(batch, *first, last, (*group, *inputs))
    kernel = kernel.merge(*axes, inputs, (*group, *outputs))
    # On PyTorch, Keras' products of float64 are float32.
    y = ops.conv(merged, ops.cast(kernel, merged.dtype), **options)
    sizes = _without(x.sizes, axes)
    if beside:
        sizes[axes[-1]] = y.shape[-2] // spread
    return _Named(y, (batch, *first, last, (*group, *outputs)), sizes)


def _folds_beside(positions, window, rank, options):
    """Whether a convolution leaves other channels beside the last axis of positions.

    It saves a file transposes. But for integers of rank 1 the transposes that stay take longer.
    """
    if runtime() != EXPORTED or (holds_integers() and rank == 1):
        return False
    # ONNX files with unknown sizes here do not run. Three axes were not measured.
    if len(positions) > 2 or not all(isinstance(size, int) for size in positions):
        return False
    *_, stride = strides = options["strides"]
    if window == 1:
        return stride == 1
    # Dilation needs strides of 1 and the same padding on both sides.
    symmetric = options["padding"] == "valid" or window % 2
    return symmetric and max(strides) == 1


def _convolve_groups(x, kernel, inputs, outputs, axes, other, options):
    """Convolves like `_convolve`, with a kernel for each group."""
    if x.sizes["group"] == 1:
        return _convolve(x, kernel, inputs, outputs, axes, ("n", other), options, ("group",))
    groups = [
        _convolve(
            x.pick("group", i),
            kernel.pick("group", i),
            inputs,
            outputs,
            axes,
            ("n", other),
            options,
        )
        for i in range(x.sizes["group"])
    ]
    y = ops.stack([group.tensor for group in groups])
    return _Named(y, ("group", *groups[0].names), _without(x.sizes, axes))


def _convolve_transposed(x, kernel, inputs, outputs, axes, batch, options, group=()):
    """Convolves, transposed, with the axes `batch` folded into the batch."""
    merged = x.merge(batch, *axes, (*group, *inputs))
    kernel = kernel.merge(*axes, (*group, *outputs), inputs)
    y = ops.conv_transpose(merged, ops.cast(kernel, merged.dtype), **options)
    return _Named(y, (batch, *axes, (*group, *outputs)), _without(x.sizes, axes))


def _convolve_transposed_groups(x, kernel, inputs, outputs, axes, other, options):
    """Convolves, transposed, by a left factor of a single group."""
    group = ("group",)
    return _convolve_transposed(x, kernel, inputs, outputs, axes, ("n", other), options, group)


def _multiply(x, kernel, inputs, outputs, axes, other, options):
    """Contracts with a left factor without a window: a matrix product."""
    if x.sizes["group"] == x.sizes[other] == 1:  # the channels are last already
        kernel = kernel.merge(("group", *axes, *inputs), outputs)
        y = ops.matmul(x.merge(("n", "group"), *axes, (*inputs, other)), kernel)
        return _Named(y, ("n", *axes, ("group", *outputs, other)), x.sizes)
    columns = (*axes, other)
    if x.sizes["group"] == 1 and runtime() == EXPORTED:
        rows = ("n", "group", *columns)
        y = ops.matmul(x.merge(rows, inputs), kernel.merge(("group", *axes, *inputs), outputs))
        return _Named(y, (rows, outputs), x.sizes)
    if x.sizes["group"] == 1:
        batch = (("n", "group"),)
        kernel = kernel.merge(("group", *axes, *outputs), inputs)
    else:
        batch = ("n", "group")
        kernel = kernel.merge("group", (*axes, *outputs), inputs)
    y = ops.matmul(kernel, x.merge(*batch, inputs, columns))
    return _Named(y, (*batch, outputs, columns), x.sizes)


def _without(sizes, axes):
    """The sizes without those that a convolution changes."""
    return {name: size for name, size in sizes.items() if name not in axes}
