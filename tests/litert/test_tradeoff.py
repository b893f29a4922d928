import dataclasses
import json
import math

import keras
import model_kinds
import numpy as np
import pytest

from keras_bilinear import plan_rewrite, tradeoff
from keras_bilinear.litert import held_out, inputs
from keras_bilinear.litert import tradeoff as tradeoff_module
from keras_bilinear.litert.held_out import HeldOut
from keras_bilinear.litert.run import LiteRTRun
from keras_bilinear.litert.tradeoff_report import Tradeoff, Variant

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

on_tensorflow = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="see test_export.py"
)
RNG = np.random.default_rng(0)


def variant(model, budget, quantize, size, metric, **others):
    file = f"{model}_{budget}_{quantize}.tflite"
    return Variant(model, budget, quantize, 9, file, size, metric, 12.34, **others)


ORIGINAL = variant("original", None, None, 40_000, 0.90)
DYNAMIC = variant("original", None, "dynamic_int8", 10_000, 0.898)
HALF = variant("rewritten", 0.5, None, 20_000, 0.897)
TENTH = variant("rewritten", 0.1, "dynamic_int8", 2_000, 0.85)
RECOVERED = variant("recovered", 0.1, "dynamic_int8", 2_000, 0.88)
FAILED = Variant("original", None, "int8", 9, error="LiteRT has no such operation")
NO_MODEL = Variant("rewritten", 0.01, None, error="No plan keeps to the limit")
NO_NUMBER = variant("recovered", 0.5, None, 10, math.nan)


def result(*variants):
    return Tradeoff("accuracy", 100, 0.9, variants, "digest")


RESULT = result(ORIGINAL, DYNAMIC, FAILED, HALF, TENTH, RECOVERED, NO_MODEL, NO_NUMBER)


def test_the_front_is_what_nothing_beats():
    assert RESULT.front == (RECOVERED, DYNAMIC, ORIGINAL)
    equal = dataclasses.replace(RECOVERED, budget=0.2)
    assert result(RECOVERED, equal).front == (RECOVERED, equal)


@pytest.mark.parametrize(
    ("limits", "best"),
    [
        ({}, DYNAMIC),
        ({"max_drop": 0.03}, RECOVERED),
        ({"max_drop": 0}, ORIGINAL),
        ({"max_bytes": 30_000}, DYNAMIC),
        ({"max_bytes": 9_999}, RECOVERED),
        ({"max_bytes": 40_000, "max_drop": 0.1}, RECOVERED),
        ({"max_bytes": 9_999, "max_drop": 0.01}, None),
        ({"max_bytes": 100}, None),
    ],
)
def test_the_best_keeps_to_the_limits(limits, best):
    assert RESULT.best(**limits) == best


@pytest.mark.parametrize(
    ("limits", "texts"),
    [
        ({}, ("ship original, dynamic_int8 (", "No rewritten file within this limit is smaller")),
        ({"max_bytes": 10_000}, ("With at most 10 kB, ship original", "this limit is better.")),
        ({"max_drop": 0.03}, ("0.03 of accuracy lost, ship recovered 0.1", "Compare original, d")),
        ({"max_bytes": 100}, ("nothing to ship. The smallest file is rewritten 0.1",)),
        ({"max_bytes": 9_999, "max_drop": 0.0}, ("The best file of this size is recovered 0.1",)),
    ],
)
def test_advice_names_what_to_ship(limits, texts):
    assert all(text in RESULT.advice(**limits) for text in texts)


def test_advice_without_a_file():
    assert result(FAILED).advice().endswith("nothing to ship. No file could be made.")
    assert "Compare" not in result(ORIGINAL).advice()


@pytest.mark.parametrize("limits", [{"max_bytes": -1}, {"max_drop": "1%"}, {"max_drop": math.nan}])
def test_limits_must_be_numbers(limits):
    with pytest.raises(ValueError, match=f"`{next(iter(limits))}` must be a number"):
        RESULT.best(**limits)


