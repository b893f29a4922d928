import itertools
import math

import keras
import numpy as np
import oracle
import pytest
from backend_gradient import BACKEND, evaluate, largest_tensor, layer_gradients, weighted_output
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_bilinear import BilinearConv1D, BilinearConv2D, BilinearConv3D, exporting
from keras_bilinear.kronecker.factorization import Order

LAYERS = {1: BilinearConv1D, 2: BilinearConv2D, 3: BilinearConv3D}
PATTERNS = ["channel", "spatial"]
IMPLEMENTATIONS = ["factorized", "materialized"]
# The options are the same for every backend, and JAX compiles for each.
WAYS = [(Order.LEFT_FIRST, "channel"), (Order.RIGHT_FIRST, "spatial")]
if BACKEND == "tensorflow":
    WAYS += [(Order.RIGHT_FIRST, "channel"), (Order.LEFT_FIRST, "spatial")]
# For strides up to 3: where padding "same" would have to crop two positions or more,
# TensorFlow without oneDNN takes others than with it in three dimensions.
SIZES = (7, 8, 10)
# (input channels, filters): square, images, primes, classes, one of each.
CHANNELS = [(16, 16), (3, 8), (7, 11), (12, 10), (1, 6), (6, 1), (1, 1)]


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
    channels = kernel.shape[-2] * layer.groups
    positions = (None,) * (kernel.ndim - 2)
    last = layer.data_format == "channels_last"
    stock.build((None, *positions, channels) if last else (None, channels, *positions))
    stock.set_weights([kernel, *layer.get_weights()[2:]])
    return stock


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = ops.convert_to_numpy(actual), ops.convert_to_numpy(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("factors", [((1, 6), (10, 1)), ((6, 1), (1, 10))])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_kernels_of_low_rank(factors, implementation):
    layer = make(
        2, (6, 10), 3, 2, "same", rank=4, input_factors=factors[0], output_factors=factors[1],
        implementation=implementation,
    )  # fmt: skip
    x = draw(2, 7, 9, 6)
    assert_close(evaluate(layer, x), stock_layer(layer)(x))


def options_of_a_dimension(dimensions):
    """Strides, dilation, padding and window that go together."""
    mixed = tuple(range(1, dimensions + 1))
    paddings = ["valid", "same", *(["causal"] if dimensions == 1 else [])]
    for padding in paddings:
        yield {"kernel_size": 3, "padding": padding}
        yield {"kernel_size": 3, "padding": padding, "strides": 2}
        yield {"kernel_size": 2, "padding": padding, "dilation_rate": 2}
        yield {"kernel_size": mixed, "padding": padding, "strides": mixed[::-1]}
        yield {"kernel_size": mixed[::-1], "padding": padding, "dilation_rate": mixed}
        yield {"kernel_size": 1, "padding": padding, "strides": mixed}


with_all_options = pytest.mark.parametrize(
    ("dimensions", "options"),
    [(n, options) for n in LAYERS for options in options_of_a_dimension(n)],
    ids=str,
)


@pytest.mark.parametrize(("order", "pattern"), WAYS)
@with_all_options
def test_equals_the_stock_layer_with_the_expanded_kernel(dimensions, options, order, pattern):
    layer = make(dimensions, (6, 8), **options, rank=2, pattern=pattern, activation="tanh")
    layer._kernel._order = order
    x = draw(2, *SIZES[:dimensions], 6)
    assert_close(evaluate(layer, x), evaluate(stock_layer(layer), x))


@pytest.mark.parametrize(("order", "pattern"), WAYS)
@with_all_options
def test_a_file_computes_the_same(dimensions, options, order, pattern):
    grouped = make(dimensions, (12, 12), **options, groups=2, pattern=pattern)
    layer = make(dimensions, (6, 8), **options, rank=2, pattern=pattern)
    for one, channels in ((grouped, 12), (layer, 6)):
        one._kernel._exported_order = order
        x = draw(2, *SIZES[:dimensions], channels)
        expected = evaluate(stock_layer(one), x)
        for integers in (False, True):
            with exporting(integers):
                assert_close(one(x), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_any_number_of_channels(channels, pattern, implementation):
    for rank in (1, 3):
        layer = make(2, channels, 3, rank=rank, pattern=pattern, implementation=implementation)
        assert_close(layer.kernel, oracle.full_kernel(layer))
        x = draw(2, 5, 6, channels[0])
        assert_close(evaluate(layer, x), evaluate(stock_layer(layer), x))


@pytest.mark.skipif(BACKEND == "jax", reason="JAX compiles each of the drawn layers")
@settings(max_examples=3 * settings().max_examples)
@given(st.data())
def test_equals_the_stock_layer_for_any_options(data):
    dimensions = data.draw(st.integers(1, 3))
    each = st.lists(st.integers(1, 3), min_size=dimensions, max_size=dimensions).map(tuple)
    groups, strided = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    channels = [groups * data.draw(st.integers(1, 6)) for _ in range(2)]
    paddings = ["valid", "same"] + ["causal"] * (dimensions == 1)
    layer = make(
        dimensions,
        channels,
        data.draw(each),
        strides=data.draw(each) if strided else 1,
        dilation_rate=1 if strided else data.draw(each),
        padding=data.draw(st.sampled_from(paddings)),
        groups=groups,
        rank=data.draw(st.integers(1, 3)),
        pattern=data.draw(st.sampled_from(PATTERNS)),
        use_bias=data.draw(st.booleans()),
        implementation=data.draw(st.sampled_from(IMPLEMENTATIONS)),
    )
    x = draw(2, *data.draw(each.map(lambda sizes: [size + 6 for size in sizes])), channels[0])
    expected = stock_layer(layer)(x)
    assert_close(layer(x), expected)
    with exporting(data.draw(st.booleans())):
        assert_close(layer(x), expected)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has no float64 here")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_computes_in_float64(pattern, implementation):
    options = {"pattern": pattern, "implementation": implementation, "dtype": "float64"}
    layer = make(2, (12, 18), 3, rank=2, **options)
    x = draw(2, 6, 5, 12).astype("float64")
    outputs = layer(x)
    assert keras.backend.standardize_dtype(outputs.dtype) == "float64"
    assert_close(outputs, stock_layer(layer)(x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("groups", [2, 3, 6])
def test_groups(groups, pattern, implementation):
    for dimensions, strides in ((1, 1), (2, 2)):
        layer = make(
            dimensions,
            (12, 18),
            3,
            groups=groups,
            rank=2,
            pattern=pattern,
            strides=strides,
            implementation=implementation,
        )
        x = draw(2, *(9,) * dimensions, 12)
        assert_close(evaluate(layer, x), evaluate(stock_layer(layer), x))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dimensions", LAYERS)
def test_channels_first(dimensions, pattern):
    """Not every backend can run the stock layer with the channels first."""
    first, last = (
        make(
            dimensions,
            (7, 10),
            3,
            rank=2,
            pattern=pattern,
            padding="causal" if dimensions == 1 else "same",
            data_format=data_format,
            implementation="factorized",
        )
        for data_format in ("channels_first", "channels_last")
    )
    last.set_weights(first.get_weights())
    x = draw(2, *range(5, 5 + dimensions), 7)
    to_first = (0, dimensions + 1, *range(1, dimensions + 1))
    actual = evaluate(first, np.transpose(x, to_first))
    assert actual.shape == first.compute_output_shape((2, 7, *x.shape[1:-1]))
    assert_close(actual, np.transpose(evaluate(last, x), to_first))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("dimensions", "channels", "options"),
    [
        (1, (7, 10), {"kernel_size": 3, "padding": "causal"}),
        (2, (12, 10), {"kernel_size": (3, 2), "strides": 2, "padding": "same"}),
        (2, (6, 9), {"kernel_size": 3, "groups": 3}),
        (2, (9, 8), {"kernel_size": 1}),
        (3, (4, 6), {"kernel_size": 2, "dilation_rate": 2}),
    ],
)
def test_gradients(dimensions, channels, options, pattern, implementation):
    """Those of the stock layer's kernel by the chain rule, divided by the gain."""
    layer = make(
        dimensions,
        channels,
        **options,
        activation="tanh",
        rank=2,
        pattern=pattern,
        implementation=implementation,
    )
    stock = stock_layer(layer)
    x = draw(2, *range(5, 5 + dimensions), channels[0])
    weights = draw(*layer.compute_output_shape(x.shape), seed=1)
    kernel, bias, inputs = layer_gradients(stock, x, weights)
    kernel = oracle.pad_like(kernel, layer.factorization)
    left, right = oracle.factor_gradients(kernel, *oracle.factors(layer))
    actual = layer_gradients(layer, x, weights, training=True)
    for gradient, expected in zip(actual, (left, right, bias, inputs), strict=True):
        assert_close(gradient, expected, 1e-4)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_tensor_of_the_size_of_the_kernel(pattern, rank):
    layer = make(
        2, (512, 512), 3, rank=rank, pattern=pattern, padding="same", implementation="factorized"
    )
    x, weights = draw(1, 2, 2, 512), draw(1, 2, 2, 512, seed=1)
    function = weighted_output(layer, None, weights, training=True)
    largest = largest_tensor(function, *layer.get_weights(), x)
    assert largest < layer.factorization.full_parameters / 50


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_patches(pattern):
    layer = make(2, (16, 16), 5, pattern=pattern, padding="same", implementation="factorized")
    x, weights = draw(2, 20, 20, 16), draw(2, 20, 20, 16, seed=1)
    function = weighted_output(layer, None, weights, training=True)
    # Some backends pad the input first.
    assert largest_tensor(function, *layer.get_weights(), x) <= 2 * x.size
    layer = make(2, (256, 256), 3, implementation="materialized")
    function = weighted_output(layer, None, draw(1, 1, 1, 256), training=True)
    largest = largest_tensor(function, *layer.get_weights(), draw(1, 3, 3, 256))
    assert largest >= layer.factorization.full_parameters


@pytest.mark.parametrize("pattern", PATTERNS)
def test_unknown_dimensions_in_a_compiled_model(pattern):
    layer = make(2, (6, 10), 3, pattern=pattern, strides=2, rank=2, implementation="factorized")
    inputs = keras.Input((None, None, 6))
    model, stock = keras.Model(inputs, layer(inputs)), stock_layer(layer)
    for size in ((1, 5, 6), (3, 8, 5)):
        x = draw(*size, 6)
        assert_close(model.predict(x, verbose=0), stock(x))


@pytest.mark.usefixtures("cpu_costs")
def test_pointwise_is_a_dense_layer_over_positions():
    layer = make(2, (64, 64), 1, strides=2)
    plan = layer.factorization
    assert plan.pointwise
    assert not layer._kernel.materialized
    largest = largest_tensor(
        weighted_output(layer, None, draw(2, 4, 4, 64)), *layer.get_weights(), draw(2, 8, 8, 64)
    )
    assert largest == 2 * 8 * 8 * 64


def test_input_channels_of_an_image_keep_the_rank_of_the_kernel():
    layer = make(2, (3, 32), 3)
    kernel = oracle.full_kernel(layer).reshape(27, 32)
    assert np.linalg.matrix_rank(kernel) == layer.factorization.attainable_rank == 24


@pytest.mark.parametrize(
    ("dimensions", "channels", "options"),
    [
        (1, (7, 10), {"kernel_size": 5}),
        (2, (12, 8), {"kernel_size": (3, 2)}),
        (2, (8, 12), {"kernel_size": 3, "groups": 4}),
        (3, (6, 4), {"kernel_size": 2}),
    ],
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_from_full_is_exact_at_the_sufficient_rank(dimensions, channels, options, pattern):
    full_class = LAYERS[dimensions].full_class
    full = full_class(channels[1], **options, bias_initializer="normal", activation="relu")
    full.build((None, *(None,) * dimensions, channels[0]))
    convert = LAYERS[dimensions].from_full
    rank = convert(full, pattern=pattern).factorization.sufficient_rank
    layer = convert(full, rank=rank, pattern=pattern)
    assert layer.pattern == pattern
    assert_close(layer.kernel, full.kernel, 3e-6)
    x = draw(2, *(7,) * dimensions, channels[0])
    assert_close(layer(x), full(x))
    assert_close(layer.expand()(x), full(x))


def test_from_full_with_the_channels_first():
    full = keras.layers.Conv2D(10, 3, data_format="channels_first")
    full.build((None, 6, None, None))
    layer = BilinearConv2D.from_full(full, rank=60)
    assert layer.data_format == "channels_first"
    assert_close(layer.kernel, full.kernel, 3e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("rank", [1, 4])
def test_starts_with_the_variance_of_the_stock_layer(pattern, groups, rank):
    layers = [
        make(
            2,
            (48, 64),
            3,
            groups=groups,
            rank=rank,
            pattern=pattern,
            kernel_initializer=keras.initializers.HeNormal(seed),
        )
        for seed in range(30)
    ]
    deviation = np.std([oracle.full_kernel(layer) for layer in layers])
    np.testing.assert_allclose(deviation, math.sqrt(2 * groups / (9 * 48)), rtol=0.1)


def outcome(function):
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


REFUSED = [
    {"filters": 0},
    {"filters": -3},
    {"kernel_size": 0},
    {"kernel_size": (3, 3, 3, 3)},
    {"kernel_size": "3"},
    {"kernel_size": None},
    {"strides": 0},
    {"strides": (1,)},
    {"strides": -1},
    {"padding": "full"},
    {"padding": None},
    {"data_format": "first"},
    {"dilation_rate": 0},
    {"dilation_rate": (2,)},
    {"strides": 2, "dilation_rate": 2},
    {"groups": 0},
    {"groups": -1},
    {"groups": 3},
    {"activation": "swoosh"},
    {"kernel_initializer": "sometimes"},
    {"kernel_regularizer": "l7"},
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
        if isinstance(stock, str):  # (2,) in one dimension
            assert isinstance(bilinear, str)
            continue
        assert bilinear[0] is stock[0]
        names = bilinear[1].replace(layer_class.__name__, layer_class.full_class.__name__)
        assert names.split("(of type")[0][:40] == stock[1].split("(of type")[0][:40]


@pytest.mark.parametrize("padding", ["valid", "same", "causal"])
@pytest.mark.parametrize(
    "shape",
    [(None, None), (None, 4, 4, 4, 4, 4), (None, 2, 2), (2, 5, 5, 4), (2, 9, 4)],
)
def test_refuses_inputs_that_the_stock_layer_refuses(shape, padding):
    for layer_class, groups in itertools.product(LAYERS.values(), (1, 3)):
        bilinear, stock = (
            outcome(
                lambda one=one, groups=groups: (
                    one(6, 5, padding=padding, groups=groups, name="conv")(
                        keras.KerasTensor(shape)
                    ).shape
                )
            )
            for one in (layer_class, layer_class.full_class)
        )
        if isinstance(bilinear[1], str):
            bilinear = bilinear[0], bilinear[1].replace("BilinearConv", "Conv")
        assert bilinear == stock


@pytest.mark.parametrize("value", [2.0, True, "8", (8,), None])
def test_refuses_filters_and_groups_that_are_no_integers(value):
    for argument in ("filters", "groups"):
        arguments = {"filters": 8, "kernel_size": 3, argument: value}
        stock = outcome(lambda arguments=arguments: (keras.layers.Conv2D(**arguments), None))
        ours = f"`{argument}` must be a positive integer. Received: {argument}={value!r}"
        with pytest.raises((ValueError, TypeError)) as error:
            BilinearConv2D(**arguments)
        assert str(error.value) == stock[1] or str(error.value).startswith(ours)


@pytest.mark.parametrize("pattern", ["both", None, 1])
def test_refuses_pattern(pattern):
    with pytest.raises(ValueError, match=r"`pattern` must be one of .* Received: pattern="):
        BilinearConv2D(8, 3, pattern=pattern)


def test_refuses_factors():
    with pytest.raises(ValueError, match="`output_factors` must be at least 4"):
        BilinearConv2D(8, 3, groups=2, output_factors=(1, 3))
    layer = BilinearConv2D(8, 3, input_factors=(2, 2))
    with pytest.raises(ValueError, match="`input_factors` must be at least 6"):
        layer.build((None, 8, 8, 6))
    assert layer.weights == []


def test_refuses_an_unknown_number_of_channels():
    with pytest.raises(ValueError, match=r"must be known. Received: input_shape="):
        BilinearConv2D(8, 3).build((None, 8, 8, None))
