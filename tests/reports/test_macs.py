import keras
import numpy as np
import pytest

from keras_bilinear import (
    BilinearConv2D,
    BilinearConv2DTranspose,
    BilinearConvLSTM2D,
    BilinearDense,
    BilinearEmbedding,
    BilinearGRU,
    BilinearLSTM,
    BilinearSeparableConv2D,
    BilinearSimpleRNN,
)
from keras_bilinear.kronecker import convolution, products
from keras_bilinear.kronecker.factorization import FACTORIZED
from keras_bilinear.reports.summary import count_macs


class CountingOps:
    """Stands in for `keras.ops` and counts the multiplications of products and convolutions."""

    def __init__(self):
        self.macs = 0

    def __getattr__(self, name):
        return getattr(keras.ops, name)

    def matmul(self, a, b):
        product = keras.ops.matmul(a, b)
        self.macs += int(np.prod(product.shape)) * a.shape[-1]
        return product

    def conv(self, x, kernel, **options):
        y = keras.ops.conv(x, kernel, **options)
        self.macs += int(np.prod(y.shape[:-1])) * int(np.prod(kernel.shape))
        return y

    def conv_transpose(self, x, kernel, **options):
        self.macs += int(np.prod(x.shape[:-1])) * int(np.prod(kernel.shape))
        return keras.ops.conv_transpose(x, kernel, **options)


@pytest.fixture
def counted(monkeypatch):
    counter = CountingOps()
    for module in (products, convolution):
        monkeypatch.setattr(module, "ops", counter)
    return counter


def macs(*layers):
    return count_macs(keras.Sequential(layers))


@pytest.mark.parametrize(("inputs", "units", "rank"), [(64, 48, 1), (12, 100, 3), (37, 10, 2)])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_macs_of_bilinear_dense_are_the_multiplications_it_does(
    inputs, units, rank, leading, counted
):
    layer = BilinearDense(units, rank=rank, implementation="factorized")
    model = keras.Sequential([keras.Input((*leading, inputs)), layer])
    counted.macs = 0
    layer(np.zeros((1, *leading, inputs), "float32"), training=False)
    expected = counted.macs
    assert count_macs(model) == expected > 0


@pytest.mark.parametrize("pattern", ["channel", "spatial"])
@pytest.mark.parametrize("order", FACTORIZED)
@pytest.mark.parametrize("options", [{}, {"strides": 2}, {"groups": 3}, {"strides": (2, 1)}])
def test_macs_of_a_bilinear_convolution_are_the_multiplications_it_does(
    options, order, pattern, counted
):
    layer = BilinearConv2D(12, 3, padding="same", rank=2, pattern=pattern, **options)
    model = keras.Sequential([keras.Input((8, 8, 6)), layer])
    layer._kernel._order = order
    counted.macs = 0
    layer(np.zeros((1, 8, 8, 6), "float32"), training=False)
    expected = counted.macs
    assert count_macs(model) == expected > 0


@pytest.mark.parametrize(
    "data_format",
    [
        "channels_last",
        pytest.param(
            "channels_first",
            marks=pytest.mark.skipif(
                keras.config.backend() == "tensorflow", reason="TensorFlow does it on GPUs only"
            ),
        ),
    ],
)
def test_macs_of_full_and_pointwise_convolutions(data_format):
    shape = (8, 8, 9) if data_format == "channels_last" else (9, 8, 8)
    full = keras.layers.Conv2D(16, 3, strides=2, data_format=data_format)
    assert macs(keras.Input(shape), full) == 3 * 3 * 9 * 9 * 16
    pointwise = BilinearConv2D(
        16, 1, strides=2, implementation="factorized", data_format=data_format
    )
    assert macs(keras.Input(shape), pointwise) == 4 * 4 * pointwise.factorization.macs


def test_macs_of_bilinear_embedding_are_one_product_for_each_rank_and_number():
    layer = BilinearEmbedding(100, 12, rank=3, output_factors=(3, 4))
    assert macs(keras.Input((7,), dtype="int32"), layer) == 7 * 3 * 12


def test_macs_of_a_materialized_layer_are_those_of_the_full_one():
    full = keras.layers.Dense(20)
    bilinear = BilinearDense(20, implementation="materialized")
    assert macs(keras.Input((4, 30)), full) == macs(keras.Input((4, 30)), bilinear) == 4 * 600


@pytest.mark.parametrize("layer_class", [BilinearSimpleRNN, BilinearGRU, BilinearLSTM])
def test_macs_of_a_recurrent_layer(layer_class, counted):
    layer = layer_class(12, rank=2, recurrent_rank=1, implementation="factorized", unroll=True)
    model = keras.Sequential([keras.Input((5, 9)), layer])
    counted.macs = 0
    layer(np.zeros((1, 5, 9), "float32"), training=False)
    expected = counted.macs
    assert count_macs(model) == expected > 0
    gates = layer_class.cell_class.gates
    full = 5 * gates * 12 * (9 + 12)
    assert macs(keras.Input((5, 9)), layer.expand()) == full
    materialized = layer_class(12, implementation="materialized")
    assert macs(keras.Input((5, 9)), materialized) == full


@pytest.mark.parametrize("pattern", ["channel", "spatial"])
@pytest.mark.parametrize("order", FACTORIZED)
def test_macs_of_a_transposed_convolution(order, pattern, counted):
    layer = BilinearConv2DTranspose(12, 3, (2, 3), "same", rank=2, pattern=pattern)
    model = keras.Sequential([keras.Input((4, 5, 6)), layer])
    layer._kernel._order = order
    counted.macs = 0
    layer(np.zeros((1, 4, 5, 6), "float32"), training=False)
    expected = counted.macs
    assert count_macs(model) == expected > 0
    assert macs(keras.Input((4, 5, 6)), layer.expand()) == 4 * 5 * 9 * 6 * 12


def test_macs_of_a_separable_convolution():
    layer = BilinearSeparableConv2D(32, 3, 2, "same", implementation="factorized")
    assert macs(keras.Input((8, 8, 16)), layer) == 16 * (9 * 16 + layer.factorization.macs)
    assert macs(keras.Input((8, 8, 16)), layer.expand()) == 16 * (9 * 16 + 16 * 32)


@pytest.mark.parametrize("pattern", ["channel", "spatial"])
@pytest.mark.parametrize("order", FACTORIZED)
def test_macs_of_a_convolutional_lstm(order, pattern, counted):
    layer = BilinearConvLSTM2D(6, 3, 2, "same", rank=2, pattern=pattern, unroll=True)
    model = keras.Sequential([keras.Input((3, 6, 4, 5)), layer])
    for kernel in layer.kernels.values():
        kernel._order = order
    counted.macs = 0
    layer(np.zeros((1, 3, 6, 4, 5), "float32"), training=False)
    expected = counted.macs
    assert count_macs(model) == expected > 0
    assert macs(keras.Input((3, 6, 4, 5)), layer.expand()) == 3 * 6 * 9 * (5 + 6) * 4 * 6


def test_layers_without_a_projection_have_no_macs():
    assert (
        macs(
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(10, 6),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.ReLU(),
        )
        == 0
    )


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match=r"cannot be counted. Received: conv_lstm3d"):
        macs(keras.Input((4, 3, 3, 3, 2)), keras.layers.ConvLSTM3D(2, 3))
    with pytest.raises(ValueError, match=r"if its shape is known. Received: model="):
        macs(keras.Input((None, 3)), keras.layers.Dense(2))
