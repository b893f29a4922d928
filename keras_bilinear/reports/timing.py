"""Times that mean something on a machine with other things to do."""

import statistics
import time
from collections.abc import Callable, Sequence

import keras
from keras import ops

from keras_bilinear.kronecker.target import on_gpu


def median_seconds(
    functions: Sequence[Callable], rounds: int = 8, burst: float = 0.1
) -> list[float]:
    """Median seconds of each function; all of them take turns, a burst of calls each.

    The first call of a burst is not counted, unless it takes as long as a burst:
    it finds the caches as the other functions left them.
    """
    for function in functions:
        function()
        function()
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, record in zip(functions, times, strict=True):
            calls, end = [], time.perf_counter() + burst
            while len(calls) < 2 or time.perf_counter() < end:
                start = time.perf_counter()
                function()
                calls.append(time.perf_counter() - start)
                if calls[0] > burst:
                    break
            record += calls[1:] or calls
    return [statistics.median(record) for record in times]


def compile_forward(model: keras.Model, inputs) -> Callable:
    """A function that runs a model on inputs as fast as the backend can, and waits for it."""
    inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    forward = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[keras.config.backend()]
    return waiting(forward(model, inputs))


def waiting(function: Callable) -> Callable:
    """The function, waiting for the GPU, where there is one, to do what it was given.

    Not for JAX, whose results know how to wait.
    """
    backend = keras.config.backend()
    if backend == "jax" or not on_gpu():
        return function
    if backend == "tensorflow":
        import tensorflow as tf

        wait = tf.test.experimental.sync_devices
    else:
        import torch

        wait = torch.cuda.synchronize

    def call():
        function()
        wait()

    return call


def _tensorflow(model, inputs):
    import tensorflow as tf

    function = tf.function(lambda x: model(x, training=False), autograph=False)
    return lambda: function(inputs)


def _jax(model, inputs):
    import jax

    def call(weights, others, x):
        return model.stateless_call(weights, others, x)[0]

    function = jax.jit(call)
    state = [
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]
    return lambda: jax.block_until_ready(function(*state, inputs))


def _torch(model, inputs):
    import torch

    def forward():
        with torch.no_grad():
            return model(inputs, training=False)

    return forward
