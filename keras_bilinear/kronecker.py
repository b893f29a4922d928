"""Pure functions of a Kronecker sum `W = sum_r kron(L_r, R_r)`, over `keras.ops`.

`left` has the shape `(rank, d1, u1)` and `right` `(rank, d2, u2)`; those of a
convolution have a window before the channels. Nothing here knows of layers,
padding or dtypes.
"""

import functools
import math
import operator

from keras import ops

from keras_bilinear.runtime import EXPORTED, holds_integers, on_gpu, runtime

# On a CPU XLA is slow at one small product of matrices for each row, in its gradient.
# Up to this rank a sum of outer products is as fast going forward and trains faster.
_MOST_OUTER_PRODUCTS = 4


def project(x, left, right, order):
    """Multiplies rows by the Kronecker sum without forming it: `Y = sum_r L_r^T X R_r`.

    A sum of any rank takes two contractions: the terms are laid side by side
    in the first and summed over in the second.

    Args:
        x: `(..., d1 * d2)`.
        left: `(rank, d1, u1)`.
        right: `(rank, d2, u2)`.
        order: the side to contract first, `"left"` or `"right"`.

    Returns:
        `(n, u1 * u2)`, where `n` is the product of the leading dimensions of `x`.
    """
    (y,) = projection(left[None], right[None], order)(x)
    return y


def projection(left, right, order):
    """Prepares the projection of rows by several Kronecker sums, those of the gates of a cell.

    The first contraction is one for all gates, the second one for each.

    Args:
        left: `(gates, rank, d1, u1)`.
        right: `(gates, rank, d2, u2)`.
        order: the side to contract first, `"left"` or `"right"`.

    Returns:
        A function from `(..., d1 * d2)` to a list, one for each gate, of
        `(n, u1 * u2)`. What it needs of the factors alone is computed already.
    """
    # Numbers, where those that PyTorch traces are tensors.
    gates, rank, d1, u1 = map(int, left.shape)
    d2, u2 = map(int, right.shape[2:])
    if order == "left":
        left = ops.reshape(ops.transpose(left, (0, 3, 1, 2)), (gates * u1 * rank, d1))
        right = _unstack(ops.reshape(right, (gates, rank * d2, u2)))

        def apply(x):
            x = _split(_multiply_each(left, ops.reshape(x, (-1, d1, d2))), gates, axis=1)
            for part, matrix in zip(x, right, strict=True):
                yield ops.matmul(ops.reshape(part, (-1, rank * d2)), matrix)
    else:
        right = ops.reshape(ops.transpose(right, (2, 0, 1, 3)), (d2, gates * rank * u2))
        left = _unstack(ops.reshape(ops.transpose(left, (0, 3, 2, 1)), (gates, u1, d1 * rank)))

        def apply(x):
            x = ops.reshape(ops.matmul(ops.reshape(x, (-1, d2)), right), (-1, d1, right.shape[1]))
            for part, matrix in zip(_split(x, gates, axis=2), left, strict=True):
                yield _multiply_each(matrix, ops.reshape(part, (-1, d1 * rank, u2)))

    return lambda x: [ops.reshape(y, (-1, u1 * u2)) for y in apply(x)]


def _unstack(x):
    return [x[i] for i in range(x.shape[0])]


def _split(x, count, axis):
    return [x] if count == 1 else ops.split(x, count, axis)


def _multiply_each(matrix, x):
    """`matrix @ x[i]` for each of the matrices in `x`: `(m, p), (n, p, q) -> (n, m, q)`."""
    m, p = matrix.shape
    n, _, q = x.shape
    if q == 1:  # the factors of a kernel of low rank: one plain product
        return ops.reshape(ops.matmul(ops.reshape(x, (-1, p)), ops.transpose(matrix)), (-1, m, 1))
    if n == 1 and runtime() in ("tensorflow", "jax"):  # likewise; PyTorch does so by itself
        return ops.reshape(ops.matmul(matrix, ops.reshape(x, (p, q))), (1, m, q))
    # XLA likes one large matrix product and fuses the transposes around it; LiteRT
    # quantizes and runs best the products whose right operand is a constant matrix.
    # The others call one library kernel per op and like it batched.
    if runtime() not in ("jax", EXPORTED):
        return ops.matmul(matrix, x)
    y = ops.matmul(ops.reshape(ops.transpose(x, (0, 2, 1)), (-1, p)), ops.transpose(matrix))
    return ops.transpose(ops.reshape(y, (-1, q, m)), (0, 2, 1))


