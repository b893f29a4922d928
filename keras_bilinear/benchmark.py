"""Speed of the bilinear layers beside the full ones, and beside what the hardware allows.

Each backend runs in a process of its own, one after the other. There every full
layer and its bilinear counterpart take turns, so that a machine whose speed
drifts slows both down; the figures are medians, to be read as ratios. The
floor is what no implementation of the same mathematics can beat on this
machine: the larger of the MACs over the measured matmul rate and the bytes that
must move over the measured copy rate.
"""

import inspect
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import rich.console
import rich.table
from absl import flags

from keras_bilinear.benchmark_cases import CASES, HUGE
from keras_bilinear.errors import CommandError, require
from keras_bilinear.files import check_writable, staged

# Column: the Keras backend, whether it compiles with XLA, and more environment.
# TensorFlow takes Intel's oneDNN library by itself on some CPUs only.
COLUMNS = {
    "tensorflow": ("tensorflow", False, {}),
    "onednn": ("tensorflow", False, {"TF_ENABLE_ONEDNN_OPTS": "1"}),
    "xla": ("tensorflow", True, {}),
    "jax": ("jax", True, {}),
    "torch": ("torch", False, {}),
}


class _Steps:
    """A forward pass and a training step (Adam, mean squared error) of one layer.

    The step of a dense layer includes the gradient of its inputs, which every
    layer but a network's first has to pass on.
    """

    def __init__(self, layer, inputs, xla):
        import keras
        import numpy as np
        from keras import ops

        layer(inputs[:1])
        self.optimizer = keras.optimizers.Adam(1e-3)
        self.optimizer.build(layer.trainable_variables)
        self.layer, self.xla = layer, xla
        self.inputs = ops.convert_to_tensor(inputs)
        target = np.random.default_rng(1).normal(size=layer.compute_output_shape(inputs.shape))
        self.target = ops.convert_to_tensor(target.astype("float32"))
        self.differentiate_inputs = inputs.dtype == np.float32
        make = getattr(self, f"_{keras.config.backend()}")
        self.forward, self.step = make()

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

        layer, optimizer = self.layer, self.optimizer
        knows_training = "training" in inspect.signature(layer.call).parameters

        def call(variables, inputs, training):
            options = {"training": training} if knows_training else {}
            return layer.stateless_call(variables, [], inputs, **options)[0]

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


def _seconds(functions, rounds=8, burst=0.1):
    """Median seconds of each function; all of them take turns, a burst of calls each.

    The first call of a burst is not counted: it finds the caches as the other
    functions left them.
    """
    for function in functions:
        function()
        function()
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, record in zip(functions, times, strict=True):
            function()
            end = time.perf_counter() + burst
            while True:
                start = time.perf_counter()
                function()
                stop = time.perf_counter()
                record.append(stop - start)
                if stop > end:
                    break
    return [statistics.median(record) for record in times]


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

    *matmuls, copy = _seconds([lambda: a @ b, matmul, lambda: np.copyto(target, source)])
    return {"macs": size**3 / min(matmuls), "bytes": 2 * source.nbytes / copy}


def measure(case, xla, rates):
    """Times one case on the backend of this process; returns a JSON-ready record."""
    steps = [_Steps(layer, case.inputs(), xla) for layer in case.layers()]
    forward = _seconds([one.forward for one in steps])
    step = _seconds([one.step for one in steps])
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
    steps = _Steps(layer, HUGE.inputs(), xla)
    (seconds,) = _seconds([steps.step])
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
    steps = _Steps(case.layers()[which], case.inputs(), xla)
    # From here on the peak counts; that of the imports may be higher.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(2):
        steps.step()
    return _status("VmHWM") - before


