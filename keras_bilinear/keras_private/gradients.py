"""Gradients of functions of tensors, on each backend.

Keras has no function of its own that takes a gradient, so this module calls TensorFlow, JAX or
PyTorch itself.
"""

from collections.abc import Callable

import keras
from keras import backend, ops


def gradients(
    function: Callable[[list], list], inputs: list, weigh: Callable[[list], list]
) -> list:
    """The gradient of a weighted sum of all numbers that a function makes.

    Args:
        function: from a list of tensors to a list of tensors, all of floating-point numbers.
            Updates of variables within the function are dropped.
        inputs: the arrays to call it with.
        weigh: from the outputs, as arrays, to the weights of their numbers: a list of arrays of
            the same shapes.

    Returns:
        An array for each input, zero where no output depends on it.
    """
    inputs = [ops.convert_to_tensor(x) for x in inputs]
    return [
        ops.convert_to_numpy(x) for x in _OF_BACKEND[backend.backend()](function, inputs, weigh)
    ]


def _weights(outputs, weigh):
    """A tensor of weights for each output, of the same dtype."""
    weights = weigh([ops.convert_to_numpy(ops.stop_gradient(y)) for y in outputs])
    return [ops.cast(w, y.dtype) for w, y in zip(weights, outputs, strict=True)]


def _tensorflow(function, inputs, weigh):
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(inputs)
        outputs = function(inputs)
    zero = tf.UnconnectedGradients.ZERO
    return tape.gradient(outputs, inputs, _weights(outputs, weigh), unconnected_gradients=zero)


def _jax(function, inputs, weigh):
    import jax

    # The values of an update depend on the inputs, and no variable may keep them.
    with keras.StatelessScope():
        outputs, pull_back = jax.vjp(function, inputs)
    (found,) = pull_back(_weights(outputs, weigh))
    return found


def _torch(function, inputs, weigh):
    import torch

    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        outputs = function(inputs)
    outputs_and_weights = zip(outputs, _weights(outputs, weigh), strict=True)
    reached = [(y, w) for y, w in outputs_and_weights if y.requires_grad]
    if not reached:
        return [torch.zeros_like(x) for x in inputs]
    outputs, weights = zip(*reached, strict=True)
    found = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


_OF_BACKEND = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
