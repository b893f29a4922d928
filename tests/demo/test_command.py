import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from run_command import run_command

from keras_bilinear import datasets
from keras_bilinear.demo import command
from keras_bilinear.litert.report import LiteRTReport
from keras_bilinear.litert.run import run_litert
from keras_bilinear.reports.summary import count_macs

if keras.config.backend() != "tensorflow":
    pytest.skip("what the demo is made of is tested on this backend", allow_module_level=True)
for package in ("ai_edge_litert", "matplotlib", "sklearn", "tensorflow"):
    pytest.importorskip(package)

FILES = {f"{name}.{kind}" for name in ("full", "bilinear") for kind in ("keras", "tflite")}
FILES |= {"results.json", "results.png"}


def run(folder, *arguments):
    """Runs the demo quickly and returns what it wrote as JSON."""
    assert run_command("demo", "--quick", "--width=48", f"--output_dir={folder}", *arguments) == 0
    return json.loads((folder / "results.json").read_text())


def run_file(path, examples):
    """The outputs of a LiteRT file, one example at a time."""
    return run_litert(path, {"input_1": examples[:, None]}).outputs.values()


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The folder that a run wrote into, its results as JSON, and what it printed."""
    folder = tmp_path_factory.mktemp("first")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = run(folder, "--rank=2", "--seed=3")
    return folder, results, printed.getvalue()


def test_the_files_are_what_the_table_says(first_run):
    folder, results, output = first_run
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    dataset = datasets.load("digits").head(command.QUICK_EXAMPLES)
    for name in ("full", "bilinear"):
        result = results[name]
        model = keras.models.load_model(folder / f"{name}.keras")
        litert_file = folder / f"{name}.tflite"
        (outputs,) = run_file(litert_file, dataset.x_test[:8])
        assert result["parameters"] == model.count_params()
        assert result["macs"] == count_macs(model)
        assert result["keras_bytes"] == os.path.getsize(folder / f"{name}.keras")
        assert result["litert_bytes"] == os.path.getsize(litert_file)
        expected = model.predict(dataset.x_test[:8], verbose=0)
        np.testing.assert_allclose(outputs[:, 0], expected, atol=1e-4)
        assert result["litert_difference"] < 1e-5
        _, accuracy = model.evaluate(dataset.x_test, dataset.y_test, verbose=0)
        assert result["test_accuracy"] == pytest.approx(accuracy)
        assert result["accuracy_by_epoch"] == [result["test_accuracy"]]
        assert result["step_ms"] > 0
        assert f"{result['parameters']:,}" in output
        assert f"{result['test_accuracy']:.2%}" in output
    assert results["full"]["parameters"] > 2 * results["bilinear"]["parameters"]
    assert results["settings"]["rank"] == 2


def test_same_seed_same_accuracy(first_run, tmp_path, monkeypatch):
    report = LiteRTReport("", 1, {}, 1, 1, None, 1.0, 0.0, 1.0)
    monkeypatch.setattr(command, "write", lambda *_: (1, report))
    again, other = (run(tmp_path, "--rank=2", f"--seed={seed}") for seed in (3, 4))
    first, again, other = (
        [results[name]["accuracy_by_epoch"] for name in ("full", "bilinear")]
        for results in (first_run[1], again, other)
    )
    assert first == again != other


def test_mixed_precision_and_scale(tmp_path):
    results = run(tmp_path, "--mixed_precision", "--scale=2", "--rank=1", "--batch_size=1000")
    model = keras.models.load_model(tmp_path / "bilinear.keras")
    assert {layer.dtype_policy.name for layer in model.layers} == {"mixed_bfloat16", "float32"}
    assert results["bilinear"]["litert_difference"] < 1e-5


def text_dataset():
    x = np.random.default_rng(0).integers(0, datasets.VOCABULARY, (8, datasets.TOKENS), "int32")
    y = np.arange(8) % 2
    return datasets.Dataset("words", "text", 2, x, y, x, y)


def test_scale_multiplies_both_output_factors_of_every_hidden_layer():
    options = {"width": 36, "depth": 2, "dtype": "float32"}
    narrow = command.build(text_dataset(), rank=1, scale=1, **options)
    wide = command.build(text_dataset(), rank=1, scale=3, **options)
    full = command.build(text_dataset(), rank=None, scale=3, **options)
    for one, three in zip(narrow.layers[:-1], wide.layers[:-1], strict=True):
        if hasattr(one, "rank"):
            factors = one.factorization.output_factors
            assert three.factorization.output_factors == tuple(3 * factor for factor in factors)
    assert wide.layers[-1].units == narrow.layers[-1].units == 2
    assert full.layers[2].units == narrow.layers[2].units == 36


def test_a_text_network_trains_and_is_written(tmp_path):
    dataset = text_dataset()
    model = command.build(dataset, width=16, depth=1, rank=2, scale=1, dtype="float32")
    with command.Progress("text", 1, 2, console=None) as progress:
        accuracy = command.train(model, dataset, 1, 4, 1e-3, progress)
    assert len(accuracy) == 1
    assert len(progress.step_seconds) == 2
    keras_bytes, litert = command.write(model, dataset, tmp_path, "text")
    assert keras_bytes == os.path.getsize(tmp_path / "text.keras")
    assert litert.difference < 1e-5


def test_ctrl_c_leaves_finished_files_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "keras_bilinear", "demo", f"--output_dir={tmp_path}"]
    process = subprocess.Popen(
        [*command, "--width=16", "--epochs=2", "--batch_size=8"],
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background may have inherited that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    finished = {"full.keras", "full.tflite"}
    deadline = time.monotonic() + 240
    while {path.name for path in tmp_path.iterdir()} != finished and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    *progress, last = error.splitlines()
    assert all("network" in line for line in progress)  # no log lines
    assert last == "keras-bilinear: interrupted"
    assert {path.name for path in tmp_path.iterdir()} == finished
    keras.models.load_model(tmp_path / "full.keras")
    assert len(run_file(tmp_path / "full.tflite", np.ones((2, 8, 8), "float32"))) == 1
