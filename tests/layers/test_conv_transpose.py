import keras
import numpy as np
import oracle
import pytest
from backend_gradient import BACKEND, evaluate, largest_tensor, layer_gradients, weighted_output
from keras import layers, ops

from keras_bilinear import (
    BilinearConv1DTranspose,
    BilinearConv2DTranspose,
    BilinearConv3DTranspose,
    BilinearRewrite,
    expand_model,
    export_litert,
    exporting,
    plan_rewrite,
    rewrite_model,
)
from keras_bilinear.kronecker.factorization import FACTORIZED, Order
from keras_bilinear.layers.converter import converter_of

LAYERS = {1: BilinearConv1DTranspose, 2: BilinearConv2DTranspose, 3: BilinearConv3DTranspose}
WAYS = [(order, pattern) for pattern in ("channel", "spatial") for order in FACTORIZED]
SIZES = (4, 3, 5)


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
    kernel = np.swapaxes(oracle.full_kernel(layer), -1, -2)
    stock.build(converter_of(layer).input_shape(layer))
    stock.set_weights([kernel, *layer.get_weights()[2:]])
    return stock


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = ops.convert_to_numpy(actual), ops.convert_to_numpy(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=10 * tolerance, atol=tolerance)


OPTIONS = {
    "plain": {"kernel_size": 3},
    "strides": {"kernel_size": 3, "strides": 2},
    "as wide as strides": {"kernel_size": 2, "strides": 2},
    "wider strides": {"kernel_size": 2, "strides": 3},
    "dilation": {"kernel_size": 2, "dilation_rate": 2},
    "mixed": {"kernel_size": (2, 3, 1), "strides": (3, 2, 1)},
    "output padding": {"kernel_size": 3, "strides": 2, "output_padding": 1},
    "no output padding": {"kernel_size": (3, 1, 3), "strides": 3, "output_padding": 0},
    "pointwise": {"kernel_size": 1},
    "pointwise strides": {"kernel_size": 1, "strides": 2},
}


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dimensions", LAYERS)
def test_equals_the_stock_layer_with_the_expanded_kernel(dimensions, name, padding):
    options = {
        key: value if isinstance(value, int) else value[:dimensions]
        for key, value in OPTIONS[name].items()
    }
    x = draw(2, *SIZES[:dimensions], 7)
    # JAX compiles each of them.
    for order, pattern in WAYS if BACKEND != "jax" else WAYS[1:3]:
        layer = make(dimensions, (7, 10), **options, padding=padding, rank=2, pattern=pattern)
        try:
            expected = stock_layer(layer)(x)
        except Exception:  # what the backend cannot do the stock layer need not be asked for
            pytest.skip("the stock layer cannot do that on this backend")
        layer._kernel._order = layer._kernel._exported_order = order
        assert layer.compute_output_shape(x.shape) == expected.shape
        assert_close(layer(x), expected)
        with exporting():
            assert_close(layer(x), expected)
        layer._kernel._order = Order.MATERIALIZED
        assert_close(layer(x), expected)


@pytest.mark.parametrize("dimensions", LAYERS)
def test_channels_first(dimensions):
    """Not every backend can run the stock layer with the channels first."""
    first, last = (
        make(dimensions, (7, 10), 3, 2, rank=2, data_format=format, implementation="factorized")
        for format in ("channels_first", "channels_last")
    )
    last.set_weights(first.get_weights())
    x = draw(2, *SIZES[:dimensions], 7)
    to_first = (0, dimensions + 1, *range(1, dimensions + 1))
    actual = evaluate(first, np.transpose(x, to_first))
    assert actual.shape == first.compute_output_shape((2, 7, *x.shape[1:-1]))
    assert_close(actual, np.transpose(evaluate(last, x), to_first))


@pytest.mark.parametrize("pattern", ["channel", "spatial"])
@pytest.mark.parametrize("implementation", ["factorized", "materialized"])
def test_gradients(pattern, implementation):
    """Those of the stock layer's kernel by the chain rule, divided by the gain."""
    options = {"pattern": pattern, "implementation": implementation, "activation": "tanh"}
    layer = make(2, (7, 10), 3, 2, "same", rank=2, **options)
    stock, x = stock_layer(layer), draw(2, 4, 3, 7)
    weights = draw(*layer.compute_output_shape(x.shape), seed=1)
    kernel, bias, inputs = layer_gradients(stock, x, weights)
    kernel = oracle.pad_like(np.swapaxes(kernel, -1, -2), layer.factorization)
    left, right = oracle.factor_gradients(kernel, *oracle.factors(layer))
    actual = layer_gradients(layer, x, weights, training=True)
    for gradient, expected in zip(actual, (left, right, bias, inputs), strict=True):
        assert_close(gradient, expected, 1e-4)


