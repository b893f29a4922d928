import json
import pathlib
import random
import signal
import subprocess
import sys

import h5py
import keras
import model_kinds
import numpy as np
import pytest
from keras import layers, ops, tree

from keras_bilinear import BilinearRewrite
from keras_bilinear.keras_private import training
from keras_bilinear.layers.converter import is_bilinear
from keras_bilinear.layers.dense import DenseConverter
from keras_bilinear.rewriting import in_training, trial
from keras_bilinear.rewriting.journal import Journal
from keras_bilinear.rewriting.sites import walk
from keras_bilinear.rewriting.training_batches import EXAMPLES, training_batches

BACKEND = keras.config.backend()
# JAX compiles each of them for half a minute.
FEW_KINDS = (model_kinds.nested, model_kinds.attention, model_kinds.subclassed)
KINDS = FEW_KINDS if BACKEND == "jax" else model_kinds.KINDS
RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 32)).astype("float32")
Y = (X[:, :8] ** 2).astype("float32")


def mlp():
    hidden = [layers.Dense(width, "relu", name=f"hidden_{width}") for width in (64, 48)]
    return keras.Sequential([keras.Input((32,)), *hidden, layers.Dense(8, name="last")])


def trained():
    """A model that knows its examples, so that nothing of it can be lost without notice."""
    model = mlp()
    model.compile(keras.optimizers.Adam(3e-3), "mse")
    assert fit(model, epochs=60)["loss"][-1] < 0.5
    model.compile(keras.optimizers.SGD(1e-6), "mse")
    return model


def fit(model, *extra, epochs=4, x=X, y=Y, **options):
    history = model.fit(
        x, y, batch_size=None if y is None else 32, epochs=epochs, verbose=0, shuffle=False,
        callbacks=list(extra), **options,
    )  # fmt: skip
    return history.history


def predict(model, x=X):
    return ops.convert_to_numpy(model(x, training=False))


def bilinear(model):
    return [site.path for site in walk(model) if is_bilinear(site.layer)]


def targets(model, x):
    outputs = model(tree.map_structure(lambda a: a[:1], x), training=False)
    count = len(tree.flatten(x)[0])
    return tree.map_structure(lambda y: np.ones((count, *y.shape[1:]), "float32"), outputs)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_every_kind_of_model_is_rewritten_in_place(make, tmp_path):
    model, x = make()
    full = model.count_params()
    # TensorFlow traces the loops over time for half a minute.
    eager = BACKEND == "tensorflow" and make is model_kinds.recurrent
    model.compile("adam", "mse", run_eagerly=eager)
    history = fit(model, BilinearRewrite(1, 0.75), epochs=3, x=x, y=targets(model, x))
    assert bilinear(model)
    assert history["parameters"] == [full, model.count_params(), model.count_params()]
    assert model.count_params() <= 0.75 * full
    assert len(history["loss"]) == 3
    assert np.isfinite(history["loss"]).all()
    assert len(model.optimizer._trainable_variables) == len(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = [ops.convert_to_numpy(y) for y in tree.flatten(model(x, training=False))]
    actual = [ops.convert_to_numpy(y) for y in tree.flatten(loaded(x, training=False))]
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    loaded.run_eagerly = eager
    loaded.fit(x, targets(model, x), verbose=0)


class State(keras.callbacks.Callback):
    """Notes the state of the optimizer when an epoch begins."""

    def on_epoch_begin(self, epoch, logs=None):
        optimizer = self.model.optimizer
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        slots = {}
        for name, values in vars(inner).items():
            if isinstance(values, list) and name.lstrip("_") in SLOTS:
                for variable, value in zip(self.model.trainable_variables, values, strict=True):
                    slots[name, variable.path] = ops.convert_to_numpy(value)
        scalars = [v for v in optimizer.variables if v.shape == () and "iter" not in v.path]
        self.now = {
            "iterations": int(ops.convert_to_numpy(optimizer.iterations)),
            "inner iterations": int(ops.convert_to_numpy(inner._iterations)),
            "rate": float(ops.convert_to_numpy(inner.learning_rate)),
            "scalars": [float(ops.convert_to_numpy(v)) for v in scalars],
        }
        self.slots = slots


SLOTS = {
    "accumulators",
    "linears",
    "momentums",
    "velocities",
    "accumulated_gradients",
    "model_variables_moving_average",
    "r",
    "c",
    "v",
}
OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(1e-3, amsgrad=True),
    "momentum": lambda: keras.optimizers.SGD(1e-3, momentum=0.9, clipnorm=1.0),
    "rmsprop": lambda: keras.optimizers.RMSprop(1e-3, momentum=0.9, centered=True),
    "adafactor": lambda: keras.optimizers.Adafactor(1e-3),
    "lion": lambda: keras.optimizers.Lion(1e-4),
    "nadam": lambda: keras.optimizers.Nadam(1e-3),
    "ftrl": lambda: keras.optimizers.Ftrl(1e-3),
    "lamb": lambda: keras.optimizers.Lamb(1e-3),
    "muon": lambda: keras.optimizers.Muon(1e-3),
    "schedule": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(1e-2, 50), weight_decay=0.1
    ),
    "accumulation": lambda: keras.optimizers.Adam(1e-3, gradient_accumulation_steps=2),
    "average": lambda: keras.optimizers.Adam(1e-3, use_ema=True, ema_momentum=0.9),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(1e-3), initial_scale=64.0, dynamic_growth_steps=4
    ),
}
# They know from the kernel how large gradients of its factors are.
ADAMS = {"adam", "nadam", "lamb", "schedule", "accumulation", "average", "scaled"}
FEW_OPTIMIZERS = ("adam", "schedule", "accumulation", "average", "scaled")


