import json

import keras
import numpy as np
import pytest
from run_command import run_command

from keras_bilinear.benchmark import command, report, worker
from keras_bilinear.benchmark.cases import ConvCase, DenseCase, EmbeddingCase, RecurrentCase
from keras_bilinear.cli.errors import CommandError
from keras_bilinear.reports import timing

RATES = {"macs": 1e9, "bytes": 1e6}
DENSE = DenseCase((4,), 36, 36, 2)
EMBEDDING = EmbeddingCase((2, 3), 36, 36, 2)
CONV = ConvCase((2, 4, 4), 16, 16, 2, patches=True)

RECURRENT = RecurrentCase((2, 3), 36, 36, 2)


@pytest.mark.parametrize(
    ("case", "parameters"),
    [
        (DENSE, [36 * 36 + 36, 2 * (36 + 36) + 36]),
        (EMBEDDING, [36 * 36, 2 * (36 + 36)]),
        (RECURRENT, [4 * (2 * 36 * 36 + 36), 4 * (4 * (36 + 36) + 36)]),
        (CONV, [9 * 256 + 16, 2 * (16 + 9 * 16) + 16, 2 * 12 * 4 + 16]),
    ],
)
def test_every_case_runs_forward_and_trains(case, parameters, monkeypatch):
    calls = []

    def seconds(functions):
        for function in functions:
            function()
        calls.append(len(functions))
        return [0.5, 0.25, 1.25][: len(functions)]

    monkeypatch.setattr(worker, "median_seconds", seconds)
    xla = keras.config.backend() == "jax"
    record = worker.measure(case, xla, RATES)
    layers = len(parameters)
    assert calls == [layers, layers]
    assert record["forward"] == record["step"] == [0.5, 0.25, 1.25][:layers]
    assert record["parameters"] == parameters
    (_, speed), (_, patches), (_, memory) = report.tables({"jax": [record]})
    (row, _) = speed
    assert row[:2] == [str(case), "forward"]
    assert row[2].startswith("2.00x (500.00 / 250.00 / ")
    assert len(patches) == 2 * (layers == 3)
    if patches:
        assert patches[0][2] == "5.0x (1250.00)"
    assert memory == []


def test_the_layer_that_extracts_patches_is_a_bilinear_projection_of_each():
    *_, layer = CONV.layers()
    x = CONV.inputs()
    actual = keras.ops.convert_to_numpy(layer(x))
    left, right = (keras.ops.convert_to_numpy(factor) for factor in (layer.left, layer.right))
    patch = x[1, 1:4, 0:3].reshape(layer.rows)
    np.testing.assert_allclose(
        actual[1, 2, 1], (left.T @ patch @ right).ravel(), rtol=1e-4, atol=1e-5
    )


def test_memory_of_a_step_is_measured():
    memory = worker.measure_memory(CONV, 1, keras.config.backend() == "jax")
    assert 0 <= memory < 2e9
    *_, (_, rows) = report.tables({"jax": [{"case": "c", "memory": [4e6, 1e6]}]})
    assert rows == [["c", "training step", "4 / 1"]]


def test_floors_of_a_dense_layer():
    full, bilinear = DENSE.layers()
    full.build((4, 36))
    bilinear.build((4, 36))
    # Where bytes move slowly, they decide.
    moved = 4 * (4 * 36 + 4 * 36 + 36 * 36 + 36)
    assert DENSE.floors(full, RATES)[0] == pytest.approx(moved / RATES["bytes"])
    slow = {"macs": 1.0, "bytes": 1e12}
    assert DENSE.floors(full, slow) == pytest.approx((4 * 36 * 36, 3 * 4 * 36 * 36))
    assert DENSE.floors(bilinear, slow)[0] == 4 * bilinear.factorization.macs


def test_floors_of_a_convolution():
    full, bilinear, _ = CONV.layers()
    full.build((2, 4, 4, 16))
    bilinear.build((2, 4, 4, 16))
    slow = {"macs": 1.0, "bytes": 1e12}
    assert CONV.floors(full, slow) == pytest.approx((32 * 9 * 256, 3 * 32 * 9 * 256))
    # Left first: 4 left filters, 2 terms, on 4 columns; then 3x3 windows over both terms.
    assert CONV.floors(bilinear, slow)[0] == 32 * 2 * 4 * (4 * 4 + 9 * 4 * 4)


def test_floors_of_a_recurrent_layer():
    full, bilinear = RECURRENT.layers()
    full.build((2, 3, 36))
    bilinear.build((2, 3, 36))
    slow = {"macs": 1.0, "bytes": 1e12}
    assert RECURRENT.floors(full, slow)[0] == 6 * 4 * 2 * 36 * 36
    # Two terms, on 6 rows or columns, by 6x6 factors, from both sides.
    assert RECURRENT.floors(bilinear, slow)[0] == 6 * 4 * 2 * (2 * 6 * 6 * (6 + 6))


def test_what_is_measured_is_written_after_each_column(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorflow")

    def run(column, suite):
        if column == "onednn":
            raise CommandError("the machine caught fire")
        return [{"case": f"a {suite} layer", "memory": [4e6, 1e6]}]

    monkeypatch.setattr(command, "_run", run)
    arguments = ["benchmark", "--suite=conv_memory", "--backend=tensorflow", "--backend=onednn"]
    assert run_command(*arguments, f"--output={tmp_path / 'speed'}") == 2
    assert capsys.readouterr().err.endswith("caught fire\n")
    assert "| a conv_memory layer | training step | 4 / 1 |" in (tmp_path / "speed.md").read_text()
    results = json.loads((tmp_path / "speed.json").read_text())
    assert results["command"] == "keras-bilinear benchmark --suite=conv_memory --backend=tensorflow"
    assert [*results["records"]] == ["tensorflow"]


def test_times_wait_for_a_gpu(monkeypatch):
    calls = []

    def function():
        calls.append("function")

    assert timing.waiting(function) is function
    monkeypatch.setattr(timing, "on_gpu", lambda: True)
    backend = keras.config.backend()
    if backend == "jax":
        assert timing.waiting(function) is function
        return
    wait = {
        "tensorflow": "tensorflow.test.experimental.sync_devices",
        "torch": "torch.cuda.synchronize",
    }
    monkeypatch.setattr(wait[backend], lambda: calls.append("wait"))
    timing.waiting(function)()
    assert calls == ["function", "wait"]
