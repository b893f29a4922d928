"""Runs a LiteRT file in a process of its own."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

_SCRIPT = pathlib.Path(__file__).with_name("run_script.py")


@dataclasses.dataclass(frozen=True)
class LiteRTRun:
    """What a LiteRT file gave, and what its process took. Made by `run_litert`.

    Attributes:
        outputs: for each output, by name, its values in all runs: an array of shape
            `(runs, *shape)`.
        latency_us: median microseconds of the first run.
        memory_bytes: the most bytes of resident memory of the process in the first run. `None`
            where the system does not tell.
        memory_before_bytes: the most bytes of resident memory of the process before it read the
            file. `None` where the system does not tell.
    """

    outputs: dict[str, np.ndarray]
    latency_us: float
    memory_bytes: int | None
    memory_before_bytes: int | None


def run_litert(
    path: str | os.PathLike, inputs: dict[str, np.ndarray], threads: int = 1, seconds: float = 0.5
) -> LiteRTRun:
    """Runs a LiteRT file in a process of its own.

    Args:
        path: the file.
        inputs: for each input, by name, its values in all runs: an array of shape
            `(runs, *shape)`. Quantized inputs and outputs are converted from and to floats.
        threads: number of threads.
        seconds: for how long to repeat the first run to find its latency.

    Raises:
        RuntimeError: if LiteRT cannot run the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, found = pathlib.Path(folder, "inputs.npz"), pathlib.Path(folder, "outputs.npz")
        # An array for each run, so that the process holds the inputs of one run at a time. The
        # prefix allows for any name of an input, also that of an argument of `savez`.
        arrays = {
            f"{run}:{name}": value
            for name, values in inputs.items()
            for run, value in enumerate(values)
        }
        np.savez(given, **arrays)  # pyright: ignore[reportArgumentType]  # names have a prefix
        command = [sys.executable, str(_SCRIPT), *map(str, (path, given, found, threads, seconds))]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise RuntimeError(f"LiteRT cannot run {os.path.basename(path)!r}: {reason}")
        with np.load(found) as arrays:
            results = dict(arrays)
    prefix = "output:"
    return LiteRTRun(
        outputs={
            name.removeprefix(prefix): values
            for name, values in results.items()
            if name.startswith(prefix)
        },
        latency_us=1e6 * float(results["latency"]),
        memory_bytes=int(results["memory"]) or None,
        memory_before_bytes=int(results["memory_before"]) or None,
    )
