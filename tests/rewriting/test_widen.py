import keras
import model_kinds
import numpy as np
import pytest
from keras import layers, ops

from keras_bilinear import RewritePlan, Rewriter, expand_model, plan_rewrite, rewrite_model

RNG = np.random.default_rng(0)
VECTORS, IMAGES, TOKENS = model_kinds.VECTORS, model_kinds.IMAGES, model_kinds.TOKENS


def dense():
    return (
        keras.Sequential(
            [
                keras.Input((24,)),
                layers.Dense(32, activation="relu", name="a"),
                layers.Dropout(0.5),
                layers.Dense(30, name="b"),
                layers.LayerNormalization(name="norm"),
                layers.LeakyReLU(),
                layers.Dense(12, activation="softmax", name="c"),
            ]
        ),
        VECTORS,
        ("a", "b"),
    )


def convolutional():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(16, 3, padding="same", name="a")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(32, 3, strides=2, activation="tanh", name="b")(x)
    x = layers.Flatten()(layers.MaxPooling2D(2, strides=1)(x))
    x = layers.Dense(48, activation="relu", name="c")(x)
    return keras.Model(inputs, layers.Dense(10, name="d")(x)), IMAGES, ("a", "b", "c")


def recurrent():
    return (
        keras.Sequential(
            [
                keras.Input((4,), dtype="int32"),
                layers.Embedding(50, 16, mask_zero=True, name="a"),
                layers.GRU(32, return_sequences=True, name="b"),
                layers.SimpleRNN(32, return_sequences=True, name="c"),
                layers.LSTM(64, name="d"),
                layers.Dense(60, activation="relu", name="e"),
                layers.Dense(9, name="f"),
            ]
        ),
        TOKENS,
        ("a", "b", "c", "d", "e"),
    )


def trained(make):
    keras.utils.set_random_seed(0)
    model, x, hidden = make()
    for variable in model.variables:
        if variable.ndim == 1 and "seed" not in variable.path:
            values = RNG.uniform(0.5, 1.5, variable.shape)
            variable.assign(values.astype(variable.dtype))
    return model, x, hidden


def narrow(plan):
    plan = RewritePlan.from_json(plan.to_json())
    for layer in plan.values():
        layer.scale = layer.input_scale = 1
    return plan


def outputs(model, x):
    return ops.convert_to_numpy(model(x, training=False))


