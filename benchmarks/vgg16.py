"""Measures time and memory of the commands on a model of 138 million parameters.

    python benchmarks/vgg16.py

Runs `keras-bilinear inspect`, `plan` and `rewrite` on a saved `keras.applications.VGG16` with
random weights, each in a process of its own.
"""

import pathlib
import subprocess
import sys
import tempfile
import time

import tables
from absl import app

COMMANDS = {
    "inspect": (),
    "plan": ("--budget=0.1",),
    "rewrite": ("small.keras", "--budget=0.1"),
}
# A process between this process and the command, so that only the command's memory counts.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def main(argv):
    del argv
    import keras

    from keras_bilinear.benchmark.report import machine
    from keras_bilinear.files import staged

    lines = [
        "# vgg16",
        "",
        "`python benchmarks/vgg16.py`; " + ", ".join(f"{k} {v}" for k, v in machine().items()),
        f"({keras.config.backend()} backend). A saved VGG16 of 138,357,544 parameters, random "
        "weights; the whole process, with imports and reading the file.",
        "",
        "| command | seconds | peak memory, MB |",
        "|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "vgg16.keras")
        keras.applications.VGG16(weights=None).save(path)
        for command, arguments in COMMANDS.items():
            start = time.perf_counter()
            cli = [sys.executable, "-m", "keras_bilinear", command, str(path), *arguments]
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, *cli],
                cwd=folder,
                check=True,
                stdout=subprocess.PIPE,
            )
            seconds = time.perf_counter() - start
            text = " ".join((command, *arguments))
            lines.append(f"| `{text}` | {seconds:.1f} | {int(done.stdout) * 1024 / 1e6:,.0f} |")
    with staged(tables.RESULTS) as target:
        (target / "vgg16.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    app.run(main)
