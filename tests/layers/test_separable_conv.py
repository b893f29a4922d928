import keras
import numpy as np
import oracle
import pytest
from backend_gradient import BACKEND, evaluate, layer_gradients
from keras import layers, ops

from keras_bilinear import (
    BilinearRewrite,
    BilinearSeparableConv1D,
    BilinearSeparableConv2D,
    expand_model,
    export_litert,
    exporting,
    plan_rewrite,
    rewrite_model,
)
from keras_bilinear.layers.converter import converter_of
from keras_bilinear.reports.summary import count_macs

LAYERS = {1: BilinearSeparableConv1D, 2: BilinearSeparableConv2D}
SIZES = (7, 8)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def make(dimensions, channels, *arguments, **options):
    """A layer built for inputs of any size."""
    layer = LAYERS[dimensions](channels[1], *arguments, bias_initializer="normal", **options)
    shape = [channels[0] if i is None else None for i in [*range(dimensions), None]]
    layer.build((None, *(shape if layer.data_format == "channels_last" else shape[::-1])))
    return layer


def stock_layer(layer):
    """The stock layer with the kernel that NumPy makes of the layer's factors."""
    config = layer.get_config()
    for name in layer.own_arguments:
        del config[name]
    stock = layer.full_class.from_config(config)
    kernel = oracle.full_kernel(layer)
    stock.build(converter_of(layer).input_shape(layer))
    depthwise, *bias = layer.get_weights()[2:]
    stock.set_weights([depthwise, kernel.reshape(stock.pointwise_kernel.shape), *bias])
    return stock


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = ops.convert_to_numpy(actual), ops.convert_to_numpy(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=10 * tolerance, atol=tolerance)


OPTIONS = {
    "plain": {"kernel_size": 3},
    "strides": {"kernel_size": 3, "strides": 2},
    "dilation": {"kernel_size": 2, "dilation_rate": 2},
    "multiplier": {"kernel_size": (2, 3), "depth_multiplier": 3},
    "pointwise": {"kernel_size": 1, "activation": "tanh"},
}


@pytest.mark.parametrize("implementation", ["factorized", "materialized"])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dimensions", LAYERS)
def test_equals_the_stock_layer_with_the_expanded_kernel(dimensions, name, padding, implementation):
    options = {
        key: value[:dimensions] if isinstance(value, tuple) else value
        for key, value in OPTIONS[name].items()
    }
    layer = make(
        dimensions, (7, 10), **options, padding=padding, rank=2, implementation=implementation
    )
    x = draw(2, *SIZES[:dimensions], 7)
    expected = evaluate(stock_layer(layer), x)
    assert layer.compute_output_shape(x.shape) == expected.shape
    assert_close(evaluate(layer, x), expected)
    with exporting():
        assert_close(evaluate(layer, x), expected)


@pytest.mark.parametrize("dimensions", LAYERS)
def test_channels_first(dimensions):
    """Not every backend can run the stock layer with the channels first."""
    first, last = (
        make(dimensions, (7, 10), 3, rank=2, data_format=format)
        for format in ("channels_first", "channels_last")
    )
    last.set_weights(first.get_weights())
    x = draw(2, *SIZES[:dimensions], 7)
    to_first = (0, dimensions + 1, *range(1, dimensions + 1))
    try:
        actual = evaluate(first, np.transpose(x, to_first))
    except Exception:
        pytest.skip("this backend has no depthwise convolution with the channels first")
    assert actual.shape == first.compute_output_shape((2, 7, *x.shape[1:-1]))
    assert_close(actual, np.transpose(evaluate(last, x), to_first))


def test_gradients():
    """Those of the stock layer's kernels by the chain rule, divided by the gain."""
    layer = make(2, (7, 10), 3, rank=2, activation="tanh", implementation="factorized")
    stock, x = stock_layer(layer), draw(2, 5, 6, 7)
    weights = draw(*layer.compute_output_shape(x.shape), seed=1)
    depthwise, kernel, bias, inputs = layer_gradients(stock, x, weights)
    kernel = oracle.pad_like(kernel.reshape(7, 10), layer.factorization)
    left, right = oracle.factor_gradients(kernel, *oracle.factors(layer))
    actual = layer_gradients(layer, x, weights, training=True)
    for gradient, expected in zip(actual, (left, right, depthwise, bias, inputs), strict=True):
        assert_close(gradient, expected, 1e-4)


@pytest.mark.parametrize("dimensions", LAYERS)
def test_from_full_is_exact_at_the_sufficient_rank(dimensions):
    full = LAYERS[dimensions].full_class(10, 3, depth_multiplier=2, bias_initializer="normal")
    full.build((None, *(None,) * dimensions, 7))
    convert = LAYERS[dimensions].from_full
    layer = convert(full, rank=convert(full).factorization.sufficient_rank)
    assert_close(layer.pointwise_kernel, full.pointwise_kernel, 3e-6)
    x = draw(2, *SIZES[:dimensions], 7)
    assert_close(layer(x), full(x))
    assert_close(layer.expand()(x), full(x))


def test_from_full_refuses_broken_depthwise_kernels():
    full = layers.SeparableConv2D(8, 3)
    full.build((None, 8, 8, 6))
    full.depthwise_kernel.assign(np.full((3, 3, 6, 1), np.nan))
    with pytest.raises(ValueError, match=r"takes finite weights.* in `depthwise_kernel`"):
        BilinearSeparableConv2D.from_full(full)


