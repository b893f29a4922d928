"""Gradients, and the sizes of all tensors on the way to them, on any backend."""

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()


def gradients(function, *arrays):
    """Gradients of a scalar function of float arrays, as NumPy arrays."""
    tensors = [ops.convert_to_tensor(array) for array in arrays]
    return [ops.convert_to_numpy(g) for g in _gradients(function, tensors)]


def evaluate(function, *arrays):
    """The value of a function of arrays, as a NumPy array."""
    if BACKEND == "jax":
        import jax

        function = jax.jit(function)
    return ops.convert_to_numpy(function(*[ops.convert_to_tensor(array) for array in arrays]))


def weighted_output(layer, x, weights, **call_arguments):
    """`(values of the trainable variables, x) -> sum(layer(x) * weights)`, for `gradients`.

    With `x` given as `None` the function takes it as its last argument.
    """

    def function(*values):
        *values, inputs = values if x is None else (*values, x)
        others = [variable.value for variable in layer.non_trainable_variables]
        outputs, _ = layer.stateless_call(values, others, inputs, **call_arguments)
        return ops.sum(ops.multiply(outputs, ops.convert_to_tensor(weights)))

    return function


def layer_gradients(layer, x, weights, **call_arguments):
    """Gradients of `sum(layer(x) * weights)`: of each trainable variable, then of a float `x`."""
    values = layer.get_weights()
    if np.issubdtype(x.dtype, np.floating):
        return gradients(weighted_output(layer, None, weights, **call_arguments), *values, x)
    return gradients(weighted_output(layer, x, weights, **call_arguments), *values)


def largest_tensor(function, *arrays):
    """The number of elements of the largest tensor that the function or its gradients make."""
    tensors = [ops.convert_to_tensor(array) for array in arrays]
    return {"tensorflow": _largest_tf, "jax": _largest_jax, "torch": _largest_torch}[BACKEND](
        function, tensors
    )


def _gradients(function, tensors):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors)
        return [tf.convert_to_tensor(g) for g in tape.gradient(value, tensors)]
    if BACKEND == "jax":
        import jax

        # Uncompiled, JAX compiles each operation by itself for each new shape.
        return jax.jit(jax.grad(function, argnums=tuple(range(len(tensors)))))(*tensors)
    import torch

    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*tensors), tensors)


def _largest_tf(function, tensors):
    import tensorflow as tf

    traced = tf.compat.v1.wrap_function(
        lambda *x: _gradients(function, x), [tf.TensorSpec(t.shape, t.dtype) for t in tensors]
    )
    outputs = [o for operation in traced.graph.get_operations() for o in operation.outputs]
    sizes = [o.shape.num_elements() for o in outputs]
    unknown = [o for o, size in zip(outputs, sizes, strict=True) if size is None]
    values = traced.prune(traced.inputs, unknown)(*tensors)
    return max(filter(None, [*sizes, *(value.shape.num_elements() for value in values)]))


def _largest_jax(function, tensors):
    import jax

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
                if hasattr(parameter, "eqns"):
                    yield from sizes(parameter)

    return max(sizes(jax.make_jaxpr(lambda *x: _gradients(function, x))(*tensors)))


def _largest_torch(function, tensors):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            outputs = func(*args, **(kwargs or {}))
            for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
                if isinstance(output, torch.Tensor):
                    # The memory behind it: an expanded view has many elements and owns none.
                    sizes.append(output.untyped_storage().nbytes() // output.element_size())
            return outputs

    with Watch():
        _gradients(function, tensors)
    return max(sizes)
