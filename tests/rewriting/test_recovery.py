import functools

import keras
import numpy as np
import pytest
from keras import layers, ops
from model_kinds import RNG, convolutional, subclassed, two_inputs

from keras_bilinear import recover, rewrite_model
from keras_bilinear.data import model_batches
from keras_bilinear.rewriting import answers, recovery
from keras_bilinear.rewriting.output_losses import output_losses

X = RNG.normal(size=(200, 24)).astype("float32")


def network(activation=None, units=6, **compiled):
    keras.utils.set_random_seed(1)
    hidden = layers.Dense(32, activation="relu", name="hidden")
    model = keras.Sequential([keras.Input((24,)), hidden, layers.Dense(units, activation)])
    if compiled:
        model.compile(**compiled)
    return model


def damaged(full):
    """A copy of a model with other weights, in which something can be recovered."""
    small = keras.models.clone_model(full)
    for weight, value in zip(small.weights, full.weights, strict=True):
        noise = np.random.default_rng(0).normal(size=value.shape) * 0.1
        weight.assign(keras.ops.convert_to_numpy(value) + noise)
    return small


def distance(small, full, data):
    pairs = zip(
        *(keras.tree.flatten(model.predict(data, verbose=0)) for model in (small, full)),
        strict=True,
    )
    return sum(np.mean((a - b) ** 2) for a, b in pairs)


