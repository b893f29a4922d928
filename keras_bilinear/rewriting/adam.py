"""What Adam starts with for factors that replace a kernel in the middle of a training.

Adam keeps means of the gradients and of their squares. Both begin at zero, and Adam corrects
them by the number of its iterations. After many iterations the correction is nothing, so for
a new variable the mean of the squares is far too small. The steps are then several times too
large, for hundreds of steps, and ruin a network that was rewritten well. So the mean squares
of new factors begin with an estimate, made from the mean squares of the kernel, or of the
factors, that they replace.
"""

import keras
import numpy as np
from keras import ops

from keras_bilinear.kronecker.nearest import arrange
from keras_bilinear.layers.converter import converter_of, full_converter, is_bilinear
from keras_bilinear.layers.kernel import KroneckerKernel
from keras_bilinear.rewriting.sites import walk

# A rewritten network has larger gradients at first, and too much costs less than too little:
# see `benchmarks/first_steps.py`.
CAUTION = 4.0


def of_kernels(model: keras.Model, moments: dict) -> dict:
    """The moments of the weights of all layers that have, or may get, factors.

    Args:
        model: the model.
        moments: the means of the gradients and of their squares, by ids of variables.

    Returns:
        `{(path of the layer, name of the weight): (mean, squares)}`. A kernel has
        the shape `Factorization.full_shape`. Where the layer has factors already, the
        squares are an estimate, products of those of the left and of the right factor, and
        the mean is `None`.
    """
    found = {}
    for path, layer, converter in _layers(model):
        holder = converter.holder(layer)
        if is_bilinear(layer):
            for name, kernel in layer.kernels.items():
                if id(kernel.left) in moments and id(kernel.right) in moments:
                    squares = (moments[id(factor)][1] for factor in (kernel.left, kernel.right))
                    found[path, name] = None, _squares_of_kernel(kernel, *squares)
        else:
            for name in converter.kernel_names:
                if (key := id(getattr(holder, name, None))) in moments:
                    found[path, name] = tuple(
                        converter.to_matrix(layer, values) for values in moments[key]
                    )
        for name in converter.shared_names:
            if (key := id(getattr(holder, name, None))) in moments:
                found[path, name] = moments[key]
    return found


def of_factors(model: keras.Model, known: dict) -> dict:
    """The mean squares that the weights of rewritten layers begin with.

    Args:
        model: the model, with factors.
        known: what `of_kernels` found before the rewrite.

    Returns:
        The mean squares by the ids of the variables.
    """
    found = {}
    for path, layer, converter in _layers(model):
        if not is_bilinear(layer):
            continue
        for name, kernel in layer.kernels.items():
            if (path, name) in known:
                left, right = _squares_of_factors(kernel, *known[path, name])
                found |= {id(kernel.left): left, id(kernel.right): right}
        for name in converter.shared_names:
            if (path, name) in known:
                _, found[id(getattr(converter.holder(layer), name))] = known[path, name]
    return {key: CAUTION * squares for key, squares in found.items()}


def _layers(model):
    """Path, layer and converter of all layers that have one."""
    for site in walk(model):
        if is_bilinear(site.layer) or full_converter(type(site.layer)):
            yield site.path, site.layer, converter_of(site.layer)


def _squares_of_kernel(kernel, left, right):
    """Mean squares of the gradients of a kernel from those of its factors."""
    axis = 0 if kernel.factorization.share_right else 1  # of the terms
    left, right = left.sum(axis, keepdims=True), right.sum(axis, keepdims=True)
    size = 1.0
    for squares, factor in ((left, kernel.left), (right, kernel.right)):
        factor = np.square(_stored(factor)).sum(axis, keepdims=True)
        size = size * (squares * factor).sum(tuple(range(axis, factor.ndim)), keepdims=True)
    # The chain rule leads from these squares back to the sums that the factors have.
    scale = np.divide(1, np.sqrt(size), out=np.zeros_like(size), where=size > 0)
    return ops.convert_to_numpy(kernel.full(left * scale, right))


def _squares_of_factors(kernel, mean, squares):
    """Mean squares of the gradients of the stored factors of a kernel, left and right.

    They would follow from the squares of the kernel if its numbers had independent gradients.
    These are not independent. So the sums are corrected by the means, which the chain rule
    gives exactly: sums of squares keep their ratio to the squares of the means.

    A term that starts with a zero factor has gradients as soon as this factor has moved. Its
    squares are those of a factor as large as the other factor.
    """
    factors = [_stored(factor) for factor in (kernel.left, kernel.right)]
    found = pull_back(kernel, squares, *map(np.square, factors))
    scales = [1.0, 1.0]
    if mean is not None and (energy := _energy(mean)):
        ratio = float(squares.sum()) / energy
        scales = [
            ratio * _energy(its_mean) / total if (total := float(its_squares.sum())) else 1.0
            for its_squares, its_mean in zip(found, pull_back(kernel, mean, *factors), strict=True)
        ]
    moving = pull_back(kernel, squares, *_without_zeros(kernel, *map(np.square, factors)))
    return tuple(
        scale * np.where(its_squares, its_squares, its_later)
        for scale, its_squares, its_later in zip(scales, found, moving, strict=True)
    )


def _without_zeros(kernel, left, right):
    """The squares of both factors; where a term of one is zero, the mean of the other's term."""
    terms = 1 if kernel.factorization.share_right else 2
    of_left, of_right = (
        factor.mean(tuple(range(terms, factor.ndim)), keepdims=True) for factor in (left, right)
    )
    return np.where(of_left, left, of_right), np.where(of_right, right, of_left)


def _energy(values):
    return float(np.square(values).sum())


def pull_back(
    kernel: KroneckerKernel, values: np.ndarray, left: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of both factors from the gradient of their kernel, without the gain.

    Args:
        kernel: a `KroneckerKernel`; only its shapes matter.
        values: gradient of the kernel, of shape `factorization.full_shape`.
        left: the left factor.
        right: the right factor.

    Returns:
        The gradients of `left` and of `right`.
    """
    factorization = kernel.factorization
    count, rank = factorization.blocks, factorization.rank
    blocks = np.split(values.reshape(-1, values.shape[-1]), count, axis=1)
    blocks = np.stack([arrange(block, factorization.block) for block in blocks])
    _, a, b, u, v = blocks.shape
    if factorization.share_right:
        lefts = left.reshape(rank, a, count, u).transpose(2, 0, 1, 3)
        rights = np.broadcast_to(right.reshape(rank, b, v), (count, rank, b, v))
    else:
        lefts, rights = left.reshape(count, rank, a, u), right.reshape(count, rank, b, v)
    of_lefts = np.einsum("gabuv,grbv->grau", blocks, rights, optimize=True)
    of_rights = np.einsum("gabuv,grau->grbv", blocks, lefts, optimize=True)
    if factorization.share_right:
        of_lefts, of_rights = of_lefts.transpose(1, 2, 0, 3), of_rights.sum(0)
    return of_lefts.reshape(left.shape), of_rights.reshape(right.shape)


def _stored(factor):
    return ops.convert_to_numpy(factor).astype("float32")