@pytest.mark.parametrize("name", FEW_OPTIMIZERS if BACKEND == "jax" else OPTIMIZERS)
def test_the_optimizer_keeps_what_it_knows_of_other_variables(name):
    model, before, after = mlp(), State(), State()
    optimizer = OPTIMIZERS[name]()
    model.compile(optimizer, "mse", jit_compile=False)
    ranks = {"hidden_64": 1, "hidden_48": None, "last": None}
    callback = BilinearRewrite(3, 0.9, layers=ranks)
    history = fit(model, before, callback, after)
    assert bilinear(model) == ["hidden_64"]
    assert model.optimizer is optimizer
    assert before.now == after.now
    assert before.now["inner iterations"] == 9
    last = {key: value for key, value in after.slots.items() if "hidden_64" not in key[1]}
    assert last
    for key, value in last.items():
        np.testing.assert_array_equal(value, before.slots[key])
    for (slot, path), value in after.slots.items():
        if slot == "_velocities" and name in ADAMS and "hidden_64" in path:
            assert value.any(), (slot, path)
        elif "hidden_64" in path and name not in ("average", "ftrl"):
            assert not value.any(), (slot, path)
    assert np.isfinite(history["loss"]).all()


def test_an_average_of_a_factor_starts_with_the_factor():
    model, state = mlp(), State()
    model.compile(keras.optimizers.Adam(0.0, use_ema=True), "mse")
    fit(model, BilinearRewrite(1, 0.5), state, epochs=2)
    variables = {variable.path: variable for variable in model.trainable_variables}
    averages = {path: v for (slot, path), v in state.slots.items() if "average" in slot}
    assert set(averages) == set(variables)
    for path, value in averages.items():
        np.testing.assert_allclose(value, ops.convert_to_numpy(variables[path]), rtol=1e-6)


