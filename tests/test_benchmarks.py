"""What the scripts in `benchmarks/` share and others may use: no script is run here."""

import json
import pathlib

import h5py
import keras
import numpy as np
import pytest

import keras_bilinear


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "benchmarks")


@keras.saving.register_keras_serializable("test_benchmarks")
def doubled(x):
    return 2 * x


# A Sequential model as Keras 2.2 saved it: no input layer, an argument that is gone, and an
# activation without a name.
LEGACY = {
    "class_name": "Sequential",
    "config": {
        "name": "sequential_1",
        "layers": [
            {
                "class_name": "Embedding",
                "config": {
                    "name": "embedding_1",
                    "trainable": True,
                    "batch_input_shape": [None, 5],
                    "dtype": "float32",
                    "input_dim": 9,
                    "output_dim": 4,
                },
            },
            {
                "class_name": "LSTM",
                "config": {
                    "name": "lstm_1",
                    "trainable": True,
                    "units": 3,
                    "activation": "tanh",
                    "recurrent_activation": "sigmoid",
                    "time_major": False,
                },
            },
            {
                "class_name": "Dense",
                "config": {
                    "name": "dense_1",
                    "trainable": True,
                    "units": 2,
                    "activation": "<lambda>",
                },
            },
        ],
    },
}


def same_model_today():
    layers = [
        keras.layers.Embedding(9, 4, name="embedding_1"),
        keras.layers.LSTM(3, name="lstm_1"),
        keras.layers.Dense(2, activation=doubled, bias_initializer="uniform", name="dense_1"),
    ]
    return keras.Sequential([keras.Input((5,), dtype="int32"), *layers])


@pytest.fixture
def model():
    return same_model_today()


@pytest.fixture
def legacy_file(model, tmp_path):
    """A file as Keras 2 wrote it, with the weights of `model`."""
    path = tmp_path / "model.hdf5"
    with h5py.File(path, "w") as file:
        file.attrs.update(keras_version="2.2.4", backend="tensorflow")
        file.attrs["model_config"] = json.dumps(LEGACY)
        weights = file.create_group("model_weights")
        weights.attrs.update(keras_version="2.2.4", backend="tensorflow")
        weights.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        for layer in model.layers:
            group = weights.create_group(layer.name)
            names = [f"{layer.name}/{weight.name}:0" for weight in layer.weights]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, values in zip(names, layer.get_weights(), strict=True):
                group[name] = values
    return path


def repairs():
    import legacy

    return {
        "arguments": legacy.drop_arguments("time_major"),
        "activation": legacy.replace_activation("<lambda>", doubled),
        "input layer": legacy.add_input_layer,
        "integers": legacy.integer_inputs,
    }


def test_a_file_of_keras_2_loads_with_repairs(model, legacy_file, tmp_path):
    import legacy

    content = legacy_file.read_bytes()
    loaded = legacy.load_legacy_h5(legacy_file, repairs().values())
    assert legacy_file.read_bytes() == content
    assert loaded.inputs[0].dtype == "int32"
    x = np.arange(20).reshape(4, 5) % 9
    outputs = loaded.predict(x, verbose=0)
    np.testing.assert_allclose(outputs, model.predict(x, verbose=0), rtol=1e-6)
    loaded.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), outputs)


@pytest.mark.parametrize("without", ["arguments", "activation", "input layer"])
def test_a_file_of_keras_2_needs_each_repair(legacy_file, without):
    import legacy

    others = [repair for name, repair in repairs().items() if name != without]
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever Keras raises
        legacy.load_legacy_h5(legacy_file, others)(np.zeros((1, 5), "int32"))


def test_indices_stay_floats_without_a_repair(legacy_file):
    import legacy

    others = [repair for name, repair in repairs().items() if name != "integers"]
    assert legacy.load_legacy_h5(legacy_file, others).inputs[0].dtype == "float32"


def test_an_activation_must_be_registered():
    import legacy

    with pytest.raises(ValueError, match="must be registered"):
        legacy.replace_activation("<lambda>", lambda x: x)


def test_repairs_reach_the_layers_of_models_in_a_model():
    import legacy

    dense = {"class_name": "Dense", "config": {"activation": "<lambda>", "gone": 1}}
    inner = {"class_name": "Sequential", "config": [dense]}
    outer = {"class_name": "Model", "config": {"layers": [inner]}}
    legacy.drop_arguments("gone")(outer)
    legacy.replace_activation("<lambda>", doubled)(outer)
    assert dense["config"] == {"activation": "test_benchmarks>doubled"}