def test_a_tradeoff_is_a_table_and_json():
    lines = str(RESULT).splitlines()
    (line,) = [line for line in lines if "recovered 0.1 " in line]
    assert all(text in line for text in ("2 kB", "12.3 µs", "0.8800", "*"))
    assert any("No plan keeps to the limit" in line for line in lines)
    assert not any("*" in line for line in lines if "rewritten 0.5" in line)
    whole = result(*RESULT.variants[:-1])  # NaN is not equal to itself
    assert Tradeoff.from_json(whole.to_json()) == whole
    with pytest.raises(ValueError, match="The text is no tradeoff"):
        Tradeoff.from_json('{"variants": [{"size": 3}]}')


def test_a_tradeoff_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    figure = RESULT.plot(tmp_path / "tradeoff.svg")
    assert "<svg" in (tmp_path / "tradeoff.svg").read_text()
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == [
        "original, float32",
        "original, dynamic_int8",
        "rewritten, float32",
        "rewritten, dynamic_int8",
        "recovered, dynamic_int8",
    ]
    assert result(FAILED).plot(tmp_path / "empty.svg")


def dense(units=30, **options):
    return keras.Sequential(
        [
            keras.Input((24,)),
            keras.layers.Dense(32, "relu"),
            keras.layers.Dense(units, name="last", **options),
        ]
    )


@pytest.fixture
def runs_as(monkeypatch):
    """Lets a function stand for LiteRT: it gets what the model makes of the inputs."""

    def run_as(model, change):
        def run(path, arrays, threads=1, seconds=0.5):
            (values,) = arrays.values()
            outputs = [keras.ops.convert_to_numpy(model(batch)) for batch in values]
            return LiteRTRun({"output_0": change(np.stack(outputs))}, 1.0, None, None)

        monkeypatch.setattr(held_out, "run_litert", run)

    return run_as


def scorer(model, x, labels=None, metric=None):
    arguments = inputs.input_specs(model, None)
    examples = inputs.read_examples(model, arguments, [(x,)])
    return HeldOut(model, arguments, examples, labels, metric)


def reversed_for_a_quarter(outputs):
    outputs = outputs.copy()
    outputs[::4] = outputs[::4, :, ::-1] if outputs.shape[-1] > 1 else 1 - outputs[::4]
    return outputs


@pytest.mark.parametrize(("units", "activation"), [(30, "softmax"), (1, "sigmoid")])
def test_agreement_is_the_share_of_the_same_answers(runs_as, units, activation):
    model = dense(units, activation=activation)
    score = scorer(model, model_kinds.VECTORS)
    assert (score.metric, score.original, score.count) == ("agreement", 1.0, 40)
    runs_as(model, lambda outputs: outputs)
    assert score.measure("file") == 1.0
    runs_as(model, reversed_for_a_quarter)
    assert score.measure("file") == 0.75


def test_agreement_of_other_outputs_is_by_their_error(runs_as):
    model = dense()
    x = RNG.normal(size=(200, 24)).astype("float32")
    score = scorer(model, x)
    deviation = keras.ops.convert_to_numpy(model(x)).std(0)
    runs_as(model, lambda outputs: outputs + 0.1 * np.sqrt(np.mean(deviation**2)))
    assert score.measure("file") == pytest.approx(0.9, abs=1e-4)


def test_accuracy_and_metrics_of_ones_own(runs_as):
    model, x = dense(activation="softmax"), model_kinds.VECTORS
    labels = keras.ops.convert_to_numpy(model(x)).argmax(-1)
    labels[0] = 29 - labels[0]
    score = scorer(model, x, labels)
    assert (score.metric, score.original) == ("accuracy", 39 / 40)
    runs_as(model, reversed_for_a_quarter)
    assert score.measure("file") == 31 / 40

    def first_class(labels, outputs):
        return keras.ops.mean(labels + outputs[:, 0])

    score = scorer(model, x, labels, first_class)
    assert score.metric == "first_class"
    assert score.original == pytest.approx(np.mean(labels + model.predict(x, verbose=0)[:, 0]))


