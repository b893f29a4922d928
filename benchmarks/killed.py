"""Kills a training at random moments, resumes it, and compares it with an undisturbed training.

    python benchmarks/killed.py

Each trial is a process that trains a network, which `BilinearRewrite` makes smaller in two steps.
The script kills the process (`SIGKILL`) at up to three random moments, unless the training ends
before them, and writes `benchmarks/results/killed.md`.
"""

import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import tables
from absl import app, flags

SCRIPT = pathlib.Path(__file__).parents[1] / "tests" / "train_with_backup.py"
TRIALS = flags.DEFINE_integer("trials", 25, "trainings that are killed", lower_bound=1)
WIDTH = 256
MOST_KILLS = 3


def events(folder):
    path = folder / "events"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(folder, kill_after=None):
    """Runs the script, kills it some seconds after training begins; whether it was killed."""
    begun = sum(line[0] == "begin" for line in events(folder))
    command = [sys.executable, SCRIPT, folder, f"--width={WIDTH}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    if kill_after is not None:
        while sum(line[0] == "begin" for line in events(folder)) == begun:
            time.sleep(0.01)
            if process.poll() is not None:
                break
        try:
            process.wait(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
    _, error = process.communicate()
    if process.returncode not in (0, -9):
        raise RuntimeError(error)
    return process.returncode != 0


def moment(lines):
    """Where a training was when it was killed, from its events."""
    last = lines[-1]
    words = {
        "begin": "before an epoch's end",
        "epoch": "after epoch {}",
        "step": "in the step of epoch {}",
        "step done": "after the step, in epoch {}",
    }
    return words[last[0]].format(*last[1:2])


def main(argv):
    del argv
    from keras_bilinear.files import staged

    chance = random.Random(0)
    rows, equal, kills, killed = [], 0, 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = pathlib.Path(scratch, "whole")
        whole.mkdir()
        train(whole)
        expected = json.loads((whole / "result.json").read_text())
        start = time.perf_counter()
        again = pathlib.Path(scratch, "again")
        again.mkdir()
        begin = None
        process = subprocess.Popen([sys.executable, SCRIPT, again, f"--width={WIDTH}"])
        while process.poll() is None:
            if begin is None and events(again):
                begin = time.perf_counter()
            time.sleep(0.01)
        seconds = time.perf_counter() - (begin or start)
        for trial in range(TRIALS.value):
            folder = pathlib.Path(scratch, str(trial))
            folder.mkdir()
            moments = []
            while len(moments) < MOST_KILLS and train(folder, chance.uniform(0, seconds)):
                moments.append(moment(events(folder)))
            if not (folder / "result.json").exists():
                train(folder)
            result = json.loads((folder / "result.json").read_text())
            difference = max(
                abs(a - b) / b for a, b in zip(result["losses"], expected["losses"], strict=True)
            )
            same = result["sizes"] == expected["sizes"]
            equal += same and difference < 1e-5
            kills += len(moments)
            killed += bool(moments)
            sizes = "as expected" if same else "DIFFERENT"
            rows.append(f"| {trial} | {'; '.join(moments)} | {sizes} | {difference:.1e} |")
            print(rows[-1], flush=True)
            shutil.rmtree(folder)
    lines = [
        "# Killed and resumed",
        "",
        f"`python benchmarks/killed.py --trials={TRIALS.value}`; {tables.machine()}. "
        f"{kills} kills in {killed} of {len(rows)} trainings, the others ended first; {equal} of "
        f"{len(rows)} have the sizes and, within 1e-5, the losses in every epoch of a training "
        "that nothing disturbed.",
        "",
        "| training | killed | sizes of the model | largest relative difference of a loss |",
        "|---|---|---|---|",
        *rows,
    ]
    with staged(tables.RESULTS) as folder:
        (folder / "killed.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
