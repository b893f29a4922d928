"""What the package computes, once more, in float64 NumPy and with the full kernel."""

import numpy as np
from keras import ops


def kronecker_sum(left, right):
    terms = zip(np.asarray(left, "float64"), np.asarray(right, "float64"), strict=True)
    return sum(np.kron(*term) for term in terms)


def factor_gradients(kernel_gradient, left, right):
    """Gradients of the factors of a Kronecker sum, from the gradient of the sum."""
    (_, d1, u1), (_, d2, u2) = left.shape, right.shape
    gradient = np.asarray(kernel_gradient, "float64").reshape(d1, d2, u1, u2)
    return np.einsum("ajbk,rjk->rab", gradient, right), np.einsum("ajbk,rab->rjk", gradient, left)


def factors(layer):
    return tuple(
        ops.convert_to_numpy(variable).astype("float64")
        for variable in (layer.left_kernel, layer.right_kernel)
    )


def full_kernel(layer):
    plan = layer.factorization
    return layer._kernel.gain * kronecker_sum(*factors(layer))[: plan.input_dim, : plan.output_dim]


def pad_like(array, factorization):
    """Pads a full kernel with zeros to the size that the factors hold."""
    padded = np.zeros((factorization.padded_input_dim, factorization.padded_output_dim))
    padded[: array.shape[0], : array.shape[1]] = array
    return padded
