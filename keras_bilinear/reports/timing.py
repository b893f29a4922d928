"""Times functions on a machine that other processes use as well."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_bilinear.kronecker.target import on_gpu
from keras_bilinear.progress import track


def median_seconds(
    functions: Sequence[Callable[[], Any]], rounds: int = 8, burst: float = 0.1
) -> list[float]:
    """The median seconds of a call of each function. The functions take turns.

    In a turn, a function is called again and again for `burst` seconds. The first call of a turn
    does not count, as the other functions have filled the caches, unless it takes longer than
    `burst`.

    Args:
        functions: the functions to time.
        rounds: number of turns of each function.
        burst: seconds of a turn.
    """
    for function in track(functions, "compiling"):
        function()
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in track(range(rounds), "timing"):
        for function, counted in zip(functions, times, strict=True):
            calls, end = [], time.perf_counter() + burst
            while len(calls) < 2 or time.perf_counter() < end:
                start = time.perf_counter()
                function()
                calls.append(time.perf_counter() - start)
                if calls[0] > burst:
                    break
            counted += calls[1:] or calls
    return [statistics.median(counted) for counted in times]


def compile_forward(model: keras.Model, inputs: Any) -> Callable[[], Any]:
    """Compiles an inference call of a model.

    Args:
        model: the model.
        inputs: one batch of inputs: an array, or nested arrays as the model takes them.

    Returns:
        A function that runs the model on `inputs` and returns when the outputs are computed.
    """
    inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    return waiting(functools.partial(compile_call(model), inputs))


def compile_call(model: keras.Model) -> Callable[..., Any]:
    """Compiles the inference calls of a model.

    Args:
        model: the model.

    Returns:
        A function that takes the arguments of a call, tensors, and returns the outputs.
    """
    return {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[keras.config.backend()](model)


def waiting(function: Callable[[], Any]) -> Callable[[], Any]:
    """Makes a function wait until the GPU has finished the operations that it was given.

    Without a GPU, and with JAX, whose results have a method to wait for them, the function is
    returned as it is.
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


def _tensorflow(model):
    import tensorflow as tf

    return tf.function(lambda *inputs: model(*inputs, training=False), autograph=False)


def _jax(model):
    import jax

    def call(weights, others, *inputs):
        return model.stateless_call(weights, others, *inputs)[0]

    function = jax.jit(call)
    state = [
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]
    return lambda *inputs: jax.block_until_ready(function(*state, *inputs))


def _torch(model):
    import torch

    def forward(*inputs):
        with torch.no_grad():
            return model(*inputs, training=False)

    return forward