def test_averages_that_are_swapped_after_it_are_not_mixed_with_weights():
    losses = []
    for order in (1, -1):
        keras.utils.set_random_seed(0)
        model = mlp()
        model.compile(keras.optimizers.Adam(1e-2, use_ema=True), "mse")
        callback = BilinearRewrite(2, 0.9, calibration_data=X, layers=["hidden_48"])
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        losses.append(fit(model, *[callback, swap][::order])["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_layers_are_excluded_at_every_step():
    model = mlp()
    model.compile("adam", "mse")
    exclude = (layer for layer in (model.layers[0], model.layers[-1]))
    callback = BilinearRewrite(schedule={0: 0.9, 1: 0.8}, calibration_data=X, exclude=exclude)
    fit(model, callback, epochs=2)
    assert bilinear(model) == ["hidden_48"]


@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_execution": 2},
        {"run_eagerly": True},
        pytest.param(
            {"jit_compile": True},
            marks=pytest.mark.skipif(BACKEND == "torch", reason="torch.compile needs minutes"),
        ),
    ],
    ids=str,
)
def test_ways_to_run(options):
    if BACKEND == "torch" and "steps_per_execution" in options:
        pytest.skip("Keras has none on PyTorch")
    model = mlp()
    model.compile("adam", "mse", metrics=["mae"], **options)
    history = fit(model, BilinearRewrite(1, 0.5), validation_data=(X, Y))
    assert model.count_params() == history["parameters"][-1] <= 0.5 * history["parameters"][0]
    assert set(history) == {"loss", "mae", "val_loss", "val_mae", "parameters"}
    assert history["val_loss"][-1] == pytest.approx(np.mean((predict(model) - Y) ** 2), rel=1e-3)


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_weights_of_half_precision_are_rewritten(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = mlp()
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(keras.optimizers.Adam(1e-3, epsilon=1e-3), "mse", jit_compile=False)
    history = fit(model, BilinearRewrite(2, 0.5))
    assert {variable.dtype for variable in model.weights} == {policy}
    assert np.isfinite(history["loss"]).all()


def test_mixed_precision_goes_on():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = mlp()
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(keras.optimizers.Adam(1e-3), "mse", jit_compile=False)
    history = fit(model, BilinearRewrite(2, 0.5), epochs=6)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert {layer.dtype_policy.name for layer in model.layers} == {"mixed_float16"}
    assert history["loss"][-1] < history["loss"][2]


def test_steps_of_a_schedule_make_the_model_smaller():
    model = mlp()
    model.compile("adam", "mse")
    callback = BilinearRewrite(schedule={1: 0.6, 3: 0.3, 4: 0.15})
    sizes = fit(model, callback, epochs=6)["parameters"]
    full = sizes[0]
    assert sizes[1] == sizes[2]
    assert sizes[4] == sizes[5]
    for size, budget in zip((sizes[1], sizes[3], sizes[4]), (0.6, 0.3, 0.15), strict=True):
        assert 0.5 * budget * full < size <= budget * full
    assert callback.plan.parameters == model.count_params()


@pytest.mark.parametrize("low_rank", [True, False])
def test_factors_are_near_square_where_low_rank_is_not_allowed(low_rank):
    model = mlp()
    for layer in model.layers:
        rows, columns = layer.kernel.shape
        layer.kernel.assign(RNG.normal(size=(rows, 2)) @ RNG.normal(size=(2, columns)))
    model.compile(keras.optimizers.SGD(1e-6), "mse")
    callback = BilinearRewrite(at_epoch=1, budget=0.2, low_rank=low_rank)
    fit(model, callback, epochs=2)
    found = {p.factorizations[0].is_low_rank for p in callback.plan.values() if p.rank}
    assert found == {low_rank}


def test_a_layer_that_a_step_does_not_change_is_trained_on():
    model, before, after = mlp(), State(), State()
    model.compile("adam", "mse", jit_compile=False)
    ranks = {"hidden_64": 2, "hidden_48": None, "last": None}
    callback = BilinearRewrite(schedule={1: 0.9, 2: 0.8}, layers=ranks)
    fit(model, before, callback, after, epochs=3)
    assert before.slots.keys() == after.slots.keys()
    for key, value in after.slots.items():
        np.testing.assert_array_equal(value, before.slots[key])


def test_in_a_step_the_outputs_change_no_more_than_the_plan_says():
    """At the sufficient rank they stay what they are."""
    model = mlp()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    expected = predict(model)
    callback = BilinearRewrite(0, 1.0, layers={"hidden_48": 6, "hidden_64": None, "last": None})
    fit(model, callback, epochs=1)
    assert bilinear(model) == ["hidden_48"]
    error = np.linalg.norm(predict(model) - expected) / np.linalg.norm(expected)
    assert 0 < error < 1.5 * callback.plan["hidden_48"].error


@pytest.mark.parametrize("on_drop", ["stop", "undo"])
def test_a_drop_ends_the_steps(on_drop):
    model = trained()
    callback = BilinearRewrite(
        schedule={2: 0.9, 3: 0.1, 5: 0.09}, monitor="loss", max_drop=0.5, on_drop=on_drop
    )
    history = fit(model, callback, epochs=7)
    sizes, losses = history["parameters"], history["loss"]
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3] == sizes[4]
    assert losses[4] > losses[0] + 0.5
    if on_drop == "stop":
        assert sizes[4:] == sizes[4:5] * 3
    else:
        assert sizes[5] == sizes[6] == sizes[2] == callback.plan.parameters
        assert losses[6] == pytest.approx(losses[2], abs=1e-3)
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 21


