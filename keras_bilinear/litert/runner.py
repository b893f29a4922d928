"""Runs a LiteRT file in a process that has only NumPy and LiteRT in it.

    python litert_runner.py FILE INPUTS.npz OUTPUTS.npz THREADS SECONDS

`INPUTS.npz` has for each input an array `input:NAME` of some runs, the first axis.
To `OUTPUTS.npz` go the outputs of each run as `output:NAME`, and what was found of
the file: `latency` (median seconds), `memory` (bytes of the process at its peak)
and `memory_before` (before it had read the file); zero where the system does not
tell. It is a script of its own, as a package that is imported would count.
"""

import pathlib
import statistics
import sys
import time

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def peak_memory():
    """Most bytes that this process had in memory at once; zero if that is not known."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return 0
    (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(peak.split()[1])


def median_seconds(call, seconds):
    """Median time of a call, after a fifth of the time to warm up."""
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() < start + seconds:
        begin = time.perf_counter()
        call()
        if begin >= start + 0.2 * seconds or begin + seconds < time.perf_counter():
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def stored(x, details):
    """Values as an input of the file has them, which may be quantized."""
    scale, zero = details["quantization"]
    dtype = np.dtype(details["dtype"])
    if scale:
        bounds = np.iinfo(dtype)
        x = np.clip(np.round(x / scale) + zero, bounds.min, bounds.max)
    return x.astype(dtype)


def read(x, details):
    """The values that an output of the file stands for."""
    scale, zero = details["quantization"]
    return scale * (x.astype("float32") - zero) if scale else x


def main(file, inputs, outputs, threads, seconds):
    memory_before = peak_memory()
    interpreter = Interpreter(file, num_threads=int(threads))
    interpreter.allocate_tensors()
    signature = interpreter.get_signature_runner()
    sources, targets = signature.get_input_details(), signature.get_output_details()
    del signature  # the interpreter does not run beside it
    with np.load(inputs) as arrays:
        arrays = {name: stored(arrays[f"input:{name}"], one) for name, one in sources.items()}
    runs = {name: [] for name in targets}
    for values in zip(*arrays.values(), strict=True):
        for name, value in zip(arrays, values, strict=True):
            interpreter.set_tensor(sources[name]["index"], value)
        interpreter.invoke()
        for name, one in targets.items():
            runs[name].append(read(interpreter.get_tensor(one["index"]), one))
    latency = median_seconds(interpreter.invoke, float(seconds))
    np.savez(
        outputs,
        latency=latency,
        memory=peak_memory(),
        memory_before=memory_before,
        **{f"output:{name}": np.stack(values) for name, values in runs.items()},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