def test_calibration_lowers_the_error():
    full = layers.SeparableConv2D(32, 3, depth_multiplier=2)
    x = draw(16, 8, 8, 4) @ draw(4, 24, seed=1) + 0.1 * draw(16, 8, 8, 24, seed=2)
    expected = ops.convert_to_numpy(full(x[8:]))
    errors = [
        np.linalg.norm(expected - ops.convert_to_numpy(layer(x[8:])))
        for layer in (
            BilinearSeparableConv2D.from_full(full, rank=4, calibration_data=data)
            for data in (x[:8], None)
        )
    ]
    assert errors[0] < 0.8 * errors[1]
    with pytest.raises(ValueError, match=r"of width 24 on axis -1. Received: an array of shape"):
        BilinearSeparableConv2D.from_full(full, calibration_data=x[..., :5])


def test_macs():
    layer = BilinearSeparableConv2D(32, 3, 2, "same", implementation="factorized")
    model = keras.Sequential([keras.Input((8, 8, 16)), layer])
    assert count_macs(model) == 16 * (9 * 16 + layer.factorization.macs)
    assert count_macs(expand_model(model)) == 16 * (9 * 16 + 16 * 32)


def xception():
    """A network like Xception, small."""
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(16, 3, 2, padding="same", activation="relu", name="entry")(inputs)
    for index, width in enumerate((32, 64)):
        x = layers.SeparableConv2D(
            width, 3, padding="same", use_bias=False, name=f"separable_{index}"
        )(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    return keras.Model(inputs, layers.Dense(5, name="classes")(layers.GlobalMaxPooling2D()(x)))


@pytest.mark.parametrize("data", [None, draw(32, 12, 12, 3)], ids=["kernels", "data"])
def test_rewrites_an_xception(data, tmp_path):
    model, x = xception(), draw(4, 12, 12, 3, seed=1)
    plan = plan_rewrite(model, budget=0.6, calibration_data=data)
    assert "depthwise" in plan["depthwise"].reason
    assert plan["separable_1"].rank is not None
    small = rewrite_model(model, plan, calibration_data=data)
    assert type(small.get_layer("separable_1")) is BilinearSeparableConv2D
    assert small.count_params() == plan.parameters <= 0.6 * model.count_params()
    small.save(tmp_path / "small.keras")
    outputs = small.predict(x, verbose=0)
    loaded = keras.models.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), outputs)
    full = expand_model(small)
    assert type(full.get_layer("separable_1")) is layers.SeparableConv2D
    assert_close(full.predict(x, verbose=0), outputs)


def test_leaves_layers_with_a_constraint_of_the_kernel_alone():
    layer = layers.SeparableConv2D(64, 3, pointwise_constraint="non_neg", name="layer")
    plan = plan_rewrite(keras.Sequential([keras.Input((8, 8, 32)), layer]), budget=1.0)
    assert "constraint" in plan["layer"].reason


def test_rewrites_while_it_is_trained():
    model = xception()
    model.compile("adam", "mse", run_eagerly=True)
    x, y = draw(16, 12, 12, 3), draw(16, 5, seed=1)
    callback = BilinearRewrite(at_epoch=1, budget=0.8, layers=["separable_1"])
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
    assert type(model.get_layer("separable_1")) is BilinearSeparableConv2D
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends export by another process")
@pytest.mark.parametrize("dimensions", LAYERS)
def test_is_exported_as_its_factors(dimensions, tmp_path):
    pytest.importorskip("ai_edge_litert")
    layer = LAYERS[dimensions](128, 3, padding="same", rank=2, implementation="materialized")
    model = keras.Sequential([keras.Input((*SIZES[:dimensions], 64)), layer])
    report = export_litert(model, tmp_path / "model.tflite")
    assert report.difference < 1e-5
    assert 4 * model.count_params() < report.bytes < 4 * model.count_params() + 6000
    assert "FULLY_CONNECTED" in report.ops


def outcome(function):
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


REFUSED = [
    {"filters": 0},
    {"kernel_size": 0},
    {"kernel_size": (3, 3, 3, 3)},
    {"strides": 0},
    {"padding": "causal"},
    {"data_format": "first"},
    {"depth_multiplier": 0},
    {"activation": "swoosh"},
    {"pointwise_initializer": "sometimes"},
    {"unheard": 1},
]


@pytest.mark.parametrize("arguments", REFUSED, ids=str)
def test_refuses_what_the_stock_layer_refuses(arguments):
    for layer_class in LAYERS.values():
        bilinear, stock = (
            outcome(lambda one=one: one(**{"filters": 8, "kernel_size": 3, **arguments}).name)
            for one in (layer_class, layer_class.full_class)
        )
        assert bilinear[0] is stock[0]
        names = bilinear[1].replace(layer_class.__name__, layer_class.full_class.__name__)
        assert names.split("(of type")[0][:40] == stock[1].split("(of type")[0][:40]


def test_refuses():
    with pytest.raises(ValueError, match=r"`depth_multiplier` must be a positive integer. Rec"):
        BilinearSeparableConv2D(8, 3, depth_multiplier=1.5)
    with pytest.raises(ValueError, match="`output_factors` must be at least 8"):
        BilinearSeparableConv2D(8, 3, output_factors=(1, 3))
    layer = BilinearSeparableConv2D(8, 3, depth_multiplier=2, input_factors=(2, 3))
    with pytest.raises(ValueError, match="`input_factors` must be at least 12"):
        layer.build((None, 8, 8, 6))
    assert layer.weights == []
    with pytest.raises(ValueError, match=r"must be known. Received: input_shape="):
        layer.build((None, 8, 8, None))