def test_the_last_step_may_be_undone_at_the_end(tmp_path):
    model = trained()
    before = predict(model)
    stop = keras.callbacks.EarlyStopping("loss", patience=1, restore_best_weights=True)
    callback = BilinearRewrite(
        at_epoch=1, budget=0.1, monitor="loss", max_drop=0.01, on_drop="undo"
    )
    fit(model, callback, stop, epochs=3)
    assert bilinear(model) == []
    assert type(model.layers[0]) is layers.Dense
    np.testing.assert_allclose(predict(model), before, atol=1e-3)
    model.save(tmp_path / "model.keras")
    fit(model, epochs=1)


def fails(*arguments, **options):
    raise MemoryError("no room")


@pytest.mark.parametrize("on_error", ["raise", "continue"])
def test_a_step_that_fails_leaves_the_model_as_it_was(on_error, monkeypatch, caplog):
    model = model_kinds.subclassed()[0]
    model.compile("adam", "mse", jit_compile=False)
    x, y = model_kinds.VECTORS, np.ones((40, 12), "float32")
    from_full = DenseConverter.from_full

    def second_fails(self, layer, *arguments, **options):
        if len(bilinear(model)) == 2:
            fails()
        return from_full(self, layer, *arguments, **options)

    monkeypatch.setattr(DenseConverter, "from_full", second_fails)
    fit(model, epochs=1, x=x, y=y)
    weights, types = model.get_weights(), [type(site.layer) for site in walk(model)]
    optimizer = [ops.convert_to_numpy(v) for v in model.optimizer.variables]
    # Fitted one by one, so that some are bilinear when one fails.
    callback = BilinearRewrite(0, 0.75, on_error=on_error)
    if on_error == "raise":
        message = r"step of BilinearRewrite at epoch 0 failed.*layer '.*dense.*no room"
        with pytest.raises(RuntimeError, match=message):
            fit(model, callback, x=x, y=y)
        for value, before in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(value, before)
        for variable, before in zip(model.optimizer.variables, optimizer, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(variable), before)
    else:
        history = fit(model, callback, x=x, y=y)
        assert "no room" in caplog.text
        assert len(history["loss"]) == 4
    assert bilinear(model) == []
    assert [type(site.layer) for site in walk(model)] == types
    assert type(model) is model_kinds.Subclassed
    fit(model, epochs=1, x=x, y=y)


def test_beside_other_callbacks(tmp_path):
    model = mlp()
    model.compile("adam", "mse")
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.keras", "loss", save_best_only=True
    )
    others = [
        checkpoint,
        keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.ReduceLROnPlateau("loss", patience=9),
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
    ]
    if BACKEND == "tensorflow":
        others.append(keras.callbacks.TensorBoard(tmp_path / "board", histogram_freq=1))
    fit(model, BilinearRewrite(2, 0.1), *others)
    best = keras.models.load_model(tmp_path / "best.keras")
    assert best.count_params() == model.count_params()
    np.testing.assert_allclose(predict(best), predict(model), rtol=1e-4, atol=1e-5)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert len(lines) == 5
    assert "parameters" in lines[0]
    if BACKEND == "tensorflow":
        assert board_scalars(tmp_path / "board" / "train") >= {
            "epoch_parameters",
            "rewrite_error/hidden_64",
        }


