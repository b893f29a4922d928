import importlib
import json
import sys

import keras
import model_kinds
import numpy as np
import pytest
from keras import ops

from keras_bilinear import datasets, plan_rewrite
from keras_bilinear.cli import tradeoff as tradeoff_command
from keras_bilinear.litert.run import run_litert
from keras_bilinear.litert.tradeoff_report import Tradeoff, Variant


@pytest.fixture
def model():
    return model_kinds.sequential()[0]


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "full.keras")
    np.save(tmp_path / "x.npy", model_kinds.VECTORS)
    return tmp_path


def test_a_saved_model_is_planned_rewritten_and_expanded(run, saved, model):
    full, small, plan = saved / "full.keras", saved / "small.keras", saved / "plan.json"
    data = f"--calibration={saved / 'x.npy'}"
    status, output, _ = run("plan", full, "--budget=0.5", data, f"--output={plan}")
    assert status == 0
    assert "BatchNormalization" in output
    size = plan_rewrite(model, budget=0.5, calibration_data=model_kinds.VECTORS).parameters
    status, output, _ = run("rewrite", full, small, f"--plan={plan}", data, "--recover=1")
    assert status == 0
    assert f"-> {size:,} parameters" in output
    loaded = keras.models.load_model(small)
    assert loaded.count_params() == size
    status, output, _ = run("expand", small, saved / "again.keras")
    assert status == 0
    assert f"{size:,} -> {model.count_params():,} parameters" in output
    again = keras.models.load_model(saved / "again.keras")
    np.testing.assert_allclose(
        ops.convert_to_numpy(again(model_kinds.VECTORS)),
        ops.convert_to_numpy(loaded(model_kinds.VECTORS)),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="see test_export.py")
def test_a_saved_model_is_exported(run, saved, model):
    pytest.importorskip("ai_edge_litert")
    arguments = ("export", saved / "full.keras", saved / "full.tflite")
    data = f"--representative_data={saved / 'x.npy'}"
    status, output, _ = run(*arguments, "--input_shape=2,24")
    assert status == 0
    assert "FULLY_CONNECTED" in output
    x = model_kinds.VECTORS.reshape(-1, 2, 24)
    (outputs,) = run_litert(saved / "full.tflite", {"input_1": x}).outputs.values()
    expected = ops.convert_to_numpy(model(model_kinds.VECTORS))
    np.testing.assert_allclose(outputs.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    options = ("--overwrite", "--quantize=int8", "--quantize_io", "--input_shape=input_1=1,24")
    assert run(*arguments, data, *options)[0] == 0
    (outputs,) = run_litert(
        saved / "full.tflite", {"input_1": x.reshape(-1, 1, 24)}
    ).outputs.values()
    np.testing.assert_allclose(outputs[:, 0], expected, atol=0.1 * np.abs(expected).max())


@pytest.fixture
def measured(monkeypatch):
    """Keeps the arguments of `tradeoff`, and returns a result without a measurement."""
    calls = []

    def tradeoff(*arguments, **options):
        calls.append((*arguments, options))
        file = Variant("original", None, "int8", 9, "original_int8.tflite", 2000, 0.9, 5.0)
        return Tradeoff("accuracy", 8, 0.9, (file,))

    monkeypatch.setattr(tradeoff_command, "tradeoff", tradeoff)
    return calls


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="see test_export.py")
def test_files_of_a_saved_model_are_weighed(run, saved, measured):
    pytest.importorskip("ai_edge_litert")
    np.save(saved / "y.npy", np.arange(40))
    arguments = ("tradeoff", saved / "full.keras", f"--data={saved / 'x.npy'}", "--examples=20")
    arguments += (f"--labels={saved / 'y.npy'}", "--budget=0.3", "--budget=0.2", "--recover=0")
    arguments += (f"--output_dir={saved / 'files'}", f"--output={saved / 'weighed.svg'}")
    status, output, _ = run(*arguments, "--max_bytes=3000")
    assert status == 0
    assert "accuracy on 8 held-out examples" in output
    assert "With at most 3 kB, ship original, int8" in output
    assert "<svg" in (saved / "weighed.svg").read_text()
    ((_, data, folder, budgets, options),) = measured
    assert sum(len(batch) for batch in data) == 20
    assert folder == str(saved / "files")
    assert budgets == [0.3, 0.2]
    np.testing.assert_array_equal(options.pop("labels"), np.arange(20))
    assert options == {"validation_data": None, "recover": 0, "input_shapes": None}


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="see test_export.py")
def test_files_are_weighed_on_the_test_set(run, measured, tmp_path):
    pytest.importorskip("ai_edge_litert")
    model = keras.Sequential([keras.Input((8, 8)), keras.layers.Flatten(), keras.layers.Dense(10)])
    model.save(tmp_path / "full.keras")
    result = tmp_path / "weighed.json"
    arguments = ("tradeoff", tmp_path / "full.keras", "--data=digits", f"--output={result}")
    assert run(*arguments)[0] == 0
    ((*_, options),) = measured
    digits = datasets.load("digits")
    for given, expected in zip(
        options["validation_data"], (digits.x_test, digits.y_test), strict=True
    ):
        np.testing.assert_array_equal(given, expected)
    assert json.loads(result.read_text())["variants"][0]["bytes"] == 2000


