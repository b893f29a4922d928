import json

import keras
import numpy as np
import oracle
import pytest
from backend_gradient import BACKEND, largest_tensor, layer_gradients, weighted_output
from keras import layers, ops

from keras_bilinear import (
    BilinearConvLSTM1D,
    BilinearConvLSTM2D,
    BilinearRewrite,
    expand_model,
    export_litert,
    exporting,
    plan_rewrite,
    rewrite_model,
)
from keras_bilinear.kronecker.factorization import FACTORIZED, Order
from keras_bilinear.layers.converter import converter_of

LAYERS = {1: BilinearConvLSTM1D, 2: BilinearConvLSTM2D}
IMPLEMENTATIONS = ["factorized", "materialized"]
STEPS, CHANNELS, FILTERS, SIZES = 3, 5, 6, (6, 5)
MASK = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0] * 3], bool)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def data(dimensions, channels=CHANNELS):
    return draw(len(MASK), STEPS, *SIZES[:dimensions], channels)


def make(dimensions, filters=FILTERS, channels=CHANNELS, **options):
    options = {"kernel_size": 3, "rank": 2, "recurrent_rank": 3, **options}
    layer = LAYERS[dimensions](filters, bias_initializer="normal", **options)
    sizes = SIZES[:dimensions]
    shape = (channels, *sizes) if layer.data_format == "channels_first" else (*sizes, channels)
    layer.build((len(MASK) if layer.stateful else None, STEPS, *shape))
    return layer


def gate_kernels(kernel):
    """The full kernel of all gates of a layer, and the factors, by NumPy."""
    plan = kernel.factorization
    left, right = (
        ops.convert_to_numpy(variable).astype("float64") for variable in (kernel.left, kernel.right)
    )
    full = [
        kernel.gain * oracle.kronecker_sum(*pair)[..., : plan.input_dim, : plan.output_dim]
        for pair in zip(left, right, strict=True)
    ]
    return np.concatenate(full, axis=-1), left, right


def stock_layer(layer):
    """The stock layer with the kernels that NumPy makes of the layer's factors."""
    converter = converter_of(layer)
    stock = converter.unbuilt_full(layer)
    stock.build(converter.input_shape(layer))
    kernels = [gate_kernels(kernel)[0] for kernel in layer.kernels.values()]
    stock.set_weights([*kernels, *layer.cell.get_weights()[4:]])
    return stock


def run(layer, x, **arguments):
    """Outputs, and states if it returns them, with the dropout of a layer that never ran."""
    if layer.dropout or layer.recurrent_dropout:
        layer.cell.seed_generator.state.assign([layer.cell.seed, 0])
    outputs = layer(x, **arguments)
    as_list = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [ops.convert_to_numpy(one) for one in as_list]


def assert_same(first, second, tolerance=5e-6):
    for actual, expected in zip(first, second, strict=True):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=10 * tolerance, atol=tolerance)


OPTIONS = {
    "plain": {},
    "strides": {"strides": 2, "return_sequences": True, "return_state": True},
    "same": {"padding": "same", "go_backwards": True, "return_sequences": True},
    "dilation": {"dilation_rate": 2, "padding": "same", "kernel_size": 2},
    "no bias": {"use_bias": False, "unroll": True, "activation": "softsign"},
    "pointwise": {"kernel_size": 1, "unit_forget_bias": False},
    "low rank": {"input_factors": (1, CHANNELS), "output_factors": (FILTERS, 1)},
    "dropout": {"dropout": 0.4, "recurrent_dropout": 0.3, "seed": 1, "return_sequences": True},
    "stateful": {"stateful": True},
}
WAYS = [(order, pattern) for pattern in ("channel", "spatial") for order in FACTORIZED]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dimensions", LAYERS)
def test_equals_the_stock_layer_with_the_expanded_kernels(dimensions, options):
    x = data(dimensions)
    # On JAX, Keras itself fails with a mask.
    mask = None if BACKEND == "jax" else ops.convert_to_tensor(MASK)
    way = [*OPTIONS].index(options) % 4  # each of them with some options
    order, pattern = WAYS[way]
    layer = make(dimensions, pattern=pattern, **OPTIONS[options])
    stock = stock_layer(layer)
    for arguments in ({}, {"mask": mask, "training": True}):
        expected = run(stock, x, **arguments)
        shapes = layer.compute_output_shape(x.shape)
        assert expected[0].shape == (shapes[0] if layer.return_state else shapes)
        states = [ops.copy(state) for state in layer.states] if layer.stateful else ()
        for way in (order, Order.MATERIALIZED, "exported"):
            for state, value in zip(layer.states or (), states, strict=False):
                state.assign(value)
            for kernel in layer.kernels.values():
                kernel._order = kernel._exported_order = order if way == "exported" else way
            if way == "exported":
                with exporting():
                    assert_same(run(layer, x, **arguments), expected)
            else:
                assert_same(run(layer, x, **arguments), expected)