def board_scalars(folder):
    import tensorflow as tf

    return {
        value.tag
        for file in folder.iterdir()
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
    }


def test_the_student_of_a_distiller_is_rewritten():
    teacher, student = mlp(), mlp()
    distiller = keras.distillation.Distiller(
        teacher, student, keras.distillation.LogitsDistillation()
    )
    distiller.compile("adam", "mse")
    before = teacher.get_weights()
    history = fit(distiller, BilinearRewrite(1, 0.5), epochs=3)
    assert bilinear(student)
    assert bilinear(teacher) == []
    for now, value in zip(teacher.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, value)
    assert history["parameters"][-1] == student.count_params()


class Encoder(keras.Sequential):
    """A model that keeps a function as language models of KerasHub do."""

    codes_function = None

    def make_codes_function(self):
        if self.codes_function is None:
            self.codes_function = self.__call__
            if BACKEND == "tensorflow":
                import tensorflow as tf

                self.codes_function = tf.function(self.__call__)
        return self.codes_function

    def codes(self, x):
        return ops.convert_to_numpy(self.make_codes_function()(x))


def test_models_that_hold_a_rewritten_layer_trace_their_functions_again():
    """The encoder is in the model; the other models only share layers with it."""
    hidden = layers.Dense(64, "relu")
    encoder = Encoder([keras.Input((32,)), hidden, layers.Dense(48)])
    model = keras.Sequential([encoder, layers.Dense(8)])
    aside = keras.Sequential([keras.Input((32,)), hidden])
    around = keras.Sequential([keras.Input((32,)), model, layers.Dense(4)])
    model.compile("adam", "mse", run_eagerly=True)
    aside.compile(loss="mse", jit_compile=False)
    aside.evaluate(X[:32], predict(aside, X[:32]), verbose=0)
    for one in (encoder, aside, around):
        one.predict(X[:32], verbose=0)
    before = encoder.codes(X[:32])
    fit(model, BilinearRewrite(0, 0.3), epochs=1, x=X[:32], y=Y[:32])
    assert is_bilinear(hidden)
    for one in (encoder, aside, around):
        np.testing.assert_allclose(one.predict(X[:32], verbose=0), predict(one, X[:32]), atol=1e-5)
    assert aside.evaluate(X[:32], predict(aside, X[:32]), verbose=0) < 1e-9
    assert np.abs(encoder.codes(X[:32]) - before).max() > 0.1
    np.testing.assert_allclose(encoder.codes(X[:32]), predict(encoder, X[:32]), atol=1e-5)


class Mapped(keras.optimizers.SGD):
    """An optimizer that keeps its statistics in a way of its own."""

    def build(self, variables):
        super().build(variables)
        self.others = {v.path: self.add_variable_from_reference(v) for v in variables}