def test_models_are_inspected(run, saved, model):
    full, small, costs = saved / "full.keras", saved / "small.keras", saved / "costs.json"
    status, output, _ = run("inspect", full, f"--output={costs}")
    assert status == 0
    assert "BatchNormalization" in output
    assert json.loads(costs.read_text())["parameters"] == model.count_params()
    run("rewrite", full, small, "--rank=1")
    status, output, _ = run("inspect", full, small, f"--output={saved / 'costs.svg'}")
    assert status == 0
    assert "Dense to BilinearDense" in output
    assert "<svg" in (saved / "costs.svg").read_text()


def test_accuracy_is_that_on_the_test_set(run, fails, tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten()])
    model.add(keras.layers.Dense(10))
    model.save(tmp_path / "full.keras")
    digits = datasets.load("digits", None)
    answers = ops.convert_to_numpy(model(digits.x_test)).argmax(-1)
    status, output, _ = run("inspect", tmp_path / "full.keras", "--dataset=digits")
    assert status == 0
    assert f"accuracy {(answers == digits.y_test).mean():.2%}" in output
    keras.Sequential([keras.Input((24,)), keras.layers.Dense(10)]).save(tmp_path / "other.keras")
    assert "cannot run the model" in fails("inspect", tmp_path / "other.keras", "--dataset=digits")


@pytest.mark.parametrize("limit", ["--rank=2", "--max_params=1200", "--max_error=0.9", "--scale=2"])
def test_every_limit_can_be_given(run, saved, limit):
    arguments = (saved / "full.keras", saved / "small.keras", limit)
    if limit == "--scale=2":
        arguments += ("--budget=0.8",)
    assert run("rewrite", *arguments)[0] == 0


def test_a_plan_without_low_rank(run, saved):
    model = keras.models.load_model(saved / "full.keras")
    status, output, _ = run("plan", saved / "full.keras", "--budget=0.6", "--nolow_rank")
    assert status == 0
    assert output == str(plan_rewrite(model, budget=0.6, low_rank=False))
    assert output != str(plan_rewrite(model, budget=0.6))


def test_a_budget_has_several_shares(run, saved):
    model = keras.models.load_model(saved / "full.keras")
    status, output, _ = run("plan", saved / "full.keras", "--budget=parameters=0.7,macs=0.6")
    assert status == 0
    assert output == str(plan_rewrite(model, {"parameters": 0.7, "macs": 0.6}))


def test_several_inputs_come_from_one_file(run, tmp_path):
    model, x = model_kinds.two_inputs()
    model.save(tmp_path / "full.keras")
    np.savez(tmp_path / "x.npz", **x)
    data = f"--calibration={tmp_path / 'x.npz'}"
    arguments = (tmp_path / "full.keras", tmp_path / "small.keras", "--rank=1", data)
    assert run("rewrite", *arguments, "--examples=20")[0] == 0


