import keras
import numpy as np
import pytest
from keras import layers

from keras_bilinear import BilinearRewrite, plan_rewrite, rewrite_model

X = np.random.default_rng(0).random((300, 6, 6, 3)).astype("float32")


def network(kind):
    """A network that was trained on numbers from 0 to 1."""
    keras.utils.set_random_seed(0)
    first = layers.Normalization() if kind == "Normalization" else layers.Identity()
    head = [layers.Flatten(), layers.Dense(8, name="head")]
    model = keras.Sequential([keras.Input((6, 6, 3)), first, layers.Conv2D(16, 3), *head])
    if kind == "BatchNormalization":
        conv, norm = layers.Conv2D(16, 3, use_bias=False), layers.BatchNormalization(name="norm")
        model = keras.Sequential([keras.Input((6, 6, 3)), conv, norm, layers.ReLU(), *head])
        seen = keras.ops.convert_to_numpy(conv(X))
        norm.moving_mean.assign(seen.mean((0, 1, 2)))
        norm.moving_variance.assign(seen.var((0, 1, 2)))
    elif kind == "Normalization":
        first.adapt(X)
    return model


@pytest.mark.parametrize("kind", ["BatchNormalization", "Normalization"])
def test_inputs_of_another_scale_are_reported(kind, caplog):
    model = network(kind)
    plan = plan_rewrite(model, rank=1, calibration_data=X)
    rewrite_model(model, plan, X[:280])
    assert not caplog.records
    plan_rewrite(model, rank=1, calibration_data=255 * X)
    (record,) = caplog.records
    assert f"trained on, in {16 if kind[0] == 'B' else 3} of" in record.message
    assert "Are they scaled like the training data?" in record.message
    caplog.clear()
    rewrite_model(model, plan, [(255 * X, None)])
    assert len(caplog.records) == 1
    assert plan_rewrite(network("none"), rank=1, calibration_data=255 * X)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("kind", "scale"), [("Normalization", 1), ("BatchNormalization", 255)])
def test_the_callback_compares_calibration_data_with_training_data(kind, scale, caplog):
    y = np.zeros((300, 8), "float32")

    def reported(x, data):
        caplog.clear()
        model = network(kind)
        model.compile("sgd", "mse", run_eagerly=True)
        callback = BilinearRewrite(0, 0.9, calibration_data=data)
        model.fit(x, y, batch_size=300, verbose=0, callbacks=[callback])
        return [record.message for record in caplog.records if "Are they" in record.message]

    # `BatchNormalization` was trained on other inputs than those of this training.
    assert not reported(scale * X, scale * X[:280])
    if kind == "Normalization":
        (message,) = reported(X, 255 * X)
        assert "in 3 of 3 channels" in message


@pytest.mark.parametrize("fresh", [layers.BatchNormalization, layers.Normalization])
def test_layers_that_have_not_been_trained_know_nothing(fresh, caplog):
    model = keras.Sequential([keras.Input((64,)), fresh(), layers.Dense(64)])
    plan_rewrite(model, rank=1, calibration_data=np.random.default_rng(0).random((99, 64)) * 255)
    assert not caplog.records


def test_few_examples_are_reported_once(caplog):
    model = network("none")
    plan = plan_rewrite(model, rank=1, calibration_data=X[:5])
    (record,) = caplog.records
    assert (
        "5 calibration examples are few for 1 of the 2 layers: the layer 'head'" in record.message
    )
    assert "sees 5 rows for the 256 inputs" in record.message
    assert "at least 256 examples" in record.message
    for arguments in ({"plan": plan}, {"rank": 1}):
        caplog.clear()
        rewrite_model(model, calibration_data=X[:5], **arguments)
        assert len(caplog.records) == 1
    caplog.clear()
    plan_rewrite(model, rank=1, calibration_data=X)
    assert not caplog.records


def end(kind):
    """The last layers of a network without normalization, and its loss."""
    logits = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    steps = [layers.Reshape((16, 6)), layers.LSTM(16, name="last")]
    return {
        "tanh": ([layers.Dense(16, activation="tanh", name="last")], None),
        "sigmoid": ([layers.Dense(1, activation="sigmoid", name="last")], None),
        "softmax": ([layers.Dense(16, activation="softmax", name="last")], None),
        "softmax layer": ([layers.Dense(16), layers.Softmax(name="last")], None),
        "logits": ([layers.Dense(16, name="last")], logits),
        "LSTM": (steps, None),
        "SimpleRNN": ([steps[0], layers.SimpleRNN(16, name="last")], None),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["tanh", "sigmoid", "softmax", "softmax layer", "logits", "LSTM", "SimpleRNN"]
)
def test_saturated_layers_are_reported_once(kind, caplog):
    keras.utils.set_random_seed(0)
    last, loss = end(kind)
    first = layers.Dense(96, activation="relu", name="first")
    model = keras.Sequential([keras.Input((6, 6, 3)), layers.Flatten(), first, *last])
    model.compile(loss=loss)
    weights = model.get_weights()
    model.set_weights([weights[0], weights[1], 3 * weights[2], *weights[3:]])
    plan_rewrite(model, rank=1, calibration_data=X)
    assert not caplog.records
    if kind in ("LSTM", "SimpleRNN") and keras.config.backend() == "jax":
        return  # the loop is traced, so nothing is known of its values
    plan_rewrite(model, rank=1, calibration_data=[(255 * X, None)])
    (record,) = caplog.records
    assert "saturate the layer 'last'" in record.message
    assert "Are they scaled like the training data?" in record.message
    activations = getattr(last[-1], "activation", None), first.activation
    assert not any(hasattr(activation, "__wrapped__") for activation in activations)


def test_dead_layers_are_reported(caplog):
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(64, activation="relu", name="dead"), layers.ReLU(), layers.Dense(64)]
    model = keras.Sequential([keras.Input((6, 6, 3)), layers.Flatten(), *hidden])
    plan_rewrite(model, rank=1, calibration_data=X)
    assert not caplog.records
    hidden[0].bias.assign(np.full(64, -1e3))
    plan_rewrite(model, rank=1, calibration_data=X)
    (record,) = caplog.records
    assert "leave the layer 'dead' dead: its relu is zero for 100.0%" in record.message
    assert hidden[0].activation is keras.activations.relu


def test_logits_that_no_loss_takes_may_be_large(caplog):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6, 6, 3)), layers.Flatten(), layers.Dense(16)])
    model.compile(loss="mse")
    plan_rewrite(model, rank=1, calibration_data=1e4 * X)
    assert not caplog.records
