from keras_bilinear.layers.base import BilinearLayer
from keras_bilinear.layers.conv import BilinearConv1D, BilinearConv2D, BilinearConv3D
from keras_bilinear.layers.conv_lstm import BilinearConvLSTM1D, BilinearConvLSTM2D
from keras_bilinear.layers.conv_transpose import (
    BilinearConv1DTranspose,
    BilinearConv2DTranspose,
    BilinearConv3DTranspose,
)
from keras_bilinear.layers.converter import Converter, register
from keras_bilinear.layers.dense import BilinearDense
from keras_bilinear.layers.einsum_dense import BilinearEinsumDense
from keras_bilinear.layers.embedding import BilinearEmbedding
from keras_bilinear.layers.gru import BilinearGRU, BilinearGRUCell
from keras_bilinear.layers.lstm import BilinearLSTM, BilinearLSTMCell
from keras_bilinear.layers.reversible_embedding import BilinearReversibleEmbedding
from keras_bilinear.layers.separable_conv import BilinearSeparableConv1D, BilinearSeparableConv2D
from keras_bilinear.layers.simple_rnn import BilinearSimpleRNN, BilinearSimpleRNNCell

__all__ = [
    "BilinearConv1D",
    "BilinearConv1DTranspose",
    "BilinearConv2D",
    "BilinearConv2DTranspose",
    "BilinearConv3D",
    "BilinearConv3DTranspose",
    "BilinearConvLSTM1D",
    "BilinearConvLSTM2D",
    "BilinearDense",
    "BilinearEinsumDense",
    "BilinearEmbedding",
    "BilinearGRU",
    "BilinearGRUCell",
    "BilinearLSTM",
    "BilinearLSTMCell",
    "BilinearLayer",
    "BilinearReversibleEmbedding",
    "BilinearSeparableConv1D",
    "BilinearSeparableConv2D",
    "BilinearSimpleRNN",
    "BilinearSimpleRNNCell",
    "Converter",
    "register",
]