def test_labels_that_no_accuracy_is_of():
    model, x = model_kinds.two_inputs()
    with pytest.raises(ValueError, match="several outputs need a `metric`"):
        scorer(model, x, np.zeros(40))
    with pytest.raises(ValueError, match="integers or one-hot vectors"):
        scorer(dense(1), model_kinds.VECTORS, RNG.normal(size=40))
    with pytest.raises(ValueError, match="`metric` must return a number"):
        scorer(dense(), model_kinds.VECTORS, np.zeros(40), lambda labels, outputs: outputs)


@pytest.fixture
def exports(monkeypatch):
    """Exports without LiteRT: a file of the weights' size. Returns the names of the files."""
    made = []

    def export(model, path, quantize, data, input_shapes, tolerance):
        if quantize == "int8":
            raise ValueError("no such operation. Received: x=1")
        size = model.count_params() * (4 if quantize is None else 1)
        path.write_bytes(bytes(size))
        made.append(path.name)
        return Variant("", None, None, bytes=size)

    monkeypatch.setattr(tradeoff_module, "export_litert", export)
    monkeypatch.setattr(HeldOut, "measure", lambda self, path: path.stat().st_size / 1e6)
    monkeypatch.setattr(HeldOut, "latency", lambda self, path, seconds: 3.0)
    return made


def test_rows_are_kept_and_the_rest_is_made(exports, tmp_path, monkeypatch):
    model, data = dense(), model_kinds.VECTORS
    options = {"budgets": [0.01, 0.5], "recover": 0, "input_shapes": (1, 24)}
    first = tradeoff(model, data, tmp_path, **options)
    assert exports == [
        "original.tflite",
        "original_dynamic_int8.tflite",
        "rewritten_0.5.tflite",
        "rewritten_0.5_dynamic_int8.tflite",
        "truncated_SVD_0.5.tflite",
        "truncated_SVD_0.5_dynamic_int8.tflite",
    ]
    errors = {one.name: one.error for one in first.variants if one.error}
    assert errors["original, int8"] == "no such operation."
    assert errors["rewritten 0.01, float32"].startswith("No plan keeps to the limit")
    assert len(errors) == 3
    assert {one.latency_us for one in first.measured} == {3.0}
    assert first.examples == 8
    assert Tradeoff.from_json((tmp_path / "tradeoff.json").read_text()) == first
    # The plan is that of the data that are not held out, and is not made again.
    plan = json.loads((tmp_path / "plan_0.5.json").read_text())
    assert plan.keys() == json.loads(plan_rewrite(model, 0.5).to_json()).keys()
    exports.clear()
    monkeypatch.setattr(tradeoff_module, "plan_rewrite", None)
    (tmp_path / "truncated_SVD_0.5.tflite").unlink()
    options["budgets"] = [0.5]
    assert tradeoff(model, data, tmp_path, **options) == first
    assert exports == ["truncated_SVD_0.5.tflite"]


def test_a_model_is_planned_once(exports, tmp_path, monkeypatch):
    planned = []

    def plan(*arguments, **options):
        planned.append(options["budget"])
        return plan_rewrite(*arguments, **options)

    monkeypatch.setattr(tradeoff_module, "plan_rewrite", plan)
    model = dense()
    result = tradeoff(model, model_kinds.VECTORS, tmp_path, [0.4, 0.6, 0.5], recover=0)
    assert planned == [0.6]
    small = {one.budget: one.parameters for one in result.variants if one.model == "rewritten"}
    assert [*small] == [0.6, 0.5, 0.4]
    assert all(size <= budget * model.count_params() for budget, size in small.items())