@pytest.mark.parametrize("kind", [two_inputs, convolutional, subclassed])
def test_a_rewritten_model_comes_nearer_to_the_full_one(kind):
    full, data = kind()
    small = rewrite_model(full, rank=1)
    weights = full.get_weights()
    before = distance(small, full, data)
    assert recover(small, full, data, epochs=2, batch_size=3, verbose=0) is small
    assert distance(small, full, data) < before
    for value, kept in zip(full.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(value, kept)


def test_the_compiled_state_stays():
    full = network("softmax", optimizer="sgd", loss="kl_divergence", metrics=["accuracy"])
    small = damaged(full)
    small.compile("adam", "mse", metrics=["mae"])
    small.train_on_batch(X[:8], full.predict(X[:8], verbose=0))
    optimizer, state = small.optimizer, [np.array(v) for v in small.optimizer.variables]
    recover(small, full, X, epochs=1, verbose=0)
    assert small.optimizer is optimizer
    for variable, value in zip(optimizer.variables, state, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    assert small.loss == "mse"
    assert {"loss", "mae"} == {*small.evaluate(X, np.zeros((200, 6)), verbose=0, return_dict=True)}
    assert full.trainable


def test_a_training_that_goes_wrong_changes_nothing(caplog):
    full = network()
    small = damaged(full)
    weights = small.get_weights()
    recover(small, full, X, epochs=2, optimizer=keras.optimizers.SGD(1e30), verbose=0)
    for value, kept in zip(small.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(value, kept)
    assert [r.message for r in caplog.records if "not finite" in r.message]


def test_an_interrupted_training_keeps_the_best_epoch(monkeypatch):
    full = network()
    small = damaged(full)
    before = distance(small, full, X)
    original = recovery._Recovery._train_epoch

    def interrupted(self, epoch, *args):
        original(self, 0, *args)
        if epoch == 1:
            self._small.set_weights([np.full(w.shape, 9.0) for w in self._small.weights])
            raise KeyboardInterrupt

    monkeypatch.setattr(recovery._Recovery, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recover(small, full, X, epochs=3, verbose=0)
    assert distance(small, full, X) < before


def test_frozen_layers_stay():
    full = network()
    small = damaged(full)
    small.get_layer("hidden").trainable = False
    kept, trained = (layer.get_weights()[0] for layer in small.layers)
    recover(small, full, X, epochs=1, verbose=0)
    assert not small.get_layer("hidden").trainable
    np.testing.assert_array_equal(small.layers[0].get_weights()[0], kept)
    assert np.any(small.layers[1].get_weights()[0] != trained)
    small.trainable = False
    with pytest.raises(ValueError, match="all layers are frozen"):
        recover(small, full, X, verbose=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_normalization_learns_and_dropout_is_off(frozen):
    keras.utils.set_random_seed(0)
    norm, dropout = layers.BatchNormalization(), layers.Dropout(0.9)
    full = keras.Sequential([keras.Input((24,)), layers.Dense(16), norm, dropout, layers.Dense(4)])
    small = damaged(full)
    small.layers[1].moving_variance.assign(np.full(16, 5.0))
    small.layers[1].trainable = not frozen
    recover(small, full, X, epochs=8, optimizer=keras.optimizers.Adam(0.01), verbose=0)
    found = ops.convert_to_numpy(small.layers[1].moving_variance)
    assert small.layers[1].momentum == norm.momentum
    assert "call" not in vars(small.layers[1])
    if frozen:
        np.testing.assert_array_equal(found, 5.0)
    else:
        seen = ops.convert_to_numpy(small.layers[0](X)).var(0)
        np.testing.assert_allclose(found, seen, rtol=0.5)
    assert distance(small, full, X) < 0.01  # far away with dropout


CROSSENTROPY = functools.partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True)
BINARY = functools.partial(keras.losses.BinaryCrossentropy, from_logits=True)


@pytest.mark.parametrize(
    ("activation", "loss", "name"),
    [
        ("softmax", None, "divergence"),
        ("softmax", "mse", "divergence"),
        (None, CROSSENTROPY(), "divergence_of_logits"),
        (None, [CROSSENTROPY()], "divergence_of_logits"),
        (None, BINARY(), "binary_divergence_of_logits"),
        ("sigmoid", None, "binary_divergence"),
        ("sigmoid", "binary_crossentropy", "binary_divergence"),
        ("hard_sigmoid", "binary_crossentropy", "binary_divergence"),
        ("hard_sigmoid", None, "relative_squared_error"),
        (None, "mse", "relative_squared_error"),
        (None, None, "relative_squared_error"),
    ],
)
def test_the_loss_fits_the_output(activation, loss, name):
    model = network(activation, **({"loss": loss} if loss is not None else {}))
    (found,) = output_losses("auto", model, network(activation), model.predict(X, verbose=0))
    assert found.name == name
    other = damaged(model)
    a, b = (ops.convert_to_numpy(m(X)).astype("float64") for m in (model, other))
    if name.startswith("binary"):
        a, b = (1 / (1 + np.exp(-x)) if "logits" in name else x for x in (a, b))
        a, b = (np.stack([x, 1 - x]) + 1e-7 for x in (a, b))
        expected = np.sum(a * np.log(a / b), 0).mean()
    elif name.startswith("divergence"):
        a, b = (
            np.exp(x) / np.exp(x).sum(-1, keepdims=True) if "log" in name else x for x in (a, b)
        )
        expected = np.sum(a * np.log(a / b), -1).mean()
    else:
        expected = np.mean((a - b) ** 2) / a.var(0).mean()
    value = found(model(X), other(X))
    np.testing.assert_allclose(ops.convert_to_numpy(value), expected, rtol=1e-3, atol=1e-6)
    # Nothing is better than the outputs of the full model.
    assert abs(float(ops.convert_to_numpy(found(model(X), model(X))))) < 1e-6


def two_outputs():
    inputs = keras.Input((24,))
    inner = keras.Sequential([keras.Input((24,)), layers.Dense(3), layers.Activation("sigmoid")])
    outputs = {"scores": layers.Dense(5)(inputs), "marks": inner(inputs)}
    return keras.Model(inputs, outputs)


def test_each_output_has_its_loss():
    model = two_outputs()
    outputs = model.predict(X, verbose=0)
    names = [loss.name for loss in output_losses("auto", model, model, outputs)]
    assert names == ["binary_divergence", "relative_squared_error"]  # by the sorted names
    model.compile(loss={"scores": CROSSENTROPY(), "marks": "mse"})
    names = [loss.name for loss in output_losses("auto", model, model, outputs)]
    assert names == ["binary_divergence", "divergence_of_logits"]
    given = {"scores": "mae", "marks": lambda full, small: ops.square(full - small)}
    marks, scores = output_losses(given, model, model, outputs)
    assert scores.name == "mean_absolute_error"
    assert marks.name == "<lambda>"
    with pytest.raises(ValueError, match="each of the outputs 'marks', 'scores'"):
        output_losses({"score": "mse"}, model, model, outputs)
    with pytest.raises(ValueError, match="a loss that Keras knows"):
        output_losses("mses", model, model, outputs)


def test_a_loss_of_keras_distillation_is_taken():
    full = network()
    loss = keras.distillation.LogitsDistillation(temperature=2.0)
    found = output_losses(loss, full, full, full.predict(X, verbose=0))
    np.testing.assert_allclose(
        ops.convert_to_numpy(found[0](full(X), damaged(full)(X))),
        ops.convert_to_numpy(loss.compute_loss(full(X), damaged(full)(X))),
        rtol=1e-5,
    )
    small = damaged(full)
    before = loss.compute_loss(full(X), small(X))
    recover(small, full, X, epochs=2, loss=[loss], optimizer="adam", verbose=0)
    assert float(loss.compute_loss(full(X), small(X))) < float(before)


class Stream:
    """Batches that can be read again and again, and are not in memory."""

    def __init__(self, data, size=20):
        self.data, self.size, self.reads = data, size, 0

    def __iter__(self):
        self.reads += 1
        for start in range(0, len(self.data), self.size):
            yield self.data[start : start + self.size], None


def counted(model):
    """A model that counts the batches that it answers."""
    model.count = 0

    def predict(inputs, original=model.predict_on_batch):
        model.count += 1
        return original(inputs)

    model.predict_on_batch = predict
    return model


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("small_enough", [True, False])
def test_answers_are_kept_if_they_are_small(streamed, small_enough, monkeypatch):
    full = counted(network())
    small = damaged(full)
    before = distance(small, full, X)
    data = Stream(X) if streamed else X
    if not small_enough:
        monkeypatch.setattr(answers, "KEPT_BYTES", 1000)
    recover(small, full, data, epochs=2, verbose=0)
    assert distance(small, full, X) < before
    assert (full.count > 15) is not small_enough
    if streamed:
        assert (data.reads > 4) is not small_enough


def test_held_out_examples_are_not_trained_on(monkeypatch):
    full, numbers = (
        network(),
        np.arange(100, dtype="float32")[:, None] * np.ones((1, 24), "float32"),
    )
    for kept in (2**30, 0):
        monkeypatch.setattr(answers, "KEPT_BYTES", kept)
        for data in ([*Stream(numbers, 7)], Stream(numbers, 7)):
            examples = answers.read_examples(full, model_batches(data, full), 0.2, 8)
            held_out = {n for x, _ in examples.held_out() for n in x[:, 0]}
            seen = {n for _ in range(30) for x, _ in examples.epoch() for n in x[:, 0]}
            assert not held_out & seen
            assert len(held_out | seen) == 100 if kept or isinstance(data, list) else held_out
            assert sum(1 for _ in examples.epoch()) == examples.steps
            for x, (y,) in [*examples.epoch(), *examples.held_out()]:
                np.testing.assert_allclose(y, full.predict_on_batch(x), rtol=1e-4, atol=1e-4)


def test_batches_of_different_lengths():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((None, 5))
    full = keras.Model(inputs, layers.Dense(3)(layers.Dense(4, "tanh")(inputs)))
    small = damaged(full)
    data = [RNG.normal(size=(9, length, 5)).astype("float32") for length in (3, 4, 3)]
    before = distance(small, full, data[0])
    recover(small, full, data, epochs=4, batch_size=4, verbose=0)
    assert distance(small, full, data[0]) < before


def test_masked_positions_do_not_count():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8, mask_zero=True)(inputs)
    full = keras.Model(inputs, layers.Dense(3)(x))
    tokens = RNG.integers(1, 20, (8, 6)) * np.array([1, 1, 1, 0, 0, 0])
    (loss,) = output_losses("mse", full, full, full.predict(tokens, verbose=0))
    (auto,) = output_losses("auto", full, full, full.predict(tokens, verbose=0))
    outputs = full(tokens)
    wrong = ops.convert_to_numpy(outputs) + np.array([0, 0, 0, 1, 1, 1])[:, None]
    for found in (loss, auto):
        assert float(ops.convert_to_numpy(found(wrong, outputs))) < 1e-9
        assert float(ops.convert_to_numpy(found(wrong + 1, outputs))) > 0.1


def test_a_safe_rate_is_below_the_rise_of_the_losses():
    rates = recovery._RATES
    losses = np.where(rates < 1e-3, 1.0, 100.0)
    assert recovery._safe_rate(losses) == pytest.approx(1e-3 / 6, rel=0.5)
    assert recovery._safe_rate(losses * 0.01) == recovery._safe_rate(losses)
    # The losses of a ruined network fall before they rise.
    falling = np.where(rates < 1e-4, 1.0, np.where(rates < 3e-3, 0.01, 0.2))
    assert recovery._safe_rate(falling) == pytest.approx(3e-3 / 6, rel=0.5)
    assert recovery._safe_rate(np.ones(len(rates))) == pytest.approx(rates[-1] / 6)
    assert recovery._safe_rate(np.array([*np.ones(20), np.nan])) <= rates[20] / 6


@pytest.mark.parametrize("verbose", ["auto", 0, 1, 2])
def test_progress_is_shown_as_in_fit(verbose, capsys):
    full = network()
    recover(damaged(full), full, X, epochs=2, verbose=verbose)
    shown = capsys.readouterr().out
    if verbose == 0:
        assert shown == ""
        return
    for text in ("Learning rate", "Epoch 2/2", "val_loss: ", "Loss on held-out examples: "):
        assert text in shown
    assert ("━" in shown) is (verbose != 2)


def test_rewrite_model_recovers():
    full = network("softmax", loss="kl_divergence", optimizer="adam")
    # A fit to fewer examples is hard to improve.
    x = np.random.default_rng(1).normal(size=(1000, 24)).astype("float32")
    fitted = rewrite_model(full, rank=1, calibration_data=x)
    small = rewrite_model(full, rank=1, calibration_data=x, recover=2)
    assert distance(small, full, x) < distance(fitted, full, x)
    assert small.compiled
    assert [w.shape for w in small.weights] == [w.shape for w in fitted.weights]
    with pytest.raises(ValueError, match="`recover` needs calibration data"):
        rewrite_model(full, rank=1, recover=3)
    with pytest.raises(ValueError, match="`recover` must be a positive integer"):
        rewrite_model(full, rank=1, calibration_data=X, recover=-1)


def cut_off():
    return keras.Sequential([keras.Input((24,)), layers.Dense(3)])


def integers():
    inputs = keras.Input((24,))
    return keras.Model(inputs, ops.argmax(layers.Dense(3)(inputs), -1))


def infinite():
    model = network()
    model.layers[-1].bias.assign(np.full(6, np.inf))
    return model


def stateful():
    gru = layers.GRU(6, stateful=True)
    return keras.Sequential([keras.Input((2, 24), batch_size=4), gru])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "`epochs` must be a positive integer"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer"),
        ({"validation_split": 0}, "`validation_split` must be above 0 and below 1"),
        ({"validation_split": "a"}, "`validation_split` must be above 0 and below 1"),
        ({"verbose": 3}, "`verbose` must be one of"),
        ({"data": X[:1]}, "at least two examples"),
        ({"data": X[:, :5]}, "`data` must fit the input"),
        ({"data": None}, "`data` must be inputs"),
        ({"full": cut_off}, r"Received: outputs of shapes \[\(6,\)\] instead of \[\(3,\)\]"),
        ({"full": integers, "small": integers}, "must be floats to be learned"),
        ({"full": infinite}, "must be finite for all `data`"),
        ({"full": stateful}, "stateful=True"),
        ({"small": lambda: layers.Dense(3)}, "`small` must be a built Keras model"),
        ({"small": lambda: keras.Sequential([layers.Dense(3)])}, "must be a built Keras model"),
        ({"loss": 3}, "a loss that Keras knows"),
    ],
)
def test_bad_arguments_are_refused_before_the_training(arguments, message):
    models = {name: arguments.pop(name, network)() for name in ("small", "full")}
    weights = keras.tree.map_structure(np.array, models["small"].get_weights())
    data = arguments.pop("data", X)
    with pytest.raises(ValueError, match=message):
        recover(**models, data=data, **{"verbose": 0, **arguments})
    for value, kept in zip(models["small"].get_weights(), weights, strict=True):
        np.testing.assert_array_equal(value, kept)


def test_a_model_does_not_recover_from_itself():
    model = network()
    with pytest.raises(ValueError, match="two models"):
        recover(model, model, X)


def test_few_held_out_examples_are_reported(caplog):
    full = network()
    recover(damaged(full), full, X, epochs=1, validation_split=0.5, verbose=0)
    assert not caplog.records
    recover(damaged(full), full, X[:198], epochs=1, validation_split=0.5, verbose=0)
    (record,) = caplog.records
    assert "holds out 99 examples only" in record.message
