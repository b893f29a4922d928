"""Measures how the time of LiteRT files is spent, by the kind of operation.

    python benchmarks/litert_profile.py --data_dir=DIR

LiteRT's Python package has no profiler. So the script writes each operation of a file into a file
of its own and runs it alone, on one thread, with XNNPACK. It adds up the median times for each kind
of operation. From each time it takes off the time of the quickest operation, which is little more
than the cost of a call. An operation in a loop counts as often as the loop runs. An operation that
runs alone has its inputs in the cache and is not fused with others. The time of the whole file
beside the sum tells how far to trust the sum.

The files are those of `litert_files.py` that miss a goal of speed or are slower than the file of
the full network, and the file of that full network. The script writes
`benchmarks/results/litert_profile.md`.
"""

import collections
import copy
import pathlib
import tempfile

import flatbuffers
import litert_files
import numpy as np
import tables
from absl import app, logging
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from keras_bilinear import export_litert
from keras_bilinear.benchmark.report import machine
from keras_bilinear.files import staged
from keras_bilinear.litert.run import run_litert
from keras_bilinear.litert.run_script import median_seconds

SECONDS = 0.05
# Cases of `litert_files.py`, models, numbers.
PROFILED = (
    (litert_files.layer_cases, "embedding 20,000 x 128", "int8"),
    (litert_files.layer_cases, f"GRU 64 -> 256, {litert_files.STEPS} steps", "dynamic_int8"),
    (litert_files.network_cases, "cifar10, VGG", "int8"),
    (litert_files.application_cases, "MobileNetV2", None),
)
NAMES = {
    code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")
}


def operations(path, steps):
    """`(kind, times, file)` of each operation in a file.

    `times` is how often the operation runs, and `file` are the bytes of a file with the operation
    alone.

    Args:
        path: the file.
        steps: how often the file's loop runs.
    """
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    for number, graph in enumerate(model.subgraphs):
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex].builtinCode
            if code != schema.BuiltinOperator.WHILE:
                yield NAMES[code], steps if number else 1, alone(model, graph, operator)


def alone(model, graph, operator):
    """The bytes of a file with a single operation of another file."""
    tensors, buffers, places = [], [schema.BufferT()], {-1: -1}  # an input left out is -1

    def place(index):
        """The number of a tensor in the new file."""
        if index not in places:
            places[index] = len(tensors)
            tensors.append(copy.copy(graph.tensors[index]))
            content = model.buffers[tensors[-1].buffer]
            tensors[-1].buffer = 0
            if content.data is not None and len(content.data):
                tensors[-1].buffer = len(buffers)
                buffers.append(content)
        return places[index]

    operator = copy.copy(operator)
    operator.inputs = [place(index) for index in operator.inputs]
    operator.outputs = [place(index) for index in operator.outputs]
    part, whole = schema.SubGraphT(), schema.ModelT()
    part.tensors, part.operators, part.outputs = tensors, [operator], operator.outputs
    given = [index for index in dict.fromkeys(operator.inputs) if index >= 0]
    part.inputs = [index for index in given if not tensors[index].buffer]
    whole.version, whole.operatorCodes = model.version, model.operatorCodes
    whole.subgraphs, whole.buffers = [part], buffers
    builder = flatbuffers.Builder()
    builder.Finish(whole.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def microseconds(content):
    """Median time of a file on random inputs."""
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    rng = np.random.default_rng(0)
    for details in interpreter.get_input_details():
        values = rng.normal(size=details["shape"])
        if details["dtype"] == np.int8:
            values *= 40
        elif details["dtype"] != np.float32:  # indices, which must be there
            values *= 0
        interpreter.set_tensor(details["index"], values.astype(details["dtype"]))
    return 1e6 * median_seconds(interpreter.invoke, SECONDS)


def profile(path, steps):
    """`{kind: (count, microseconds)}`."""
    measured = [
        (kind, times, microseconds(content)) for kind, times, content in operations(path, steps)
    ]
    call = min(time for *_, time in measured)
    kinds = collections.defaultdict(lambda: (0, 0.0))
    for kind, times, time in measured:
        count, total = kinds[kind]
        kinds[kind] = count + times, total + times * (time - call)
    return kinds


def main(argv):
    del argv
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    lines = [
        "# Where the time of LiteRT files goes",
        "",
        f"`python benchmarks/litert_profile.py`; {facts}; one thread, XNNPACK on. Microseconds "
        "of all operations of a kind, each run alone and less the cost of a call, and how many "
        "they are.",
    ]
    for cases, name, quantize in PROFILED:
        profiles, wholes = {}, {}
        _, models, inputs, _ = next(case for case in cases() if case[0] == name)
        for variant, model in models.items():
            logging.info("%s, %s", name, variant)
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder, "model.tflite")
                export_litert(model, path, quantize, representative_data=inputs, tolerance=1.0)
                wholes[variant] = run_litert(path, {"input_1": inputs[:1, None]}).latency_us
                profiles[variant] = profile(path, litert_files.STEPS)
        totals = {
            variant: sum(time for _, time in kinds.values()) for variant, kinds in profiles.items()
        }
        lines += ["", f"## {name}, {quantize or 'float32'}", ""]
        lines += [f"| operation | {' | '.join(profiles)} |", "|---" * (1 + len(profiles)) + "|"]
        kinds = {kind for found in profiles.values() for kind in found}
        for kind in sorted(kinds, key=lambda kind: -max(p[kind][1] for p in profiles.values())):
            cells = [
                f"{p[kind][1]:,.1f} ({p[kind][0]})" if p[kind][0] else "" for p in profiles.values()
            ]
            lines.append(f"| {kind} | {' | '.join(cells)} |")
        for text, values in (("sum", totals), ("the whole file", wholes)):
            lines.append(f"| {text} | {' | '.join(f'{value:,.1f}' for value in values.values())} |")
    with staged(tables.RESULTS) as folder:
        (folder / "litert_profile.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