def test_no_tensor_of_the_size_of_the_kernel():
    layer = make(2, (256, 256), 3, 2, "same", implementation="factorized")
    x, weights = draw(1, 2, 2, 256), draw(1, 4, 4, 256, seed=1)
    function = weighted_output(layer, None, weights, training=True)
    largest = largest_tensor(function, *layer.get_weights(), x)
    assert largest < layer.factorization.full_parameters / 50


@pytest.mark.parametrize("initializer", ["he_normal", "orthogonal"])
def test_starts_with_the_variance_of_the_stock_layer(initializer):
    """Keras takes the filters for the fan-in of these kernels."""
    deviations = []
    for layer_class in (BilinearConv2DTranspose, layers.Conv2DTranspose):
        kernels = []
        for seed in range(20):
            keras.utils.set_random_seed(seed)
            layer = layer_class(16, 3, kernel_initializer=initializer)
            layer.build((None, 8, 8, 48))
            kernels.append(ops.convert_to_numpy(layer.kernel))
        deviations.append(np.std(kernels))
    np.testing.assert_allclose(*deviations, rtol=0.1)


@pytest.mark.usefixtures("cpu_costs")
def test_the_fastest_way_is_taken():
    assert not make(2, (512, 512), 3, 2)._kernel.materialized
    assert make(2, (8, 8), 2, rank=32)._kernel.materialized
    materialized = make(2, (512, 512), 3, 2, implementation="materialized")._kernel
    assert materialized.materialized
    with exporting():
        assert not materialized.materialized


@pytest.mark.parametrize(
    ("dimensions", "options"),
    [
        (1, {"kernel_size": 5, "strides": 2, "padding": "same"}),
        (2, {"kernel_size": (3, 2), "strides": 2, "output_padding": 1}),
        (3, {"kernel_size": 2, "strides": 2}),
    ],
)
@pytest.mark.parametrize("pattern", ["channel", "spatial"])
def test_from_full_is_exact_at_the_sufficient_rank(dimensions, options, pattern):
    full = LAYERS[dimensions].full_class(10, **options, bias_initializer="normal")
    full.build((None, *(None,) * dimensions, 7))
    convert = LAYERS[dimensions].from_full
    rank = convert(full, pattern=pattern).factorization.sufficient_rank
    layer = convert(full, rank=rank, pattern=pattern)
    assert layer.pattern == pattern
    assert layer.output_padding == full.output_padding
    assert_close(layer.kernel, full.kernel, 3e-6)
    x = draw(2, *SIZES[:dimensions], 7)
    assert_close(layer(x), full(x))
    assert_close(layer.expand()(x), full(x))


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_calibration_knows_what_makes_each_output(options, padding):
    """The rows that the fit sees, times the kernel as it sees it, are the outputs."""
    options = {
        key: value if isinstance(value, int) else value[:2] for key, value in options.items()
    }
    full, x = layers.Conv2DTranspose(5, **options, padding=padding), draw(2, 4, 3, 6)
    try:
        expected = ops.convert_to_numpy(full(x)).reshape(-1, 5)
    except Exception:
        pytest.skip("the stock layer cannot do that on this backend")
    converter = converter_of(full)
    (rows,), (kernel,) = converter.rows(full, x)["kernel"], converter.kernels(full)["kernel"]
    assert_close(rows @ kernel, expected)


def test_calibration_lowers_the_error():
    full = layers.Conv2DTranspose(16, 3, strides=2, padding="same", data_format="channels_last")
    x = draw(16, 6, 6, 4) @ draw(4, 24, seed=1) + 0.1 * draw(16, 6, 6, 24, seed=2)
    expected = ops.convert_to_numpy(full(x[8:]))
    errors = [
        np.linalg.norm(expected - ops.convert_to_numpy(layer(x[8:])))
        for layer in (
            BilinearConv2DTranspose.from_full(full, rank=2, calibration_data=data)
            for data in (x[:8], None)
        )
    ]
    assert errors[0] < 0.5 * errors[1]
    with pytest.raises(ValueError, match=r"of width 24 on axis -1. Received: an array of shape"):
        BilinearConv2DTranspose.from_full(full, calibration_data=x[..., :5])


