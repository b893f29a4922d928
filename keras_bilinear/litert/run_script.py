"""Runs a LiteRT file in a process that imports only NumPy and LiteRT.

    python run_script.py FILE INPUTS.npz OUTPUTS.npz THREADS SECONDS

`INPUTS.npz` has for each input of each run an array `RUN:NAME`; the first run is 0. The script
writes `OUTPUTS.npz` with the outputs of all runs as `output:NAME`, the median seconds of the first
run as `latency`, the most bytes of memory that the process took until then as `memory`, and the
most bytes before it read the file as `memory_before`. The last two are 0 where the system does not
tell.

It is a script and no module, as an import of the package would take memory.
"""

import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def peak_memory() -> int:
    """The most bytes of resident memory that this process has taken; 0 if it is unknown."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return 0
    (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(peak.split()[1])


def median_seconds(call: Callable[[], Any], seconds: float) -> float:
    """The median seconds of a call that is repeated for `seconds`, after a fifth to warm up."""
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() < start + seconds:
        begin = time.perf_counter()
        call()
        if begin >= start + 0.2 * seconds or begin + seconds < time.perf_counter():
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def quantized(x: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Floats as the values of an input of the file, which may be quantized."""
    scale, zero = details["quantization"]
    dtype = np.dtype(details["dtype"])
    if scale:
        bounds = np.iinfo(dtype)
        x = np.clip(np.round(x / scale) + zero, bounds.min, bounds.max)
    return x.astype(dtype)


def dequantized(x: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """The floats that the values of an output of the file stand for."""
    scale, zero = details["quantization"]
    return scale * (x.astype("float32") - zero) if scale else x


def main(file: str, inputs: str, outputs: str, threads: str, seconds: str) -> None:
    """Runs the file with the arguments of the command line."""
    memory_before = peak_memory()
    interpreter = Interpreter(file, num_threads=int(threads))
    interpreter.allocate_tensors()
    signature = interpreter.get_signature_runner()
    sources, targets = signature.get_input_details(), signature.get_output_details()
    del signature  # The interpreter does not run as long as it exists.
    results: dict[str, list[np.ndarray]] = {name: [] for name in targets}
    latency, memory = 0.0, 0
    with np.load(inputs) as arrays:
        for run in range(len(arrays.files) // len(sources)):
            for name, details in sources.items():
                value = quantized(arrays[f"{run}:{name}"], details)
                interpreter.set_tensor(details["index"], value)
            interpreter.invoke()
            for name, details in targets.items():
                results[name].append(dequantized(interpreter.get_tensor(details["index"]), details))
            if not run:
                latency = median_seconds(interpreter.invoke, float(seconds))
                memory = peak_memory()
    stacked: dict[str, Any] = {f"output:{name}": np.stack(runs) for name, runs in results.items()}
    np.savez(outputs, latency=latency, memory=memory, memory_before=memory_before, **stacked)


if __name__ == "__main__":
    main(*sys.argv[1:])
