"""Measures layers on one backend, in a process that the benchmark starts."""

import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bilinear.benchmark.cases import CASES, HUGE, Case
from keras_bilinear.reports.timing import median_seconds, waiting


class Steps:
    """A compiled forward pass and a compiled training step of one layer.

    The training step uses Adam and the mean squared error. If the inputs are floats, it includes
    the gradient of the inputs, which every layer but a network's first layer has to pass on.

    Args:
        layer: the layer, which is built here.
        inputs: a batch of inputs.
        xla: whether TensorFlow compiles with XLA. JAX does in any case, and PyTorch does not.

    Attributes:
        forward: a function that computes the outputs and waits for them.
        step: a function that does a training step and waits for its end.
    """

    def __init__(self, layer: keras.Layer, inputs: np.ndarray, xla: bool) -> None:
        layer.build(inputs.shape)
        self.optimizer = keras.optimizers.Adam(1e-3)
        self.optimizer.build(layer.trainable_variables)
        self.layer, self.xla = layer, xla
        self.inputs: Any = ops.convert_to_tensor(inputs)
        target = np.random.default_rng(1).normal(size=layer.compute_output_shape(inputs.shape))
        self.target = ops.convert_to_tensor(target.astype("float32"))
        self.differentiate_inputs = inputs.dtype == np.float32
        make: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]] = {
            "tensorflow": self._tensorflow,
            "jax": self._jax,
            "torch": self._torch,
        }[keras.config.backend()]
        self.forward, self.step = map(waiting, make())

    def _loss(self, outputs) -> Any:
        return ops.mean(ops.square(outputs - self.target))

    def _tensorflow(self):
        import tensorflow as tf

        def forward():
            return self.layer(self.inputs, training=False)

        def step():
            with tf.GradientTape() as tape:
                if self.differentiate_inputs:
                    tape.watch(self.inputs)
                loss = self._loss(self.layer(self.inputs, training=True))
            variables = [variable.value for variable in self.layer.trainable_variables]
            sources = [*variables, self.inputs] if self.differentiate_inputs else variables
            gradients: Any = tape.gradient(loss, sources)
            self.optimizer.apply(gradients[: len(variables)], self.layer.trainable_variables)
            return gradients[len(variables) :]

        function = dict(jit_compile=self.xla, autograph=False)
        return tf.function(forward, **function), tf.function(step, **function)

    def _jax(self):
        import jax

        layer, optimizer = self.layer, self.optimizer

        def call(variables, inputs, training):
            values = zip(layer.trainable_variables, variables, strict=True)
            with keras.StatelessScope(values):
                return layer(inputs, training=training)

        def loss(variables, inputs):
            return self._loss(call(variables, inputs, training=True))

        @jax.jit
        def forward(variables, inputs):
            return call(variables, inputs, training=False)

        def update(variables, state, inputs):
            which = (0, 1) if self.differentiate_inputs else 0
            gradients = jax.grad(loss, argnums=which)(variables, inputs)
            gradients, rest = gradients if self.differentiate_inputs else (gradients, ())
            return *optimizer.stateless_apply(state, gradients, variables), rest

        compiled: Callable[..., Any] = jax.jit(update, donate_argnums=(0, 1))

        def copy(variables):
            # The step gives its buffers away, and the variables keep theirs.
            return [variable.value.copy() for variable in variables]

        weights = copy(layer.trainable_variables)
        state = [copy(layer.trainable_variables), copy(optimizer.variables)]

        def step():
            *state[:], rest = compiled(*state, self.inputs)
            jax.block_until_ready((state, rest))

        return lambda: forward(weights, self.inputs).block_until_ready(), step

    def _torch(self):
        import torch

        if self.differentiate_inputs:
            self.inputs = self.inputs.clone().requires_grad_()

        def forward():
            with torch.no_grad():
                return self.layer(self.inputs, training=False)

        def step():
            self.layer.zero_grad()
            self.inputs.grad = None
            self._loss(self.layer(self.inputs, training=True)).backward()
            variables = self.layer.trainable_variables
            with torch.no_grad():
                self.optimizer.apply([v.value.grad for v in variables], variables)

        return forward, step


