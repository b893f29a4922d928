import keras
import numpy as np
import pytest
from backend_gradient import layer_gradients
from keras import ops

from keras_bilinear import BilinearEinsumDense

# Equation, output shape, axes of the bias, shape of the inputs, as stock layers take them.
EQUATIONS = [
    ("ab,bc->ac", 10, "c", (4, 12)),
    ("abc,cd->abd", (None, 10), None, (4, 3, 12)),
    ("abc,cde->abde", (None, 4, 5), "de", (4, 3, 12)),
    ("abcd,cde->abe", (None, 10), "e", (4, 3, 6, 2)),
    ("abcd,dec->aeb", (10, 3), "e", (4, 3, 6, 2)),
    ("abc,dc->adb", (10, None), None, (4, 3, 12)),
    ("abc,cd->ad", 10, "d", (4, 3, 12)),
    ("...x,xy->...y", 10, "y", (4, 3, 2, 12)),
    ("ab...,bc->ac...", 10, "c", (4, 12, 3, 2)),
    ("abc,bde->adec", (3, 3, 12), "ec", (4, 3, 12)),
]


@pytest.fixture(params=EQUATIONS, ids=lambda row: row[0])
def case(request):
    equation, output_shape, bias_axes, shape = request.param
    arguments = {"equation": equation, "output_shape": output_shape, "bias_axes": bias_axes}
    arguments["bias_initializer"] = keras.initializers.RandomNormal(seed=1)
    return arguments, np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize("implementation", ["factorized", "materialized"])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_the_einsum_with_its_kernel(case, rank, implementation):
    arguments, x = case
    layer = BilinearEinsumDense(**arguments, rank=rank, implementation=implementation)
    outputs = ops.convert_to_numpy(layer(x))
    kernel = ops.convert_to_numpy(layer.kernel).astype("float64")
    expected = np.einsum(arguments["equation"], x.astype("float64"), kernel)
    if layer.bias is not None:
        expected = expected + ops.convert_to_numpy(layer.bias)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    assert layer.compute_output_shape(x.shape) == expected.shape


def test_from_full_and_back(case):
    arguments, x = case
    full = keras.layers.EinsumDense(**arguments, activation="tanh", name="projection")
    expected = ops.convert_to_numpy(full(x))
    exact = BilinearEinsumDense.from_full(full, rank=20)
    assert exact.name == "projection"
    assert exact.factorization.sufficient_rank <= 20
    np.testing.assert_allclose(ops.convert_to_numpy(exact(x)), expected, rtol=1e-4, atol=1e-5)
    again = exact.expand()
    assert type(again) is keras.layers.EinsumDense
    np.testing.assert_allclose(ops.convert_to_numpy(again(x)), expected, rtol=1e-4, atol=1e-5)


def test_calibration_comes_nearer(case):
    arguments, x = case
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(200, *x.shape[1:])) * np.linspace(0.1, 3, x.shape[-1]) + 1).astype(
        "float32"
    )
    full = keras.layers.EinsumDense(**arguments)
    expected = ops.convert_to_numpy(full(x))
    errors = [
        np.linalg.norm(
            ops.convert_to_numpy(BilinearEinsumDense.from_full(full, calibration_data=data)(x))
            - expected
        )
        for data in (None, x)
    ]
    assert errors[1] < errors[0]


def test_gradients_of_the_inputs_are_those_of_the_full_layer(case):
    arguments, x = case
    layer = BilinearEinsumDense(**arguments, rank=2, implementation="factorized")
    weights = np.random.default_rng(1).normal(size=layer(x).shape).astype("float32")
    ours, theirs = (layer_gradients(one, x, weights)[-1] for one in (layer, layer.expand()))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_two_axes_are_the_factors():
    layer = BilinearEinsumDense("abc,cde->abde", (None, 4, 9))
    layer.build((None, None, 30))
    assert layer.factorization.input_factors == (5, 6)
    assert layer.factorization.output_factors == (4, 9)
    layer = BilinearEinsumDense("abcd,cde->abe", (None, 36), output_factors=(3, 12))
    layer.build((None, None, 1, 7))
    assert layer.factorization.input_factors != (1, 7)
    assert layer.factorization.output_factors == (3, 12)


def test_unknown_axes_and_empty_batches():
    inputs = keras.Input((None, 12))
    layer = BilinearEinsumDense("abc,cde->abde", (None, 4, 5), bias_axes="de")
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, None, 4, 5)
    for shape in ((3, 2, 12), (1, 7, 12), (0, 2, 12)):
        assert model(np.ones(shape, "float32")).shape == (*shape[:2], 4, 5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"equation": "abc,acd->abd"}, "The kernel of `equation` must be a matrix"),
        ({"equation": "abc,cdx->abd"}, "The kernel of `equation` must be a matrix"),
        ({"equation": "abc,d->abd"}, "The kernel of `equation` must be a matrix"),
        ({"equation": "abc"}, "`equation` must have the form"),
        ({"equation": "...a,ab->b"}, "`equation` must have the form"),
        ({"equation": 3}, "`equation` must have the form"),
        ({"rank": 0}, "`rank` must be a positive integer"),
        ({"output_factors": (2, 2)}, "must be at least 10"),
        ({"bias_axes": "x"}, "'x'"),
    ],
)
def test_bad_arguments_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        BilinearEinsumDense(
            **{"equation": "abc,cd->abd", "output_shape": (None, 10), **arguments}
        ).build((None, 3, 12))


def test_inputs_of_unknown_width_are_refused():
    with pytest.raises(ValueError, match="must be known"):
        BilinearEinsumDense("abc,cd->abd", (None, 10)).build((None, 3, None))


@pytest.mark.parametrize("shape", [(4, 12), (4, 3, 11)])
def test_calibration_data_of_other_shapes_are_refused(shape):
    full = keras.layers.EinsumDense("abc,cd->abd", (None, 10))
    full.build((None, None, 12))
    with pytest.raises(ValueError, match="must be inputs of the layer"):
        BilinearEinsumDense.from_full(full, calibration_data=np.ones(shape, "float32"))