def rows(indices, left, right):
    """Rows of the Kronecker sum: `L[i // d2] x R[i % d2]`, two gathers and a product.

    Args:
        indices: integers of any shape.
        left: `(rank, d1, u1)`.
        right: `(rank, d2, u2)`.

    Returns:
        `(n, u1 * u2)`, where `n` is the number of indices.
    """
    rank, d1, u1 = left.shape
    _, d2, u2 = right.shape
    indices = ops.reshape(indices, (-1,))
    if d2 == 1:  # every index has the same row of the right factor
        left = ops.reshape(ops.transpose(left, (1, 2, 0)), (d1, u1 * rank))
        left = ops.reshape(ops.take(left, indices, axis=0), (-1, rank))
        return ops.reshape(ops.matmul(left, ops.reshape(right, (rank, u2))), (-1, u1 * u2))
    if 1 < rank <= _MOST_OUTER_PRODUCTS and runtime() == "jax" and not on_gpu():
        terms = zip(ops.split(left, rank), ops.split(right, rank), strict=True)
        return functools.reduce(operator.add, (rows(indices, *term) for term in terms))
    quotient = ops.floor_divide(indices, d2)
    remainder = ops.subtract(indices, ops.multiply(quotient, d2))
    # Backends have their fastest gather, and its gradient, for matrices.
    left = ops.reshape(ops.transpose(left, (1, 2, 0)), (d1, u1 * rank))
    right = ops.reshape(ops.transpose(right, (1, 0, 2)), (d2, rank * u2))
    left = ops.reshape(ops.take(left, quotient, axis=0), (-1, u1, rank))
    right = ops.reshape(ops.take(right, remainder, axis=0), (-1, rank, u2))
    # PyTorch and LiteRT, with integers above all, are slow at matmul for an outer product.
    outer = rank == 1 and runtime() in ("torch", EXPORTED)
    product = ops.multiply if outer else ops.matmul
    return ops.reshape(product(left, right), (-1, u1 * u2))