def measure_rates() -> dict[str, float]:
    """Measures how fast this machine multiplies matrices and copies memory.

    Returns:
        `"macs"`: multiply-accumulate operations per second of a matrix product, by NumPy or by
        the backend, whichever is faster. `"bytes"`: bytes read and written per second of a copy.
    """
    size = 2048
    a, b = np.ones((2, size, size), "float32")
    x, y = ops.convert_to_tensor(a), ops.convert_to_tensor(b)
    source, target = np.ones((2, 1 << 26), "float32")

    def matmul():
        # Reading a number of the product waits for it on every backend.
        product: Any = ops.matmul(x, y)
        return float(product[0, 0])

    *matmuls, copy = median_seconds([lambda: a @ b, matmul, lambda: np.copyto(target, source)])
    return {"macs": size**3 / min(matmuls), "bytes": 2 * source.nbytes / copy}


def measure(case: Case, xla: bool, rates: dict[str, float]) -> dict[str, Any]:
    """Times the layers of a case on the backend of this process.

    Args:
        case: the case.
        xla: whether TensorFlow compiles with XLA.
        rates: the rates of this machine, as `measure_rates` returns them.

    Returns:
        A record for JSON. Its values are lists with an item for each layer of the case; the lists
        of floors have items for the full and the bilinear layer only. Times are in seconds.
    """
    layers = [Steps(layer, case.inputs(), xla) for layer in case.layers()]
    forward = median_seconds([steps.forward for steps in layers])
    step = median_seconds([steps.step for steps in layers])
    floors = [case.floors(steps.layer, rates) for steps in layers[:2]]
    return {
        "case": str(case),
        "parameters": [steps.layer.count_params() for steps in layers],
        "forward": forward,
        "step": step,
        "forward_floor": [floor for floor, _ in floors],
        "step_floor": [floor for _, floor in floors],
    }


def measure_huge(xla: bool) -> dict[str, Any]:
    """Trains the bilinear layer of `HUGE` for some steps.

    Returns:
        A record for JSON, with the seconds of a step and the most bytes of memory that this
        process took.
    """
    _, layer = HUGE.layers()
    steps = Steps(layer, HUGE.inputs(), xla)
    (seconds,) = median_seconds([steps.step])
    return {
        "case": str(HUGE),
        "parameters": layer.count_params(),
        "step": seconds,
        "peak": _peak_memory(),
    }


def measure_memory(case: Case, which: int, xla: bool) -> int:
    """Measures the memory of two training steps. Works on Linux only.

    Args:
        case: the case.
        which: 0 for the full layer of the case, 1 for the bilinear layer.
        xla: whether TensorFlow compiles with XLA.

    Returns:
        The most bytes that the steps took beyond the memory that was in use before.
    """
    steps = Steps(case.layers()[which], case.inputs(), xla)
    # The peak counts from here on, as the peak of the imports may be higher.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(2):
        steps.step()
    # Linux counts pages by the batch on each core, so a tiny difference may come out negative.
    return max(_status("VmHWM") - before, 0)


def _status(field):
    """A size in the status of this process, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _peak_memory():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(compiler: str, suite: str, index: str | None = None, layer: str | None = None) -> None:
    """Measures on the backend of this process, and prints each record as a line of JSON.

    Args:
        compiler: `"xla"` or `"no_xla"`: whether TensorFlow compiles with XLA.
        suite: name of the suite to measure.
        index: index of the only case whose memory to measure; `None` times all cases.
        layer: with `index`, `"0"` for the full layer and `"1"` for the bilinear layer.
    """
    for record in _records(compiler == "xla", suite, index, layer):
        print(json.dumps(record), flush=True)


def _records(xla: bool, suite: str, index: str | None, layer: str | None) -> Iterator[Any]:
    if suite == "huge":
        yield measure_huge(xla)
    elif index is not None and layer is not None:
        yield measure_memory(CASES[suite][int(index)], int(layer), xla)
    else:
        rates = measure_rates()
        yield {"rates": rates}
        for case in CASES[suite]:
            yield measure(case, xla, rates)


if __name__ == "__main__":
    main(*sys.argv[1:])