def test_a_call_that_was_stopped_goes_on(exports, tmp_path, monkeypatch):
    model, data = dense(), model_kinds.VECTORS
    arguments = (model, data, tmp_path, [0.5])

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tradeoff_module, "recover_model", stop)
        with pytest.raises(KeyboardInterrupt):
            tradeoff(*arguments, recover=1)
    assert exports[-1] == "rewritten_0.5_dynamic_int8.tflite"
    exports.clear()
    recovered = tradeoff(*arguments, recover=1)
    assert exports[0] == "recovered_0.5.tflite"
    assert "rewritten_0.5.tflite" not in exports
    assert [one.model for one in recovered.measured] == [
        *["original"] * 2,
        *["rewritten"] * 2,
        *["recovered"] * 2,
        *["truncated SVD"] * 2,
    ]
    with pytest.raises(ValueError, match="the results of another model, of other data"):
        tradeoff(model, data[:30], tmp_path, [0.5], recover=1)


def test_truncated_kernels_have_low_rank_and_no_more_parameters():
    plan = plan_rewrite(dense(), 0.5, calibration_data=model_kinds.VECTORS, low_rank=False)
    before = {path: layer.parameters for path, layer in plan.items()}
    for layer in plan.values():
        tradeoff_module._make_low_rank(layer)
    planned = [layer for layer in plan.values() if layer.rank]
    assert planned
    for layer in planned:
        kernel = layer.factorizations[0]
        assert layer.factors == kernel.low_rank_factors
        assert layer.parameters <= before[layer.path] < layer.parameters_at(layer.rank + 1)


@on_tensorflow
def test_the_files_are_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tradeoff_module, "_ORIGINAL_KINDS", (None,))
    monkeypatch.setattr(tradeoff_module, "_SMALL_KINDS", ("dynamic_int8",))
    monkeypatch.setattr(tradeoff_module, "_ROUNDS", 1)
    model, x = model_kinds.two_inputs()

    def closeness(labels, outputs):
        return -max(np.abs(labels[name] - outputs[name]).max() for name in outputs)

    labels = model.predict(x, verbose=0)
    labels = {f"output_{index}": values for index, values in enumerate(labels)}
    measured = tradeoff(
        model, x, tmp_path, [0.5], metric=closeness, validation_data=(x, labels), recover=0
    )
    original, small, truncated = measured.variants
    assert measured.metric == "closeness"
    assert original.bytes == (tmp_path / "original.tflite").stat().st_size
    assert 0 <= measured.original - original.metric < 1e-4
    assert small.quantize == "dynamic_int8"
    assert small.metric < original.metric - 1e-3
    assert small.parameters <= 0.5 * model.count_params()
    assert all(one.latency_us > 0 for one in (original, small, truncated))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budgets": [2]}, "`budget` must be above 0"),
        ({"budgets": ["a"]}, "`budgets` must be numbers"),
        ({"budgets": None}, "`budgets` must be numbers"),
        ({"recover": -1}, "`recover` must be"),
        ({"validation_split": 1.0}, "`validation_split` must be above 0 and below 1"),
        ({"labels": np.zeros(3)}, "as many labels as examples"),
        ({"labels": np.zeros(40), "validation_data": model_kinds.VECTORS}, "in a tuple with it"),
        ({"metric": "accuracy"}, "`metric` must be a function"),
        ({"metric": len}, "`metric` needs labels"),
        ({"data": None}, "`data` must be inputs of the model"),
        ({"data": model_kinds.VECTORS[:1]}, "two examples at least"),
        ({"input_shapes": (1, 25)}, "`input_shapes` must fit"),
        ({"verbose": 2}, "`verbose` must be one of"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        tradeoff(
            **{"model": dense(), "data": model_kinds.VECTORS, "output_dir": tmp_path, **options}
        )
    assert not [*tmp_path.iterdir()]


def test_models_with_states_are_refused(tmp_path):
    layers = [keras.Input(batch_shape=(2, 3, 4)), keras.layers.GRU(8, stateful=True)]
    with pytest.raises(ValueError, match="keeps no states"):
        tradeoff(keras.Sequential(layers), np.zeros((4, 3, 4)), tmp_path)
