"""Keras layers that store a bilinear projection instead of a full one."""

from keras_bilinear.layers import BilinearDense, BilinearEmbedding
from keras_bilinear.version import __version__

__all__ = ["BilinearDense", "BilinearEmbedding", "__version__"]