def _status(field):
    """A size from this process's status, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _peak_memory():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _work(column, suite, index=None, which=None):
    """What a worker process does: prints one JSON record a line."""
    xla = COLUMNS[column][1]
    if suite == "huge":
        print(json.dumps(measure_huge(xla)), flush=True)
        return
    if index is not None:
        print(json.dumps(measure_memory(CASES[suite][int(index)], int(which), xla)), flush=True)
        return
    rates = measure_rates()
    print(json.dumps({"rates": rates}), flush=True)
    for case in CASES[suite]:
        print(json.dumps(measure(case, xla, rates)), flush=True)


def _run(column, suite):
    """Records of one suite and column."""
    if suite != "memory":
        return _run_worker(column, suite)
    records = []
    for index, case in enumerate(CASES["conv"]):
        # Each layer in a process of its own: memory that was freed may stay with its allocator.
        (full,), (bilinear,) = (_run_worker(column, "conv", index, which) for which in (0, 1))
        records.append({"case": str(case), "memory": [full, bilinear]})
    return records


def _run_worker(column, *arguments):
    """What a fresh process on the backend of a column prints."""
    backend, _, environment = COLUMNS[column]
    quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.run(
        [sys.executable, "-m", __spec__.name, column, *map(str, arguments)],
        env={**os.environ, **quiet, **environment},
        stdout=subprocess.PIPE,
        check=True,
    )
    return [json.loads(line) for line in process.stdout.splitlines()]


def machine():
    """The kind of this machine and the versions that were measured."""
    from importlib import metadata

    packages = ("keras", "tensorflow", "jax", "torch", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def _rows(records):
    """Cells of the table: one row a case and kind of call, from `{column: records}`."""
    for case, by_column in _by_case(records, "forward").items():
        for call, label in (("forward", "forward"), ("step", "training step")):
            cells = [case, label]
            for record in by_column.values():
                full, bilinear, *_ = record[call]
                floor = record[f"{call}_floor"][1]
                cells.append(
                    f"{full / bilinear:.2f}x ({full * 1e3:.2f} / {bilinear * 1e3:.2f} / "
                    f"{floor * 1e3:.3f})"
                )
            yield cells


def _patches_rows(records):
    for case, by_column in _by_case(records, "forward").items():
        for call, label in (("forward", "forward"), ("step", "training step")):
            times = [record[call] for record in by_column.values()]
            if len(times[0]) > 2:
                cells = (
                    f"{patches / ours:.1f}x ({patches * 1e3:.2f})" for _, ours, patches in times
                )
                yield [case, label, *cells]


def _memory_rows(records):
    for case, by_column in _by_case(records, "memory").items():
        cells = (
            f"{bilinear / full:.2f} ({full / 1e6:.0f} / {bilinear / 1e6:.0f})"
            for full, bilinear in (record["memory"] for record in by_column.values())
        )
        yield [case, "training step", *cells]


def _by_case(records, measured):
    """`{case: {column: record}}` of the records where something was measured."""
    cases = {}
    for column, of_column in records.items():
        for record in of_column:
            if measured in record:
                cases.setdefault(record["case"], {})[column] = record
    return cases


def _markdown(records, command):
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    lines = ["# Speed of bilinear layers", "", f"`{command}`; {facts}.", ""]
    for explanation, rows in (
        (
            "Each cell: how many times as fast as the full layer (milliseconds of the full layer / "
            "of the bilinear one / floor of the hardware for the bilinear one). float32, medians; "
            "read the ratios, as the machine is shared.",
            _rows(records),
        ),
        (
            "How many times as fast as the algorithm that extracts patches (its milliseconds).",
            _patches_rows(records),
        ),
        (
            "Memory of a training step beyond weights, optimizer and data, as a share of the full "
            "layer's (megabytes of the full layer / of the bilinear one).",
            _memory_rows(records),
        ),
    ):
        if cells := ["| " + " | ".join(row) + " |" for row in rows]:
            header = "| " + " | ".join(["layer", "call", *records]) + " |"
            lines += [explanation, "", header, "|" + "---|" * (2 + len(records)), *cells, ""]
    for column, of_column in records.items():
        for record in of_column:
            if "rates" in record:
                matmul, copy = record["rates"]["macs"] / 1e9, record["rates"]["bytes"] / 1e9
                lines.append(f"- {column}: {matmul:.1f} GMAC/s matmul, {copy:.1f} GB/s copy.")
            if "peak" in record:
                lines.append(
                    f"- {column}: {record['case']} ({record['parameters']:,} parameters): training "
                    f"step {record['step'] * 1e3:.1f} ms, peak memory of the process "
                    f"{record['peak'] / 1e6:,.0f} MB."
                )
    return "\n".join(lines) + "\n"


def define_flags() -> None:
    """Defines the flags of `keras-bilinear benchmark`."""
    suites = [*CASES, "huge", "memory"]
    flags.DEFINE_multi_enum(
        "suite",
        suites,
        suites,
        "Layers to time; may be repeated. huge: the peak memory of a vocabulary of 10^9; "
        "memory: that of a training step of each convolution.",
    )
    flags.DEFINE_multi_enum(
        "backend",
        ["tensorflow"],
        list(COLUMNS),
        "Backends to time, each in a process of its own; may be repeated.",
    )
    flags.DEFINE_string("output", None, "Write PATH.json and PATH.md as well.")


def main(argv: list[str]) -> None:
    """Runs the benchmark with the flags as they are.

    Raises:
        CommandError: if there are arguments that are no flags, a backend is not
            installed or the output cannot be written.
    """
    if len(argv) > 1:
        raise CommandError(f"benchmark takes flags only, not {argv[1]!r}")
    suites, columns = flags.FLAGS.suite, flags.FLAGS.backend
    require(*{COLUMNS[column][0] for column in columns})
    output = pathlib.Path(flags.FLAGS.output) if flags.FLAGS.output else None
    if output:
        check_writable(output.parent)
    console = rich.console.Console()
    records = {}
    for column in columns:
        with console.status(f"timing {', '.join(suites)} on {column}"):
            records[column] = [record for suite in suites for record in _run(column, suite)]
    table = rich.table.Table(
        "layer", "call", *columns, title="speedup (full / bilinear / floor, ms)"
    )
    for row in _rows(records):
        table.add_row(*row)
    console.print(table)
    if output:
        arguments = [f"--suite={suite}" for suite in suites]
        arguments += [f"--backend={column}" for column in columns]
        command = " ".join(["keras-bilinear benchmark", *arguments])
        results = {"command": command, **machine(), "records": records}
        with staged(output.parent) as folder:
            (folder / f"{output.name}.json").write_text(json.dumps(results, indent=1) + "\n")
            (folder / f"{output.name}.md").write_text(_markdown(records, command))


if __name__ == "__main__":
    _work(*sys.argv[1:])