def u_net():
    inputs = keras.Input((8, 8, 3))
    first = layers.Conv2D(24, 3, padding="same", activation="relu", name="first")(inputs)
    x = layers.Conv2D(48, 3, 2, padding="same", activation="relu", name="down")(first)
    x = layers.Conv2DTranspose(24, 3, 2, "same", activation="relu", name="up")(x)
    x = layers.concatenate([x, first])
    return keras.Model(inputs, layers.Conv2DTranspose(4, 1, name="classes")(x))


@pytest.mark.parametrize("data", [None, draw(32, 8, 8, 3)], ids=["kernels", "data"])
def test_rewrites_a_u_net(data, tmp_path):
    model, x = u_net(), draw(4, 8, 8, 3, seed=1)
    plan = plan_rewrite(model, budget=0.3, calibration_data=data)
    assert plan["up"].rank is not None
    small = rewrite_model(model, plan, calibration_data=data)
    assert type(small.get_layer("up")) is BilinearConv2DTranspose
    assert small.count_params() == plan.parameters <= 0.3 * model.count_params()
    small.save(tmp_path / "small.keras")
    outputs = small.predict(x, verbose=0)
    loaded = keras.models.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), outputs)
    full = expand_model(small)
    assert type(full.get_layer("up")) is layers.Conv2DTranspose
    assert_close(full.predict(x, verbose=0), outputs)


def test_rewrites_while_it_is_trained():
    model = u_net()
    model.compile("adam", "mse", run_eagerly=True)
    x, y = draw(16, 8, 8, 3), draw(16, 8, 8, 4, seed=1)
    callback = BilinearRewrite(at_epoch=1, budget=0.7, layers=["up"])
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
    assert type(model.get_layer("up")) is BilinearConv2DTranspose
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends export by another process")
@pytest.mark.parametrize("dimensions", LAYERS)
def test_is_exported_as_its_factors(dimensions, tmp_path):
    pytest.importorskip("ai_edge_litert")
    layer = LAYERS[dimensions](32, 3, 2, "same", rank=2, implementation="materialized")
    model = keras.Sequential([keras.Input((*SIZES[:dimensions], 64)), layer])
    report = export_litert(model, tmp_path / "model.tflite")
    assert report.difference < 1e-5
    assert 4 * model.count_params() < report.bytes < layer.factorization.full_parameters


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
    {"strides": 2, "dilation_rate": 2},
    {"strides": 2, "output_padding": 2},
    {"activation": "swoosh"},
    {"bias_constraint": "tight"},
    {"unheard": 1},
]


@pytest.mark.parametrize("arguments", REFUSED, ids=str)
def test_refuses_what_the_stock_layer_refuses(arguments):
    for layer_class in LAYERS.values():
        bilinear, stock = (
            outcome(lambda one=one: one(**{"filters": 8, "kernel_size": 3, **arguments}).name)
            for one in (layer_class, layer_class.full_class)
        )
        if isinstance(stock, str):  # Keras 3.13 takes some
            continue
        assert bilinear[0] is stock[0]
        names = bilinear[1].replace(layer_class.__name__, layer_class.full_class.__name__)
        assert names.split("(of type")[0][:40] == stock[1].split("(of type")[0][:40]


def test_refuses():
    with pytest.raises(ValueError, match=r"`filters` must be a positive integer. Received: filt"):
        BilinearConv2DTranspose(2.5, 3)
    with pytest.raises(ValueError, match=r"`pattern` must be one of .* Received: pattern="):
        BilinearConv2DTranspose(8, 3, pattern="both")
    with pytest.raises(ValueError, match="`output_factors` must be at least 8"):
        BilinearConv2DTranspose(8, 3, output_factors=(1, 3))
    layer = BilinearConv2DTranspose(8, 3, input_factors=(2, 2))
    with pytest.raises(ValueError, match="`input_factors` must be at least 6"):
        layer.build((None, 8, 8, 6))
    assert layer.weights == []
    with pytest.raises(ValueError, match=r"must be known. Received: input_shape="):
        BilinearConv2DTranspose(8, 3).build((None, 8, 8, None))
    with pytest.raises(ValueError, match=r"must have 4 axes. Received: input_shape="):
        BilinearConv2DTranspose(8, 3).build((None, 8, 8))


def test_takes_the_arguments_of_the_stock_layer_by_position():
    assert BilinearConv2DTranspose(8, 3, 2, "same", 1).output_padding == (1, 1)
    layer = BilinearConv3DTranspose(8, 3, 2, "same", "channels_first", 1)
    assert (layer.data_format, layer.output_padding) == ("channels_first", (1, 1, 1))