def convolve(x, left, right, order, groups=1, **options):
    """Convolves by the Kronecker sum without forming it.

    Each factor is a convolution of its own share of the channels, with the other
    share folded into the batch or, in a file, into the positions; no patches are
    extracted. A factor whose window is 1 along each axis is a matrix product.

    Args:
        x: `(n, *positions, groups, d1, d2)`.
        left: `(rank, *left_window, d1, groups * u1)`.
        right: `(rank, *right_window, d2, u2)`.
        order: the factor to apply first, `"left"` or `"right"`.
        groups: number of groups of channels.
        **options: `strides`, `dilation_rate` (one number an axis) and `padding`
            of the whole convolution.

    Returns:
        `(n, *new_positions, groups, u1, u2)`.
    """
    rank, *left_window, d1, u1 = left.shape
    d2, u2 = right.shape[-2:]
    sizes = {"rank": rank, "group": groups, "d1": d1, "d2": d2, "u1": u1 // groups, "u2": u2}
    axes = tuple(range(len(left_window)))
    x = _Named(x, ("n", *axes, "group", "d1", "d2"), sizes)
    left = _Named(left, ("rank", *axes, "d1", ("group", "u1")), sizes)
    right = _Named(right, ("rank", *axes, "d2", "u2"), sizes)
    # The stride along an axis is the business of the factor with the window there.
    of_left = [size > 1 for size in left_window]
    of_right = [not mine for mine in of_left]
    left_options, right_options = _on_axes(of_left, **options), _on_axes(of_right, **options)
    apply_left = _convolve_groups if any(of_left) else _multiply
    if order == "left":
        x = apply_left(x, left, ("d1",), ("u1", "rank"), axes, "d2", left_options)
        inputs = _with_terms("d2")
        x = _convolve(x, right, inputs, ("u2",), axes, ("n", "group", "u1"), right_options)
    else:
        outputs = _with_terms("u2")
        x = _convolve(x, right, ("d2",), outputs, axes, ("n", "group", "d1"), right_options)
        x = apply_left(x, left, ("d1", "rank"), ("u1",), axes, "u2", left_options)
    return x.merge("n", *axes, "group", "u1", "u2")


class _Named:
    """A tensor that goes by the names of its axes, whatever their order in memory."""

    def __init__(self, tensor, axes, sizes):
        """Names the axes of `tensor`; one of several names is split, by their `sizes`."""
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
        """The tensor with these axes, each a name or a tuple of names to make one axis of."""
        groups = [group if isinstance(group, tuple) else (group,) for group in groups]
        order = [self.names.index(name) for group in groups for name in group]
        tensor = self.tensor
        if order != sorted(order):
            tensor = ops.transpose(tensor, order)
        if len(groups) == len(order) == len(self.names):
            return tensor
        return ops.reshape(tensor, [math.prod(self.sizes[n] for n in group) for group in groups])

    def pick(self, name, index):
        """The part at one index of an axis."""
        tensor = ops.take(self.tensor, index, axis=self.names.index(name))
        return _Named(tensor, tuple(n for n in self.names if n != name), self.sizes)


def _on_axes(mine, strides, dilation_rate, padding):
    return {
        "strides": tuple(s if its else 1 for s, its in zip(strides, mine, strict=True)),
        "dilation_rate": tuple(d if its else 1 for d, its in zip(dilation_rate, mine, strict=True)),
        "padding": padding,
        "data_format": "channels_last",
    }


def _with_terms(name):
    """The channels of a right factor together with the terms, in the order of their axes.

    The transposes of a LiteRT file take the least time like this: those of floats with
    the channels innermost, those of integers with the terms.
    """
    return (name, "rank") if holds_integers() else ("rank", name)


def _convolve(x, kernel, inputs, outputs, axes, batch, options, group=()):
    """Convolves the channels `inputs` to `outputs`, with the axes `batch` folded into the batch.

    In a file all but the first of these are folded into the last axis of positions
    instead, beside which they lie in memory: a window that is dilated by their number
    meets the same one of them at each place.
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

    It saves a file transposes. But those that are left take longer for integers of rank 1.
    """
    if runtime() != EXPORTED or (holds_integers() and rank == 1):
        return False
    # ONNX files made of sizes that are not known do not run; three axes were not measured.
    if len(positions) > 2 or not all(isinstance(size, int) for size in positions):
        return False
    *_, stride = strides = options["strides"]
    if window == 1:
        return stride == 1
    # Dilation needs strides of 1, and padding that is the same on both sides.
    symmetric = options["padding"] == "valid" or window % 2
    return symmetric and max(strides) == 1


def _convolve_groups(x, kernel, inputs, outputs, axes, other, options):
    """Convolves as `_convolve`, with a kernel for each group."""
    if x.sizes["group"] == 1:
        return _convolve(x, kernel, inputs, outputs, axes, ("n", other), options, ("group",))
    parts = [
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
    y = ops.stack([part.tensor for part in parts])
    return _Named(y, ("group", *parts[0].names), _without(x.sizes, axes))


def _multiply(x, kernel, inputs, outputs, axes, other, options):
    """Contracts with a left factor without a window: a matrix product."""
    if x.sizes["group"] == x.sizes[other] == 1:  # with the channels last, as they are
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
    """The sizes but for those that a convolution changes."""
    return {name: size for name, size in sizes.items() if name not in axes}


def materialize(left, right):
    """The Kronecker sum itself, `(*window, d1 * d2, u1 * u2)`."""
    rank, *left_window, d1, u1 = left.shape
    *right_window, d2, u2 = right.shape[1:]
    left = ops.transpose(ops.reshape(left, (rank, -1)))
    kernel = ops.matmul(left, ops.reshape(right, (rank, -1)))
    kernel = ops.reshape(kernel, (*left_window, d1, u1, *right_window, d2, u2))
    # Each axis of the left factor comes to stand before its counterpart of the right one.
    half = len(left_window) + 2
    kernel = ops.transpose(kernel, [side + i for i in range(half) for side in (0, half)])
    window = [a * b for a, b in zip(left_window, right_window, strict=True)]
    return ops.reshape(kernel, (*window, d1 * d2, u1 * u2))


def materialize_gates(left, right):
    """The Kronecker sums of the gates of a cell, side by side: `(d1 * d2, gates, u1 * u2)`.

    Args:
        left: `(gates, rank, d1, u1)`.
        right: `(gates, rank, d2, u2)`.
    """
    gates, rank, d1, u1 = left.shape
    d2, u2 = right.shape[2:]
    left = ops.transpose(ops.reshape(left, (gates, rank, d1 * u1)), (0, 2, 1))
    kernel = ops.matmul(left, ops.reshape(right, (gates, rank, d2 * u2)))
    kernel = ops.transpose(ops.reshape(kernel, (gates, d1, u1, d2, u2)), (1, 3, 0, 2, 4))
    return ops.reshape(kernel, (d1 * d2, gates, u1 * u2))


def transpose(left, right):
    """The factors of the transposed kernel: the Kronecker product transposes factor by factor."""
    return ops.transpose(left, (0, 2, 1)), ops.transpose(right, (0, 2, 1))