@pytest.mark.parametrize("pattern", ["channel", "spatial"])
def test_channels_first(pattern):
    """Not every backend can run the stock layer with the channels first."""
    first, last = (
        make(2, data_format=format, implementation="factorized", pattern=pattern)
        for format in ("channels_first", "channels_last")
    )
    last.cell.set_weights(first.cell.get_weights())
    (expected,) = run(last, data(2))
    assert_same(run(first, np.moveaxis(data(2), -1, 2)), [np.moveaxis(expected, -1, 1)])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients(implementation):
    """Those of the stock layer's kernels by the chain rule, divided by the gain."""
    layer = make(1, implementation=implementation, padding="same")
    stock, x = stock_layer(layer), data(1)
    weights = draw(*layer.compute_output_shape(x.shape), seed=1)
    *kernels, bias, inputs = layer_gradients(stock, x, weights)
    expected = []
    for kernel, full in zip(layer.kernels.values(), kernels, strict=True):
        _, left, right = gate_kernels(kernel)
        plan = kernel.factorization.block
        of_gates = [
            oracle.factor_gradients(oracle.pad_like(block, plan), *pair)
            for block, *pair in zip(np.split(full, 4, axis=-1), left, right, strict=True)
        ]
        expected += map(np.array, zip(*of_gates, strict=True))
    actual = layer_gradients(layer, x, weights, training=True)
    assert_same(actual, [*expected, bias, inputs], 1e-4)


def test_no_tensor_of_the_size_of_the_kernel():
    layer = make(1, 128, 128, rank=1, recurrent_rank=1, implementation="factorized", padding="same")
    x = draw(1, STEPS, SIZES[0], 128)
    function = weighted_output(layer, None, draw(1, SIZES[0], 128), training=True)
    largest = largest_tensor(function, *layer.get_weights(), x)
    assert largest < layer.cell.factorization.full_parameters / 10


def test_starts_as_the_stock_layer():
    """With the deviation of its kernels, which are Glorot's and orthogonal."""
    deviations = []
    for layer_class in (BilinearConvLSTM2D, layers.ConvLSTM2D):
        kernels = []
        for seed in range(10):
            keras.utils.set_random_seed(seed)
            layer = layer_class(16, 3)
            layer.build((None, STEPS, 8, 8, 25))
            kernels.append([layer.cell.kernel, layer.cell.recurrent_kernel])
        kernels = zip(*kernels, strict=True)
        deviations.append([np.std([ops.convert_to_numpy(k) for k in each]) for each in kernels])
    np.testing.assert_allclose(*deviations, rtol=0.1)
    bias = np.repeat([0, 1, 0, 0], 16)
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.cell.bias), bias)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mixed_precision(policy, implementation):
    layer = make(2, implementation=implementation)
    mixed = make(2, implementation=implementation, dtype=policy)
    mixed.cell.set_weights(layer.cell.get_weights())
    outputs = mixed(data(2))
    assert keras.backend.standardize_dtype(outputs.dtype) == policy.removeprefix("mixed_")
    assert {variable.dtype for variable in mixed.trainable_variables} == {"float32"}
    actual = ops.convert_to_numpy(ops.cast(outputs, "float32"))
    np.testing.assert_allclose(actual, run(layer, data(2))[0], atol=0.1)