def test_files_are_replaced_only_if_asked_for(run, fails, saved):
    full = (saved / "full.keras").read_bytes()
    error = fails("rewrite", saved / "full.keras", saved / "full.keras")
    assert "is there already: give --overwrite" in error
    assert (saved / "full.keras").read_bytes() == full
    status, *_ = run(
        "rewrite", saved / "full.keras", saved / "full.keras", "--overwrite", "--rank=1"
    )
    assert status == 0
    assert (saved / "full.keras").read_bytes() != full


@pytest.mark.parametrize("command", ["inspect", "plan", "rewrite", "expand"])
def test_files_that_are_no_models_are_refused(command, fails, saved):
    more = [] if command in ("inspect", "plan") else [saved / "out.keras"]
    whole = (saved / "full.keras").read_bytes()
    (saved / "part.keras").write_bytes(whole[: len(whole) // 2])
    (saved / "text.keras").write_text("hello")
    (saved / "model.h5").write_text("hello")
    (saved / "saved_model").mkdir()
    np.savez(saved / "zip", a=1)
    (saved / "zip.npz").rename(saved / "zip.keras")
    assert "there is no file" in fails(command, saved / "missing.keras", *more)
    assert "is no .keras file, or only a part" in fails(command, saved / "part.keras", *more)
    assert "is no .keras file, or only a part" in fails(command, saved / "text.keras", *more)
    assert "is no .h5 file, or only a part" in fails(command, saved / "model.h5", *more)
    assert "is a folder, such as a SavedModel: give" in fails(command, saved / "saved_model", *more)
    for name, what in (
        ("model.pt", "a file of PyTorch"),
        ("model.weights.h5", "a file of weights"),
        ("model.tflite", "a LiteRT file"),
        ("model.txt", "no .keras or .h5 file"),
    ):
        text = fails(command, saved / name, *more)
        assert f"is {what}" in text
        assert "as model.save('MODEL.keras') writes it" in text
    assert "cannot load" in fails(command, saved / "zip.keras", *more)


def test_code_in_a_file_is_loaded_only_if_asked_for(run, fails, tmp_path):
    model = keras.Sequential(
        [keras.Input((24,)), keras.layers.Lambda(lambda x: x * 2), keras.layers.Dense(24)]
    )
    model.save(tmp_path / "full.keras")
    arguments = ("rewrite", tmp_path / "full.keras", tmp_path / "small.keras", "--rank=1")
    assert "with --unsafe only" in fails(*arguments)
    assert run(*arguments, "--unsafe")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inspect"], "usage: keras-bilinear inspect MODEL.keras"),
        (["inspect", "a", "b", "c"], "usage: keras-bilinear inspect MODEL.keras SMALL.keras"),
        (["inspect", "{}/full.keras", "--output=a.txt"], "must be a .json or .png or .svg file"),
        (["inspect", "{}/full.keras", "--dataset=../x"], "no data set"),
        (["plan"], "usage: keras-bilinear plan MODEL.keras"),
        (["rewrite", "{}/full.keras"], "usage: keras-bilinear rewrite MODEL.keras SMALL.keras"),
        (["rewrite", "{}/full.keras", "{}/small.h5"], "the output must be a .keras file"),
        (["plan", "{}/full.keras", "--output={}/a.txt"], "the output must be a .json file"),
        (["rewrite", "{}/full.keras", "{}/full.keras/small.keras"], "cannot write into"),
        (["export", "{}/full.keras", "{}/a.bin"], "the output must be a .tflite file"),
        (["export", "{}/full.keras", "{}/a.tflite", "--input_shape=1,x"], "must be numbers with"),
        (["export", "{}/full.keras", "{}/a.tflite", "--input_shape=1,25"], "must fit the input"),
        (["export", "{}/full.keras", "{}/a.tflite", "--quantize=int8"], "`representative_data`"),
        (["tradeoff", "{}/full.keras"], "--data is needed"),
        (
            ["tradeoff", "{}/full.keras", "--data=digits", "--labels=a.npy"],
            "a data set has its own",
        ),
        (
            ["tradeoff", "{}/full.keras", "--data={}/x.npy", "--budget=0"],
            "`budget` must be above 0",
        ),
        (["tradeoff", "{}/full.keras", "--data={}/x.npy", "--labels={}/x.npz"], "cannot read"),
        (["tradeoff", "{}/full.keras", "--data={}/x.npy", "--output=a.txt"], "must be a .json or"),
        (["plan", "{}/full.keras", "--budget=0"], "`budget` must be above 0"),
        (["plan", "{}/full.keras", "--budget=0.01"], "No plan keeps to the limit"),
        (["plan", "{}/full.keras", "--budget=macs"], "must be a number, or NAME=NUMBER"),
        (["plan", "{}/full.keras", "--budget=macs=0.5,macs=0.6"], "a name is given twice"),
        (["plan", "{}/full.keras", "--budget=bytes=0.5"], "shares of 'parameters' and 'macs'"),
        (["plan", "{}/full.keras", "--budget=0.1", "--rank=3"], "At most one of"),
        (["plan", "{}/full.keras", "--calibration={}/full.keras.npy"], "cannot read"),
        (["plan", "{}/full.keras", "--calibration={}/text.npy"], "cannot read"),
        (["plan", "{}/full.keras", "--calibration={}/wide.npy"], "has no inputs of the model"),
        (["plan", "{}/full.keras", "--calibration={}/wide.npy"], "incompatible with"),
        (["plan", "{}/full.keras", "--calibration={}/empty.npy"], "has no examples"),
        (["plan", "{}/full.keras", "--calibration={}/named.npy"], "has no inputs of the model"),
        (["rewrite", "{}/full.keras", "{}/s.keras", "--recover=2"], "--recover needs"),
        (["rewrite", "{}/full.keras", "{}/s.keras", "--plan={}/text.npy"], "cannot read"),
        (["rewrite", "{}/full.keras", "{}/s.keras", "--plan={}/none.json"], "cannot read"),
        (
            ["rewrite", "{}/full.keras", "{}/s.keras", "--plan={}/plan.json", "--rank=2"],
            "exclude each other",
        ),
        (["rewrite", "{}/full.keras", "{}/s.keras", "--plan={}/plan.json"], "not one of the model"),
    ],
)
def test_mistakes_are_said_in_one_line(arguments, text, fails, saved):
    (saved / "text.npy").write_text("hello")
    np.save(saved / "wide.npy", np.ones((4, 25), "float32"))
    np.savez(saved / "named.npz", a=np.ones((4, 24), "float32"), b=np.ones((4, 24), "float32"))
    (saved / "named.npz").rename(saved / "named.npy")
    np.save(saved / "empty.npy", np.ones((0, 24), "float32"))
    other = plan_rewrite(model_kinds.convolutional()[0], rank=1)
    (saved / "plan.json").write_text(other.to_json())
    assert text in fails(*(argument.replace("{}", str(saved)) for argument in arguments))