def test_other_models_on_the_same_trunk_train_on_or_are_named(caplog):
    trunk, x, y = layers.Dense(64, "relu"), X[:32], Y[:32]
    model, second, refused, apart = (
        keras.Sequential([keras.Input((32,)), first, layers.Dense(8)])
        for first in (trunk, trunk, trunk, layers.Dense(64))
    )
    model.compile("adam", "mse", run_eagerly=True)
    second.compile(keras.optimizers.Adam(1e-3), "mse", jit_compile=False)
    refused.compile(Mapped(), "mse", run_eagerly=True)
    apart.compile("sgd", "mse", jit_compile=False)
    for other in (second, refused, apart):
        fit(other, epochs=1, x=x, y=y)
    moments = [ops.convert_to_numpy(v) for v in second.optimizer._velocities]
    function = apart.train_function
    fit(model, BilinearRewrite(0, 0.5, layers=[trunk]), epochs=1, x=x, y=y)

    assert apart.train_function is function
    (message,) = caplog.messages
    assert f"The model {refused.name!r} holds layers of {model.name!r}" in message
    assert "compile it again. It is not known how the optimizer Mapped keeps" in message
    now = [ops.convert_to_numpy(v) for v in second.optimizer._velocities]
    # Those of the head stay, and the factors begin with what is known of the kernel.
    for value, before in zip(now[-2:], moments[-2:], strict=True):
        np.testing.assert_array_equal(value, before)
    assert all(value.any() for value in now)
    weights = [ops.convert_to_numpy(v) for v in second.trainable_variables]
    fit(second, epochs=1, x=x, y=y)
    assert int(ops.convert_to_numpy(second.optimizer.iterations)) == 2
    for variable, before in zip(second.trainable_variables, weights, strict=True):
        assert np.any(ops.convert_to_numpy(variable) != before), variable.path


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        part = slice(32 * index, 32 * index + 32)
        return X[part], Y[part]


def tf_dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(32)


def torch_loader():
    import torch

    data = torch.utils.data.TensorDataset(torch.as_tensor(X), torch.as_tensor(Y))
    return torch.utils.data.DataLoader(data, batch_size=32)


DATA = [Batches]
DATA += [tf_dataset] if BACKEND == "tensorflow" else []
DATA += [torch_loader] if BACKEND == "torch" else []


@pytest.mark.parametrize("make", DATA)
def test_calibration_data_are_training_data(make):
    def rewritten(x, y, calibration_data=None):
        keras.utils.set_random_seed(0)
        model = mlp()
        model.compile(keras.optimizers.SGD(0.0), "mse")
        fit(model, BilinearRewrite(1, 0.3, calibration_data=calibration_data), epochs=2, x=x, y=y)
        return predict(model)

    expected = rewritten(X, Y, calibration_data=X)
    others = np.linalg.norm(rewritten(X, Y, calibration_data=X[:64]) - expected)
    # Batches of another size round otherwise, and the fit of the factors adds to that.
    assert np.linalg.norm(rewritten(make(), None) - expected) < 1e-3 * others


def test_calibration_examples_are_spread_over_arrays():
    x = {"a": np.arange(5000), "b": [np.arange(5000) + 1]}
    batches = list(training_batches(x))
    a = np.concatenate([inputs["a"] for (inputs,) in batches])
    assert a.tolist() == list(range(0, 4096, 4))
    assert all((inputs["b"][0] == inputs["a"] + 1).all() for (inputs,) in batches)


def test_calibration_takes_batches_of_an_infinite_data_set():
    class Infinite(keras.utils.PyDataset):
        num_batches = None

        def __getitem__(self, index):
            return X[:32], Y[:32]

    batches = list(training_batches(Infinite()))
    assert sum(len(x) for x, _ in batches) == EXAMPLES


def test_optimizers_beside_the_compiled_one_are_refused():
    class Two(keras.Sequential):
        def compile(self, second, **arguments):
            super().compile(**arguments)
            self.second = second

    model = Two([keras.Input((32,)), *mlp().layers])
    first = keras.optimizers.Adam()
    model.compile(first, optimizer=first, loss="mse")
    fit(model, BilinearRewrite(1, 0.5), epochs=2)
    assert bilinear(model)
    model.compile(keras.optimizers.Adam(), optimizer="adam", loss="mse")
    with pytest.raises(ValueError, match=r"optimizers of its own .* Received: 'second'"):
        fit(model, BilinearRewrite(1, 0.2), epochs=2)


