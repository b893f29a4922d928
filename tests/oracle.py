"""What the package computes, once more, in float64 NumPy and with the full kernel."""

import numpy as np
from keras import ops


def kronecker_sum(left, right):
    terms = zip(np.asarray(left, "float64"), np.asarray(right, "float64"), strict=True)
    return sum(np.kron(*term) for term in terms)


def factor_gradients(kernel_gradient, left, right):
    """Gradients of the factors of a Kronecker sum, from the gradient of the sum."""
    sizes = [size for pair in zip(left.shape[1:], right.shape[1:], strict=True) for size in pair]
    gradient = np.asarray(kernel_gradient, "float64").reshape(sizes)
    of_left, of_right = (range(side, len(sizes), 2) for side in (0, 1))
    return (
        np.array([np.tensordot(gradient, term, (of_right, range(term.ndim))) for term in right]),
        np.array([np.tensordot(gradient, term, (of_left, range(term.ndim))) for term in left]),
    )


def factors(layer):
    return tuple(
        ops.convert_to_numpy(variable).astype("float64")
        for variable in (layer.left_kernel, layer.right_kernel)
    )


def full_kernel(layer):
    """The kernel of a layer: padding is at the end of the channels of each group."""
    factorization = layer.factorization
    kernel = layer._kernel.gain * kronecker_sum(*factors(layer))
    by_group = (*kernel.shape[:-1], factorization.blocks, factorization.padded_output_dim)
    kernel = kernel.reshape(by_group)[..., : factorization.input_dim, :, : factorization.output_dim]
    return kernel.reshape(factorization.full_shape)


def pad_like(kernel, factorization):
    """Pads a full kernel with zeros to the size that the factors hold."""
    kernel = kernel.reshape(*kernel.shape[:-1], factorization.blocks, factorization.output_dim)
    padding = [(0, 0)] * kernel.ndim
    padding[-3] = (0, factorization.padded_input_dim - factorization.input_dim)
    padding[-1] = (0, factorization.padded_output_dim - factorization.output_dim)
    padded = np.pad(kernel, padding)
    return padded.reshape(
        *padded.shape[:-2], factorization.blocks * factorization.padded_output_dim
    )


def gate_kernels(kernel):
    """The full kernel of each gate of a `GateKernel`, and the factors of each, gain left out."""
    left, right = (
        ops.convert_to_numpy(variable).astype("float64") for variable in (kernel.left, kernel.right)
    )
    factorization = kernel.factorization
    full = [
        kernel.gain * kronecker_sum(*pair)[: factorization.input_dim, : factorization.output_dim]
        for pair in zip(left, right, strict=True)
    ]
    return full, left, right