def test_what_was_compiled_stays_so(run, tmp_path):
    @keras.saving.register_keras_serializable("test")
    def loss(y, predictions):
        return keras.ops.mean((y - predictions) ** 2)

    model = model_kinds.sequential()[0]
    full, small, again = (tmp_path / f"{name}.keras" for name in ("full", "small", "again"))
    for compiled in ("mse", loss):
        model.compile("adam", compiled)
        model.save(full)
        if compiled is loss:
            del keras.saving.get_custom_objects()["test>loss"]
        run("rewrite", full, small, "--rank=1", "--overwrite")
        run("expand", small, again, "--overwrite")
        for file in (small, again):
            assert keras.models.load_model(file).compiled == (compiled == "mse")


def test_legacy_files_are_read(run, fails, tmp_path):
    model = model_kinds.sequential()[0]
    model.compile("adam", "mse")  # Keras writes "mse", and cannot read it.
    model.save(tmp_path / "full.h5")
    small = tmp_path / "small.keras"
    assert run("rewrite", tmp_path / "full.h5", small, "--rank=1")[0] == 0
    assert keras.models.load_model(small).count_params() < model.count_params()
    lambdas = keras.Sequential([keras.Input((24,)), keras.layers.Lambda(lambda x: x * 2)])
    lambdas.save(tmp_path / "lambda.h5")
    assert "with --unsafe only" in fails("inspect", tmp_path / "lambda.h5")
    assert run("inspect", tmp_path / "lambda.h5", "--unsafe")[0] == 0
    whole = (tmp_path / "full.h5").read_bytes()
    (tmp_path / "full.h5").write_bytes(whole[: len(whole) // 2])
    assert "truncated file" in fails("inspect", tmp_path / "full.h5")


def test_there_may_be_nothing_to_expand(run, fails, saved):
    arguments = ("expand", saved / "full.keras", saved / "again.keras")
    assert "there is nothing to expand: " in fails(*arguments)


OWN = """
import keras

class Own(keras.layers.Dense):
    pass

@keras.saving.register_keras_serializable("own")
class Registered(keras.layers.Dense):
    pass

def own_activation(x):
    return keras.ops.relu(x) / 2
"""


@pytest.fixture
def own(monkeypatch, tmp_path):
    """A module in the current folder with classes and a function, and a forgetful Keras."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    known = dict(keras.saving.get_custom_objects())

    def forget():
        keras.saving.get_custom_objects().clear()
        keras.saving.get_custom_objects().update(known)
        sys.modules.pop("own", None)
        sys.path[:] = [folder for folder in sys.path if folder != str(tmp_path)]
        importlib.invalidate_caches()

    sys.path.insert(0, str(tmp_path))
    yield importlib.import_module("own"), forget
    forget()


def own_models(own):
    inputs = keras.Input((24,))
    cell = keras.layers.SimpleRNNCell(4, activation=own.own_activation)
    nested = keras.Sequential([inputs, keras.Sequential([inputs, own.Own(32)])])
    yield "Own", nested
    yield "Registered", keras.Sequential([inputs, own.Registered(32)])
    yield "own_activation", keras.Sequential([keras.Input((3, 24)), keras.layers.RNN(cell)])


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_classes_of_the_user_are_imported(run, fails, own, tmp_path, suffix):
    module, forget = own
    files = {name: tmp_path / f"{name}.{suffix}" for name, _ in own_models(module)}
    for name, model in own_models(module):
        model.add(keras.layers.Dense(32))
        model.save(files[name])
    for name, file in files.items():
        forget()
        text = fails("plan", file, "--rank=1")
        assert f"'{name}' is not known: name its module with --import=MODULE" in text
        small = tmp_path / f"{name}_small.keras"
        assert run("rewrite", file, small, "--rank=1", "--import=json", "--import=own")[0] == 0
        assert run("expand", small, tmp_path / f"{name}_full.keras", "--import=own")[0] == 0


def test_modules_that_cannot_be_imported(fails, saved, monkeypatch):
    monkeypatch.chdir(saved)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (saved / "ends.py").write_text("raise SystemExit(3)")
    for name, text in (("nothing", "No module named 'nothing'"), ("ends", "3"), ("", "Empty")):
        error = fails("plan", saved / "full.keras", f"--import={name}")
        assert f"cannot import {name!r}: {text}" in error


def test_the_cause_of_an_error_of_keras_is_said(run, fails, own, tmp_path):
    module, forget = own
    _, model = next(own_models(module))
    model.save(tmp_path / "full.keras")
    forget()
    (tmp_path / "own.py").write_text(f"{OWN}\nOwn.from_config = lambda config: config['size']")
    error = fails("plan", tmp_path / "full.keras", "--import=own")
    assert error.endswith("cannot load '{}': 'size'\n".format(tmp_path / "full.keras"))


def test_arrays_of_different_lengths_are_said_in_one_line(fails, tmp_path):
    model_kinds.two_inputs()[0].save(tmp_path / "full.keras")
    np.savez(tmp_path / "x.npz", a=np.ones((5, 24), "float32"), b=np.ones((4, 24), "float32"))
    text = fails("plan", tmp_path / "full.keras", f"--calibration={tmp_path / 'x.npz'}")
    assert "must have as many examples each" in text


def test_plans_are_json(run, saved):
    run("plan", saved / "full.keras", f"--output={saved / 'plan.json'}", "--rank=1")
    content = json.loads((saved / "plan.json").read_text())
    assert [layer["type"] for layer in content["layers"]] == [
        "Dense",
        "BatchNormalization",
        "Dense",
    ]