def test_data_that_are_read_once_need_calibration_data():
    model = mlp()
    model.compile("adam", "mse")

    def batches():
        while True:
            yield X[:32], Y[:32]

    with pytest.raises(ValueError, match=r"can be read only once.*give `calibration_data`"):
        fit(model, BilinearRewrite(1), x=batches(), y=None, steps_per_epoch=2)
    fit(
        model,
        BilinearRewrite(1, 0.5, calibration_data=X),
        x=batches(),
        y=None,
        steps_per_epoch=2,
    )
    assert bilinear(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either `at_epoch`.*or a `schedule`"),
        ({"at_epoch": 1, "schedule": {1: 0.5}}, "either `at_epoch`.*or a `schedule`"),
        ({"budget": 0.5, "schedule": {1: 0.5}}, "either `at_epoch`.*or a `schedule`"),
        ({"at_epoch": -1}, "integer, 0 or more. Received: -1"),
        ({"at_epoch": 1.5}, "integer, 0 or more. Received: 1.5"),
        ({"at_epoch": 1, "budget": 0}, "above 0 and at most 1. Received: 0 for epoch 1"),
        ({"schedule": [1, 2]}, "mapping from epochs to budgets"),
        ({"schedule": {}}, "mapping from epochs to budgets"),
        ({"schedule": {1: 0.2, 3: 0.4}}, "must get smaller"),
        ({"at_epoch": 1, "monitor": "loss"}, "belong together"),
        ({"at_epoch": 1, "max_drop": 0.1}, "belong together"),
        ({"at_epoch": 1, "monitor": "loss", "max_drop": -1}, "`max_drop` must be 0 or more"),
        ({"at_epoch": 0, "monitor": "loss", "max_drop": 1}, "Before epoch 0 there is no metric"),
        ({"at_epoch": 1, "mode": "best"}, "`mode` must be one of"),
        ({"at_epoch": 1, "on_drop": "cry"}, "`on_drop` must be one of"),
        ({"at_epoch": 1, "on_error": "cry"}, "`on_error` must be one of"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        BilinearRewrite(**options)


@pytest.mark.parametrize("folder", ["file", "file/below/it"])
def test_a_backup_folder_that_cannot_be_written_is_refused_at_once(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=rf"`backup_dir` must be .* Received: .*{folder}'"):
        BilinearRewrite(1, backup_dir=str(tmp_path / folder))
    BilinearRewrite(1, backup_dir=tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_mistakes_are_found_before_training():
    model, seen = mlp(), State()
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=r"No plan keeps to the limit.*Received: budget=0.001"):
        fit(model, BilinearRewrite(2, 0.001), seen)
    with pytest.raises(
        ValueError, match=r"`layers` must choose among the layers.*Received: 'nothing'"
    ):
        fit(model, BilinearRewrite(2, layers=["nothing"]), seen)
    assert not hasattr(seen, "now")
    wrong = BilinearRewrite(2, 0.5, monitor="val_accuracy", max_drop=0.1)
    with pytest.raises(ValueError, match=r"logs have no 'val_accuracy', but .*'val_loss'"):
        fit(model, wrong, validation_data=(X, Y), epochs=1)


@pytest.fixture
def next_keras(monkeypatch):
    """Lets Keras be a version that no test has seen, and the trial not have been made yet."""
    trial._try_once.cache_clear()
    monkeypatch.setattr(keras, "__version__", "3.99.0")
    yield
    trial._try_once.cache_clear()


def test_a_version_that_was_not_tested_is_tried(next_keras, caplog):
    seeds = random.getstate()
    BilinearRewrite(1)
    BilinearRewrite(1)
    (record,) = caplog.records
    assert "run with Keras 3.13 to 3.15. Found: Keras 3.99.0. A tiny" in record.message
    assert random.getstate() == seeds
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize(
    ("part", "broken", "message"),
    [
        ("fit_arguments", {}, "training data are known inside `fit` only"),
        ("move_optimizer", None, ""),
        pytest.param(
            "retrace", None, "did not train",
            marks=pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow traces"),
        ),
    ],
)  # fmt: skip
def test_a_version_that_does_not_allow_it_is_refused_at_once(
    part, broken, message, next_keras, monkeypatch
):
    monkeypatch.setattr(in_training, part, lambda *arguments: broken)
    message = rf"(?s)could not be changed.*3\.13 to 3\.15\. Found: Keras 3\.99\.0.*{message}"
    with pytest.raises(RuntimeError, match=message):
        BilinearRewrite(1)


def test_versions_between_those_of_the_tests_count_as_tested():
    known = ("3.13.0", "3.14.1", "3.15.9")
    assert all(map(training.is_tested, known))
    assert not any(map(training.is_tested, ("3.12.4", "3.16.0.dev1", "4.0")))


def test_an_optimizer_of_an_unknown_kind_is_refused():
    model = mlp()
    model.compile(Mapped(1e-3), "mse")
    with pytest.raises(RuntimeError, match="not known how the optimizer Mapped keeps"):
        fit(model, BilinearRewrite(1, 0.5))
    assert bilinear(model) == []
    fit(model, epochs=1)


SCRIPT = pathlib.Path(__file__).parents[1] / "train_with_backup.py"


def train(folder, *arguments):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, SCRIPT, folder, *arguments]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a training comes to that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == 0
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("moment", ["step", "batch_20"] if BACKEND == "tensorflow" else ["step"])
def test_a_killed_training_goes_on(moment, whole, tmp_path):
    assert train(tmp_path, f"--die={moment}") == -signal.SIGKILL
    if moment == "batch_20":  # as if it had been while the backup was written
        weights = tmp_path / "backup" / training.BACKUPS[0]
        weights.write_bytes(weights.read_bytes()[:1000])
    assert train(tmp_path) == 0
    killed = json.loads((tmp_path / "result.json").read_text())
    assert killed["sizes"] == whole["sizes"]
    np.testing.assert_allclose(killed["losses"], whole["losses"], rtol=1e-5)
    assert not (tmp_path / "backup").exists()


# What earlier versions wrote for a layer of 32 inputs and 64 outputs.
OLD_FACTORIZATION = {
    "input_dim": 32, "output_dim": 64, "input_factors": [4, 8], "output_factors": [8, 8],
    "rank": 1, "left_window": [], "right_window": [], "groups": 1, "gates": 0,
}  # fmt: skip
OLD_LAYER = {
    "path": "dense", "type": "Dense", "full_parameters": 2112,
    "factorizations": [OLD_FACTORIZATION], "rank": 2, "reason": "",
    "errors": [[[4, 8], [8, 8], 1, 0.75], [[4, 8], [8, 8], 2, 0.5]], "scale": 1, "input_scale": 1,
}  # fmt: skip
OLD_JOURNAL = {
    "plans": [{"other_parameters": 0, "layers": [OLD_LAYER]}],
    "steps": [{"epoch": 1, "plans": 1, "stopped": False}],
    "values": [[0, 0.25], [1, 0.125]],
}


def test_journals_of_earlier_versions_are_read(tmp_path):
    (tmp_path / "bilinear_rewrite.json").write_text(json.dumps(OLD_JOURNAL))
    with h5py.File(tmp_path / training.BACKUPS[0], "w"):
        pass
    history, values = Journal(tmp_path).read()
    assert values == {0: 0.25, 1: 0.125}
    assert (history.last_epoch, history.stopped) == (1, False)
    layer = history.plan["dense"]
    assert layer.factors == ((4, 8), (8, 8))
    assert layer.error == 0.5
    assert layer.parameters == 2 * (4 * 8 + 8 * 8) + 64
    assert [len(part.plans) for part in history.shortened()] == [1, 0]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras trains on one device there")
def test_several_devices(tmp_path):
    script = pathlib.Path(__file__).parents[1] / "train_distributed.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=300)


def test_weights_of_another_model_are_refused(tmp_path):
    other = keras.Sequential([keras.Input((32,)), layers.Dense(10), layers.Dense(8)])
    other.compile("adam", "mse")
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    fit(other, BilinearRewrite(1, 0.9, backup_dir=tmp_path), backup, epochs=2)
    assert (tmp_path / training.BACKUPS[0]).exists()
    model = mlp()
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=r"fit the model .* neither as it is nor as it was"):
        fit(model, BilinearRewrite(1, 0.9, backup_dir=tmp_path), backup)