def test_config_round_trip():
    options = {
        "recurrent_rank": 4,
        "input_factors": (2, 3),
        "output_factors": (3, 2),
        "implementation": "factorized",
        "pattern": "spatial",
        "return_sequences": True,
        "kernel_regularizer": keras.regularizers.L2(0.1),
        "activity_regularizer": keras.regularizers.L2(0.2),
        "recurrent_constraint": keras.constraints.MaxNorm(2.0),
        "dropout": 0.1,
        "seed": 3,
        "dtype": "mixed_bfloat16",
        "name": "recurrent",
        "trainable": False,
    }
    layer = make(2, **options)
    config = json.loads(json.dumps(layer.get_config()))
    again = BilinearConvLSTM2D.from_config(config)
    assert json.loads(json.dumps(again.get_config())) == config
    assert again.name == "recurrent"
    assert again.compute_dtype == again.cell.compute_dtype == "bfloat16"
    again.build((None, STEPS, *SIZES, CHANNELS))
    assert again.cell.factorization == layer.cell.factorization
    assert again.cell.recurrent_factorization.output_factors == (3, 2)
    assert again.trainable_variables == []
    assert BilinearConvLSTM2D(8, 3, 2, "same").strides == (2, 2)


@pytest.mark.parametrize("pattern", ["channel", "spatial"])
@pytest.mark.parametrize("dimensions", LAYERS)
def test_from_full_is_exact_at_the_sufficient_rank(dimensions, pattern):
    full = LAYERS[dimensions].full_class(FILTERS, 3, bias_initializer="normal", stateful=True)
    x = data(dimensions)
    full(x)
    convert = LAYERS[dimensions].from_full
    cell = convert(full, pattern=pattern).cell
    plans = cell.factorization, cell.recurrent_factorization
    rank = max(plan.sufficient_rank for plan in plans)
    layer = convert(full, rank=rank, pattern=pattern)
    states = [[ops.convert_to_numpy(state) for state in one.states] for one in (layer, full)]
    assert_same(*states)
    assert layer.cell.pattern == pattern
    assert_same(run(layer.expand(), x), run(layer, x))
    for one in (layer, full):
        one.reset_state()
    assert_same(run(layer, x), run(full, x), 2e-5)


def test_calibration_lowers_the_error():
    full = layers.ConvLSTM2D(12, 3, padding="same", return_sequences=True)
    x = 2 * draw(16, STEPS, *SIZES, 3) @ draw(3, 16, seed=1)
    expected = ops.convert_to_numpy(full(x[8:]))
    errors = [
        np.linalg.norm(expected - ops.convert_to_numpy(layer(x[8:])))
        for layer in (
            BilinearConvLSTM2D.from_full(full, rank=2, calibration_data=given)
            for given in (x[:8], None)
        )
    ]
    assert errors[0] < 0.9 * errors[1]
    with pytest.raises(ValueError, match=r"of width 16 on axis -1. Received: an array of shape"):
        BilinearConvLSTM2D.from_full(full, calibration_data=x[..., :5])


@pytest.mark.parametrize("options", ["strides", "same", "dilation"])
def test_calibration_knows_what_both_kernels_see(options):
    """The rows that the fit sees, times the kernels, are what the gates of the first step get."""
    full = layers.ConvLSTM2D(FILTERS, **{"kernel_size": 3, **OPTIONS[options]})
    x = data(2)[:, :1]
    full(x)
    state = draw(*full.cell.compute_output_shape(x[:, 0].shape)[0], seed=1)
    converter = converter_of(full)
    rows = converter.rows(full, x, initial_state=[state, state])
    kernels = converter.kernels(full)
    actual = [rows[name][0] @ kernels[name][0] for name in ("kernel", "recurrent_kernel")]
    cell = full.cell
    first = [
        ops.convert_to_numpy(one)[..., :FILTERS] for one in (cell.kernel, cell.recurrent_kernel)
    ]
    expected = (
        cell.input_conv(x[:, 0], first[0], padding=cell.padding),
        cell.recurrent_conv(state, first[1]),
    )
    assert_same(actual, [ops.convert_to_numpy(one).reshape(-1, FILTERS) for one in expected])


