import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_bilinear import export_litert
from keras_bilinear.litert import comparison
from keras_bilinear.litert.comparison import LEAST_NORM, compare_with_model
from keras_bilinear.litert.inputs import MOST, input_specs, read_examples
from keras_bilinear.litert.run import LiteRTRun


class Scaled(keras.Model):
    """Multiplies its inputs by a number for each output."""

    def __init__(self, scales):
        super().__init__()
        self.scales = scales

    def call(self, x):
        return {name: ops.multiply(x, scale) for name, scale in self.scales.items()}


def compare(monkeypatch, x, change, scales=None):
    """Compares a model with what a file would give that changes outputs in some way."""
    scales = scales or {"y": 1.0}
    batches = []

    def run_litert(file, inputs):
        (values,) = inputs.values()
        batches.append(len(values))
        outputs = {name: change(scale * values, name) for name, scale in scales.items()}
        return LiteRTRun(outputs, 1.0 + len(batches), None, None)

    monkeypatch.setattr(comparison, "run_litert", run_litert)
    model = Scaled(scales)
    model(x[:1])
    arguments = input_specs(model, None)
    examples = read_examples(model, arguments, x)
    return compare_with_model("", model, arguments, examples), batches


def test_the_order_of_examples_makes_no_difference(monkeypatch):
    # In the first half all outputs are near zero.
    x = np.concatenate([np.full((20, 3), 1e-7), np.ones((20, 3))]).astype("float32")
    found = [
        compare(monkeypatch, values, lambda y, _: y + np.float32(0.1))[0].difference
        for values in (x, x[::-1])
    ]
    assert found[0] == pytest.approx(0.1 * np.sqrt(2), rel=1e-5)
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_outputs_near_zero_are_measured_on_a_scale_that_is_not(monkeypatch):
    x = np.zeros((20, 1), "float32")
    x[3] = 1e-9
    found, _ = compare(monkeypatch, x, lambda y, _: y + np.float32(1 / 512))
    assert found.difference == pytest.approx(1 / 512 / LEAST_NORM)
    assert found.difference < 0.2
    assert found.agreement is None  # An output of one number has no largest one.


def test_each_output_has_its_own_scale(monkeypatch):
    x = np.ones((4, 2), "float32")
    found, _ = compare(
        monkeypatch,
        x,
        lambda y, name: y * np.float32(1.5 if name == "small" else 1.0),
        {"large": 1000.0, "small": 1.0},
    )
    assert found.difference == pytest.approx(0.5)


def test_one_output_that_is_no_number_counts(monkeypatch):
    found, _ = compare(
        monkeypatch,
        np.ones((4, 2), "float32"),
        lambda y, name: y * np.float32("nan" if name == "b" else 1.0),
        {"a": 1.0, "b": 1.0},
    )
    assert np.isnan(found.difference)


def test_agreement_counts_the_places_of_largest_outputs(monkeypatch):
    x = np.tile(np.array([0.1, 0.3, 0.2], "float32"), (4, 5, 1))  # five answers in each example
    swapped = np.array([0.3, 0.1, 0.2], "float32")

    def change(y, name):
        y = y.copy()
        y[0, :, 0 if name == "a" else slice(2)] = swapped
        return y

    found, _ = compare(monkeypatch, x, change, {"a": 1.0, "b": 1.0})
    assert found.agreement == 1 - 2 / 20  # that of the output `b`


def test_large_outputs_are_compared_in_parts(monkeypatch):
    x = np.random.default_rng(0).normal(size=(11, 8)).astype("float32")
    whole, batches = compare(monkeypatch, x, lambda y, _: y + np.float32(0.1))
    assert batches == [11]
    monkeypatch.setattr(comparison, "_BYTES", 4 * 64)  # four runs of eight inputs and outputs
    parts, batches = compare(monkeypatch, x, lambda y, _: y + np.float32(0.1))
    assert batches == [4, 4, 3]
    assert parts == whole


@pytest.mark.parametrize("kind", ["array", "tuple", "dictionary", "tensor"])
def test_examples_are_drawn_from_all_of_an_array(kind):
    model = keras.Sequential([keras.Input((1,), name="x"), layers.Dense(2)])
    x = np.arange(10 * MOST, dtype="float32")[:, None]
    data = {
        "array": x,
        "tuple": (x, x),
        "dictionary": {"x": x},
        "tensor": ops.convert_to_tensor(x),
    }[kind]
    drawn = read_examples(model, input_specs(model, None), data)["x"].ravel()
    assert len({*drawn}) == MOST
    assert drawn[0] < 100
    assert drawn[-1] > 10 * MOST - 100
    assert {*np.floor(drawn / MOST)} == {*range(10)}
    np.testing.assert_array_equal(
        drawn, read_examples(model, input_specs(model, None), x)["x"].ravel()
    )


def test_the_inputs_of_an_example_stay_together():
    first, second = keras.Input((1,), name="a"), keras.Input((1,), name="b")
    model = keras.Model([first, second], layers.add([first, second]))
    x = np.arange(2 * MOST, dtype="float32")[:, None]
    drawn = read_examples(model, input_specs(model, None), [x, x + 1])
    np.testing.assert_array_equal(drawn["b"], drawn["a"] + 1)
    with pytest.raises(ValueError, match="as many examples each"):
        read_examples(model, input_specs(model, None), [x, x[1:]])


def test_of_batches_the_first_examples_are_taken():
    model = keras.Sequential([keras.Input((1,), name="x"), layers.Dense(2)])
    batches = [np.full((MOST // 2, 1), index, "float32") for index in range(4)]
    drawn = read_examples(model, input_specs(model, None), batches)["x"].ravel()
    assert {*drawn} == {0.0, 1.0}


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="once is enough")
def test_a_file_is_compared_on_all_examples(tmp_path):
    pytest.importorskip("ai_edge_litert")
    model = keras.Sequential([keras.Input((8,)), layers.Dense(3, activation="softmax")])
    model.layers[0].kernel.assign(4 * np.eye(8, 3))
    x = np.zeros((60, 8), "float32")  # in the order of the classes
    x[np.arange(60), np.arange(60) // 20] = np.linspace(0.5, 1, 60)
    reports = [
        export_litert(model, tmp_path / "a.tflite", "int8", representative_data=values)
        for values in (x, x[::-1])
    ]
    assert 0 < reports[0].difference < 0.02
    assert reports[0].difference == pytest.approx(reports[1].difference, rel=1e-4)
    assert reports[0].agreement == 1.0
    assert "100.00%" in str(reports[0])