def test_a_file_of_weights_alone_is_refused_and_can_be_read(model, legacy_file):
    import legacy

    with h5py.File(legacy_file, "r+") as file:
        del file.attrs["model_config"]
    with pytest.raises(ValueError, match="weights only"):
        legacy.load_legacy_h5(legacy_file)
    weights = legacy.read_weights(legacy_file)
    assert {*weights} == {layer.name for layer in model.layers}
    for layer in model.layers:
        for values, expected in zip(weights[layer.name], layer.get_weights(), strict=True):
            np.testing.assert_array_equal(values, expected)


def test_an_lstm_of_cudnn_becomes_one_of_keras():
    import legacy

    # What cuDNN reads is, for each gate, a matrix of shape (units, inputs) and two biases.
    rng = np.random.default_rng(0)
    inputs, units = 3, 2
    matrices = rng.normal(size=(4, units, inputs)), rng.normal(size=(4, units, units))
    biases = rng.normal(size=(2, 4, units))
    stored = [
        np.concatenate([gate.reshape(-1, units) for gate in gates], axis=1) for gates in matrices
    ]
    kernel, recurrent, bias = legacy.lstm_of_cudnn(*stored, biases.ravel())
    x, h = rng.normal(size=inputs), rng.normal(size=units)
    expected = [matrices[0][i] @ x + matrices[1][i] @ h + biases[:, i].sum(0) for i in range(4)]
    np.testing.assert_allclose(x @ kernel + h @ recurrent + bias, np.concatenate(expected))


def test_a_constant_is_read_from_a_source_that_is_not_run(tmp_path):
    from real.case import constant

    path = tmp_path / "module.py"
    path.write_text("raise SystemExit\nNAMES = ['a', 'b']\n")
    assert constant(path, "NAMES") == ["a", "b"]
    with pytest.raises(ValueError, match="no constant 'OTHERS'"):
        constant(path, "OTHERS")


def test_a_plan_of_truncated_svds_has_low_rank_and_keeps_to_its_size():
    from real.truncated_svd import truncated_svd_plan

    dense = [keras.layers.Dense(32, name="wide"), keras.layers.Dense(30, name="last")]
    model = keras.Sequential([keras.Input((32,)), *dense])
    # A kernel of rank 2, which needs no more, and a full one, which gets the rest.
    left, right = np.random.default_rng(0).normal(size=(2, 32, 2))
    dense[0].set_weights([left @ right.T, np.zeros(32)])
    plan = truncated_svd_plan(model, 1000)
    assert plan["wide"].rank == 2
    assert plan["last"].rank > 4
    assert 900 < plan.parameters <= 1000
    assert all(layer.factorizations[0].is_low_rank for layer in plan.values())
    small = keras_bilinear.rewrite_model(model, plan)
    wide = keras_bilinear.expand_model(small).get_layer("wide")
    np.testing.assert_allclose(wide.get_weights()[0], left @ right.T, atol=1e-4)


class Accuracy:
    lower_is_better = False

    def lost(self, score, original):
        return (original - score) / original


def file_row(variant, numbers, bytes, metric, ratio=1.0, budget="0.25"):
    row = {"variant": variant, "numbers": numbers, "bytes": bytes, "metric": metric}
    return {name: str(value) for name, value in {**row, "ratio": ratio, "budget": budget}.items()}


ORIGINALS = [
    file_row("original", "float32", 4000, 0.8),
    file_row("original", "dynamic int8", 1000, 0.8),
    file_row("original", "int8", 1200, 0.7),
]


@pytest.mark.parametrize(
    ("row", "half", "quarter"),
    [
        (("fitted", "int8", 240, 0.795), "**yes**, fitted at 0.25 in int8, with 24%", "**yes**"),
        (("fitted", "int8", 400, 0.795), "**yes**", "no rewritten int8 file is so small"),
        (("fitted", "int8", 240, 0.78), "**no**, the nearest is fitted", "**yes**"),
        (("fitted", "int8", 240, 0.795, 1.2), "1.2x the time", "**no**"),
        (("fitted", "int8", 550, 0.795), "**no**, no rewritten", "**no**"),
    ],
)
def test_the_report_says_whether_a_goal_is_reached(row, half, quarter):
    from real.report import verdict

    sentences = verdict(Accuracy(), [*ORIGINALS, file_row(*row)])
    assert half in sentences[0]
    assert quarter in sentences[1]


def test_neither_float32_files_nor_svd_reach_a_goal():
    from real.report import verdict

    others = [file_row("svd", "int8", 100, 0.8), file_row("fitted", "float32", 100, 0.8)]
    assert verdict(Accuracy(), [*ORIGINALS, *others]) == ["No rewritten int8 file is measured."]
