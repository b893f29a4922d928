"""What the benchmark measures, in a process of its own for each backend."""

import json
import pathlib
import sys

from keras_bilinear.benchmark.cases import CASES, HUGE
from keras_bilinear.reports.timing import median_seconds, waiting


class Steps:
    """A forward pass and a training step (Adam, mean squared error) of one layer.

    The step of a dense layer includes the gradient of its inputs, which every
    layer but a network's first has to pass on.
    """

    def __init__(self, layer, inputs, xla):
        import keras
        import numpy as np
        from keras import ops

        layer.build(inputs.shape)
        self.optimizer = keras.optimizers.Adam(1e-3)
        self.optimizer.build(layer.trainable_variables)
        self.layer, self.xla = layer, xla
        self.inputs = ops.convert_to_tensor(inputs)
        target = np.random.default_rng(1).normal(size=layer.compute_output_shape(inputs.shape))
        self.target = ops.convert_to_tensor(target.astype("float32"))
        self.differentiate_inputs = inputs.dtype == np.float32
        make = getattr(self, f"_{keras.config.backend()}")
        self.forward, self.step = map(waiting, make())

    def _loss(self, outputs):
        from keras import ops

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
            gradients = tape.gradient(loss, sources)
            self.optimizer.apply(gradients[: len(variables)], self.layer.trainable_variables)
            return gradients[len(variables) :]

        function = dict(jit_compile=self.xla, autograph=False)
        return tf.function(forward, **function), tf.function(step, **function)

    def _jax(self):
        import jax
        import keras

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

        update = jax.jit(update, donate_argnums=(0, 1))
        # Copies, as the buffers are donated and the variables keep theirs.
        copy = lambda variables: [variable.value.copy() for variable in variables]  # noqa: E731
        weights = copy(layer.trainable_variables)
        state = [copy(layer.trainable_variables), copy(optimizer.variables)]

        def step():
            *state[:], rest = update(*state, self.inputs)
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


def measure_rates():
    """Matmul rate (MACs per second) and copy rate (bytes moved per second) of this machine.

    Of the matmuls of NumPy and of the backend the faster one counts.
    """
    import numpy as np
    from keras import ops

    size = 2048
    a, b = np.ones((2, size, size), "float32")
    x, y = ops.convert_to_tensor(a), ops.convert_to_tensor(b)
    source, target = np.ones((2, 1 << 26), "float32")

    def matmul():
        # Reading one number waits for the product on every backend.
        return float(ops.convert_to_numpy(ops.matmul(x, y)[0, 0]))

    *matmuls, copy = median_seconds([lambda: a @ b, matmul, lambda: np.copyto(target, source)])
    return {"macs": size**3 / min(matmuls), "bytes": 2 * source.nbytes / copy}


def measure(case, xla, rates):
    """Times one case on the backend of this process; returns a JSON-ready record."""
    steps = [Steps(layer, case.inputs(), xla) for layer in case.layers()]
    forward = median_seconds([one.forward for one in steps])
    step = median_seconds([one.step for one in steps])
    floors = [case.floors(one.layer, rates) for one in steps[:2]]
    return {
        "case": str(case),
        "parameters": [one.layer.count_params() for one in steps],
        "forward": forward,
        "step": step,
        "forward_floor": [floor for floor, _ in floors],
        "step_floor": [floor for _, floor in floors],
    }


def measure_huge(xla):
    """Trains `HUGE` for a few steps; returns its step time and this process's peak memory."""
    _, layer = HUGE.layers()
    steps = Steps(layer, HUGE.inputs(), xla)
    (seconds,) = median_seconds([steps.step])
    return {
        "case": str(HUGE),
        "parameters": layer.count_params(),
        "step": seconds,
        "peak": _peak_memory(),
    }


def measure_memory(case, which, xla):
    """Bytes that two training steps of a layer of `case` take at most beyond what there was.

    Linux only.
    """
    steps = Steps(case.layers()[which], case.inputs(), xla)
    # From here on the peak counts; that of the imports may be higher.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(2):
        steps.step()
    # Linux counts pages by the batch on each core, so a tiny difference may come out negative.
    return max(_status("VmHWM") - before, 0)


def _status(field):
    """A size from this process's status, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _peak_memory():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(compiler: str, suite: str, index: str | None = None, layer: str | None = None) -> None:
    """Measures on the backend of this process, and prints one JSON record a line.

    Args:
        compiler: `"xla"` compiles everything with XLA.
        suite: the cases to time.
        index: measures, of these cases, only the memory of this one.
        layer: 0 for that of the full layer, 1 for that of the bilinear one.
    """
    for record in _records(compiler == "xla", suite, index, layer):
        print(json.dumps(record), flush=True)


def _records(xla, suite, index, layer):
    if suite == "huge":
        yield measure_huge(xla)
    elif index is not None:
        yield measure_memory(CASES[suite][int(index)], int(layer), xla)
    else:
        rates = measure_rates()
        yield {"rates": rates}
        for case in CASES[suite]:
            yield measure(case, xla, rates)


if __name__ == "__main__":
    main(*sys.argv[1:])
