from keras_bilinear.layers.conv import BilinearConv1D, BilinearConv2D, BilinearConv3D
from keras_bilinear.layers.dense import BilinearDense
from keras_bilinear.layers.embedding import BilinearEmbedding

__all__ = [
    "BilinearConv1D",
    "BilinearConv2D",
    "BilinearConv3D",
    "BilinearDense",
    "BilinearEmbedding",
]
