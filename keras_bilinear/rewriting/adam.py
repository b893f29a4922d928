"""What Adam and its kin are to know of factors that it meets in the middle of a training.

Adam keeps means of the gradients and of their squares. They begin at zero, and are
divided by what is missing from them after as many iterations as the optimizer has done.
For variables that come late nothing seems to be missing: the mean of the squares is far
too small and the steps are several times too large, for hundreds of steps, which ruins a
network that was rewritten well. So the squares of new factors begin with an estimate from
what is known of the kernel, or of the factors, in whose place they are.
"""

import keras
import numpy as np
from keras import ops

from keras_bilinear.kronecker.nearest import arrange
from keras_bilinear.layers.converter import full_converter, is_bilinear
from keras_bilinear.rewriting.sites import walk

# A rewritten network has larger gradients at first, and too much costs less than too little:
# see `benchmarks/first_steps.py`.
CAUTION = 4.0


def of_kernels(model: keras.Model, moments: dict) -> dict:
    """What an optimizer knows of layers that have, or may get, factors: kernels and biases.

    Args:
        model: the model.
        moments: by ids of variables the means of their gradients and of the squares.

    Returns:
        `{(path of the layer, name of the kernel or bias): (mean, squares)}`, in the shapes
        that factorizations of the kernels have. For factors, squares are as if each were the
        product of one number of a left and one of a right factor, and the mean is `None`.
    """
    found = {}
    for path, layer, holder in _layers(model):
        if is_bilinear(layer):
            for name, kernel in layer.kernels.items():
                if id(kernel.left) in moments and id(kernel.right) in moments:
                    squares = (moments[id(one)][1] for one in (kernel.left, kernel.right))
                    found[path, name] = None, _squares_of_kernel(kernel, *squares)
        elif converter := full_converter(type(layer)):
            for name in converter.kernel_names:
                if (key := id(getattr(holder, name, None))) in moments:
                    found[path, name] = tuple(
                        converter.to_matrix(layer, values) for values in moments[key]
                    )
        else:
            continue
        if (key := id(getattr(holder, "bias", None))) in moments:
            found[path, "bias"] = moments[key]
    return found


def of_factors(model: keras.Model, known: dict) -> dict:
    """Mean squares of the gradients of factors and of the biases with them.

    Args:
        model: the model, with the factors.
        known: what `of_kernels` found before it had them.

    Returns:
        The squares by the ids of the variables.
    """
    found = {}
    for path, layer, holder in _layers(model):
        if not is_bilinear(layer):
            continue
        for name, kernel in layer.kernels.items():
            if (path, name) in known:
                left, right = _squares_of_factors(kernel, *known[path, name])
                found |= {id(kernel.left): left, id(kernel.right): right}
        if (path, "bias") in known:
            _, found[id(holder.bias)] = known[path, "bias"]
    return {key: CAUTION * squares for key, squares in found.items()}


def _layers(model):
    """Paths, layers, and what has their weights: of recurrent layers the cells."""
    for site in walk(model):
        yield site.path, site.layer, getattr(site.layer, "cell", site.layer)


def _squares_of_kernel(kernel, left, right):
    """Mean squares of the gradients of a kernel from those of its factors."""
    axis = 0 if kernel.factorization.share_right else 1  # that of the terms
    left, right = left.sum(axis, keepdims=True), right.sum(axis, keepdims=True)
    size = 1.0
    for squares, factor in ((left, kernel.left), (right, kernel.right)):
        factor = np.square(_stored(factor)).sum(axis, keepdims=True)
        size = size * (squares * factor).sum(tuple(range(axis, factor.ndim)), keepdims=True)
    # The sums of what they give for the factors are those that the factors have.
    scale = np.divide(1, np.sqrt(size), out=np.zeros_like(size), where=size > 0)
    return ops.convert_to_numpy(kernel.full(left * scale, right))


def _squares_of_factors(kernel, mean, squares):
    """Mean squares of the gradients of the stored factors of a kernel, left and right.

    They would follow from those of the kernel if its numbers had independent gradients. As
    they have not, the sums are corrected by the means, which the chain rule gives exactly:
    sums of squares keep their ratio to the squares of the means.
    """
    factors = [_stored(factor) for factor in (kernel.left, kernel.right)]
    found = pull_back(kernel, squares, *map(np.square, factors))
    if mean is None or not (energy := _energy(mean)):
        return found
    ratio = float(squares.sum()) / energy
    return tuple(
        one * (ratio * _energy(its_mean) / total) if (total := float(one.sum())) else one
        for one, its_mean in zip(found, pull_back(kernel, mean, *factors), strict=True)
    )


def _energy(values):
    return float(np.square(values).sum())


def pull_back(kernel, values, left, right):
    """Gradients of factors from one of their kernel: the chain rule, without the gain.

    Args:
        kernel: a `KroneckerKernel`, of which only the shapes matter.
        values: gradient of the kernel, of `factorization.full_shape`.
        left, right: the factors.

    Returns:
        The gradients of `left` and of `right`.
    """
    plan = kernel.factorization
    count, rank = plan.blocks, plan.rank
    blocks = np.split(values.reshape(-1, values.shape[-1]), count, axis=1)
    blocks = np.stack([arrange(block, plan.block) for block in blocks])
    _, a, b, u, v = blocks.shape
    if plan.share_right:
        lefts = left.reshape(rank, a, count, u).transpose(2, 0, 1, 3)
        rights = np.broadcast_to(right.reshape(rank, b, v), (count, rank, b, v))
    else:
        lefts, rights = left.reshape(count, rank, a, u), right.reshape(count, rank, b, v)
    of_lefts = np.einsum("gabuv,grbv->grau", blocks, rights, optimize=True)
    of_rights = np.einsum("gabuv,grau->grbv", blocks, lefts, optimize=True)
    if plan.share_right:
        of_lefts, of_rights = of_lefts.transpose(1, 2, 0, 3), of_rights.sum(0)
    return of_lefts.reshape(left.shape), of_rights.reshape(right.shape)


def _stored(factor):
    return ops.convert_to_numpy(factor).astype("float32")
