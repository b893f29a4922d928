import keras
import pytest

from keras_bilinear import benchmark
from keras_bilinear.benchmark import Case

RATES = {"macs": 1e9, "bytes": 1e6}
DENSE = Case("dense", (4,), 36, 36, 2)
EMBEDDING = Case("embedding", (2, 3), 36, 36, 2)


@pytest.mark.parametrize("case", [DENSE, EMBEDDING])
def test_every_case_runs_forward_and_trains(case, monkeypatch):
    calls = []

    def seconds(functions):
        for function in functions:
            function()
        calls.append(len(functions))
        return [0.5, 0.25][: len(functions)]

    monkeypatch.setattr(benchmark, "_seconds", seconds)
    xla = keras.config.backend() == "jax"
    record = benchmark.measure(case, xla, RATES)
    assert calls == [2, 2]
    assert record["forward"] == record["step"] == [0.5, 0.25]
    assert record["parameters"][0] == 36 * 36 + 36 * (case.kind == "dense")
    assert record["parameters"][1] == 2 * (36 + 36) + 36 * (case.kind == "dense")
    (row, *_) = benchmark._rows({"jax": [record]})
    assert row[:2] == [str(case), "forward"]
    assert row[2].startswith("2.00x (500.00 / 250.00 / ")


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
