from keras_bilinear.layers.dense import BilinearDense
from keras_bilinear.layers.embedding import BilinearEmbedding

__all__ = ["BilinearDense", "BilinearEmbedding"]