def network():
    return keras.Sequential(
        [
            keras.Input((STEPS, 6, 6, 2)),
            layers.ConvLSTM2D(16, 3, padding="same", return_sequences=True, name="first"),
            layers.ConvLSTM2D(24, 3, padding="same", name="second"),
            layers.Conv2D(2, 1, name="frame"),
        ]
    )


@pytest.mark.parametrize("given", [None, draw(16, STEPS, 6, 6, 2)], ids=["kernels", "data"])
def test_rewrites_a_model(given, tmp_path):
    model, x = network(), draw(4, STEPS, 6, 6, 2, seed=1)
    plan = plan_rewrite(model, budget=0.2, calibration_data=given)
    assert plan["second"].rank is not None
    small = rewrite_model(model, plan, calibration_data=given)
    assert type(small.get_layer("second")) is BilinearConvLSTM2D
    assert small.count_params() == plan.parameters <= 0.2 * model.count_params()
    small.save(tmp_path / "small.keras")
    outputs = small.predict(x, verbose=0)
    loaded = keras.models.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), outputs)
    full = expand_model(small)
    assert type(full.get_layer("second")) is layers.ConvLSTM2D
    assert_same([full.predict(x, verbose=0)], [outputs], 1e-5)


def test_rewrites_while_it_is_trained():
    layer = layers.ConvLSTM1D(16, 3, name="layer")
    model = keras.Sequential([keras.Input((STEPS, 6, 4)), layer])
    model.compile("adam", "mse", run_eagerly=True)
    x, y = draw(8, STEPS, 6, 4), draw(8, 4, 16, seed=1)
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[BilinearRewrite(1, budget=0.5)])
    assert type(layer) is BilinearConvLSTM1D
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends export by another process")
def test_is_exported_as_its_factors(tmp_path):
    pytest.importorskip("ai_edge_litert")
    layer = BilinearConvLSTM2D(32, 3, padding="same", implementation="materialized")
    model = keras.Sequential([keras.Input((STEPS, *SIZES, 32)), layer])
    report = export_litert(model, tmp_path / "model.tflite")
    assert report.difference < 1e-5
    assert 4 * model.count_params() < report.bytes < 2 * layer.cell.factorization.full_parameters


@pytest.mark.parametrize("layer_class", LAYERS.values())
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"filters": 0}, "`filters` must be a positive integer"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"padding": "causal"}, "padding"),
        ({"strides": 2, "dilation_rate": 2}, "is not compatible with"),
        ({"rank": 0}, "`rank` must be a positive integer"),
        ({"recurrent_rank": 1.0}, "`recurrent_rank` must be a positive integer"),
        ({"implementation": 2}, "`implementation` must be one of"),
        ({"pattern": "both"}, "`pattern` must be one of"),
        ({"input_factors": (0, 3)}, "must be a positive integer"),
        ({"output_factors": (2, 3)}, "must be at least 8"),
    ],
)
def test_refuses(layer_class, arguments, text):
    with pytest.raises(ValueError, match=text):
        layer_class(**{"filters": 8, "kernel_size": 3, **arguments})


def test_refuses_inputs_and_layers():
    layer = BilinearConvLSTM2D(8, 3)
    with pytest.raises(ValueError, match=r"must be known. Received: input_shape="):
        layer.build((None, STEPS, 6, None, 4))
    assert layer.cell.weights == []
    full = layers.ConvLSTM2D(8, 3)
    with pytest.raises(ValueError, match=r"`BilinearConvLSTM2D.from_full` takes a built layer"):
        BilinearConvLSTM2D.from_full(full)
    full.build((None, STEPS, 6, 6, 4))
    with pytest.raises(TypeError, match=r"takes a `keras.layers.ConvLSTM1D`"):
        BilinearConvLSTM1D.from_full(full)
    full.cell.recurrent_kernel.assign(np.full((3, 3, 8, 32), np.nan))
    with pytest.raises(ValueError, match=r"takes finite weights.* in `recurrent_kernel`"):
        BilinearConvLSTM2D.from_full(full)