@pytest.mark.parametrize(
    ("make", "scale"),
    [
        (dense, 2),
        (dense, 3),
        (convolutional, 2),
        pytest.param(
            recurrent,
            2,
            marks=pytest.mark.skipif(
                keras.config.backend() == "jax", reason="JAX compiles for a minute"
            ),
        ),
    ],
)
def test_hidden_layers_are_widened_and_the_outputs_stay(make, scale, tmp_path):
    model, x, hidden = trained(make)
    plan = plan_rewrite(model, rank=1, scale=scale)
    if scale == 3:  # where that still saves something
        hidden = [name for name in hidden if plan[name].scale == 3]
    assert len(hidden) > 1
    for name, layer in plan.items():
        assert layer.scale == (scale if name in hidden or name == "norm" else 1)
    expected = outputs(rewrite_model(model, narrow(plan)), x)
    wide = rewrite_model(model, plan)
    assert wide.count_params() == plan.parameters
    np.testing.assert_allclose(outputs(wide, x), expected, rtol=1e-4, atol=1e-5)
    for name in hidden:
        shapes = [one.get_layer(name).output.shape[-1] for one in (wide, model)]
        assert shapes[0] == scale**2 * shapes[1]
    assert wide.name == model.name

    wide.save(tmp_path / "wide.keras")
    loaded = keras.models.load_model(tmp_path / "wide.keras")
    np.testing.assert_allclose(outputs(loaded, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs(expand_model(wide), x), expected, rtol=1e-4, atol=1e-5)


def test_copies_go_different_ways_in_training():
    model, x, _ = trained(dense)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    wide = rewrite_model(model, rank=1, scale=2)
    assert wide.compiled

    def copies():
        units = ops.convert_to_numpy(wide.get_layer("a")(x))
        return units.reshape(len(x), 4, 2, 8, 2)

    first = copies()
    np.testing.assert_array_equal(first, np.broadcast_to(first[:, :, :1, :, :1], first.shape))
    wide.fit(x, RNG.normal(size=(40, 12)), epochs=3, verbose=0)
    after = copies()
    assert np.abs(after[:, :, 0] - after[:, :, 1]).max() > 1e-4
    assert np.abs(after[..., 0] - after[..., 1]).max() > 1e-4


def test_calibration_fits_before_it_widens():
    model, x, _ = trained(dense)
    plan = plan_rewrite(model, rank=2, scale=2, calibration_data=x)
    wide = rewrite_model(model, plan, calibration_data=x)
    fitted = rewrite_model(model, narrow(plan), calibration_data=x)
    np.testing.assert_allclose(outputs(wide, x), outputs(fitted, x), rtol=1e-4, atol=1e-5)


def test_a_budget_holds_for_the_wide_model():
    model, _, hidden = trained(dense)
    plan = plan_rewrite(model, budget=0.7, scale=2)
    assert [plan[name].scale for name in hidden] == [2, 2]
    wide = rewrite_model(model, plan)
    assert wide.count_params() == plan.parameters <= 0.7 * model.count_params()
    assert "scale" in str(plan)


def scales(model, **options):
    plan = plan_rewrite(model, rank=1, scale=2, **options)
    wide = rewrite_model(model, plan)
    expected = outputs(rewrite_model(model, narrow(plan)), VECTORS)
    np.testing.assert_allclose(outputs(wide, VECTORS), expected, rtol=1e-4, atol=1e-5)
    return {name: layer.scale for name, layer in plan.items()}


def test_layers_that_others_see_keep_their_width():
    inputs = keras.Input((24,))
    a = layers.Dense(24, name="a")(inputs)
    b = layers.Dense(24, name="b")(layers.add([inputs, a]))
    c = layers.Dense(24, name="c")(layers.Softmax()(b))
    d = layers.Dense(24, name="d")(c)
    shared = layers.Dense(24, name="e")
    e = shared(layers.Dense(24, name="f")(d))
    model = keras.Model(inputs, [shared(e), c])
    plan = plan_rewrite(model, rank=1, scale=2)
    wide = rewrite_model(model, plan)
    assert {name for name, layer in plan.items() if layer.scale > 1} == {"d"}
    a, b = (one(VECTORS) for one in (wide, rewrite_model(model, narrow(plan))))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(*map(ops.convert_to_numpy, (x, y)), rtol=1e-4, atol=1e-5)


def test_layers_before_one_that_stays_full_keep_their_width():
    model, *_ = trained(dense)
    assert scales(model, layers=["a", "c"]) == dict.fromkeys(("a", "b", "norm", "c"), 1)


def test_widths_without_factors_stay():
    sizes = {"a": 31, "b": 32, "c": 40}
    hidden = (layers.Dense(size, name=name) for name, size in sizes.items())
    assert scales(keras.Sequential([keras.Input((24,)), *hidden])) == {"a": 1, "b": 2, "c": 1}


def test_activations_that_see_all_units_stay():
    def normalize(x):
        return x / ops.sum(ops.abs(x), axis=-1, keepdims=True)

    keras.saving.register_keras_serializable("tests")(normalize)
    activations = {"a": normalize, "b": "gelu", "c": "softmax", "d": "relu"}
    hidden = (layers.Dense(32, activation=one, name=name) for name, one in activations.items())
    model = keras.Sequential([keras.Input((24,)), *hidden])
    assert scales(model) == {"a": 1, "b": 2, "c": 1, "d": 1}


@pytest.mark.skipif(
    keras.config.backend() == "tensorflow", reason="TensorFlow convolves so on GPUs only"
)
def test_channels_first_stay():
    options = {"padding": "same", "data_format": "channels_first"}
    model = keras.Sequential([keras.Input((16, 8, 8)), layers.Conv2D(16, 3, **options, name="a")])
    model.add(layers.Dense(32))
    plan = plan_rewrite(model, rank=1, scale=2)
    assert plan["a"].scale == 1


def test_mistakes_are_refused():
    model, *_ = trained(dense)
    with pytest.raises(ValueError, match="`scale` must be a positive integer"):
        plan_rewrite(model, scale=1.5)
    with pytest.raises(ValueError, match="exclude each other"):
        rewrite_model(model, plan_rewrite(model, rank=1), scale=2)
    subclassed, _ = model_kinds.subclassed()
    with pytest.raises(ValueError, match="must be a built Sequential or a Functional one"):
        plan_rewrite(subclassed, scale=2)
    plan = plan_rewrite(model, rank=1, scale=2)
    with pytest.raises(ValueError, match="use `rewrite_model`"):
        Rewriter(plan)
    plan["b"].skip()
    with pytest.raises(
        ValueError, match="'b' or a layer before it has a scale, so 'b' needs a rank"
    ):
        rewrite_model(model, plan)


def test_layers_whose_initializers_are_matrices_become_wider(tmp_path):
    matrix = keras.initializers.Constant(RNG.normal(size=(24, 32)))
    vector = keras.initializers.Constant(RNG.normal(size=32))
    model = keras.Sequential(
        [
            keras.Input((24,)),
            layers.Dense(32, kernel_initializer=matrix, bias_initializer=vector),
            layers.LayerNormalization(gamma_initializer=vector),
            layers.Dense(12),
        ]
    )
    expected = ops.convert_to_numpy(rewrite_model(model, rank=2)(VECTORS))
    wide = rewrite_model(model, rank=2, scale=2)
    wide.save(tmp_path / "wide.keras")
    for other in (wide, keras.models.load_model(tmp_path / "wide.keras")):
        np.testing.assert_allclose(ops.convert_to_numpy(other(VECTORS)), expected, atol=1e-4)
