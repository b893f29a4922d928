"""Keras layers that store a bilinear projection instead of a full one."""

from keras_bilinear.kronecker.target import exporting
from keras_bilinear.layers import (
    BilinearConv1D,
    BilinearConv1DTranspose,
    BilinearConv2D,
    BilinearConv2DTranspose,
    BilinearConv3D,
    BilinearConv3DTranspose,
    BilinearConvLSTM1D,
    BilinearConvLSTM2D,
    BilinearDense,
    BilinearEinsumDense,
    BilinearEmbedding,
    BilinearGRU,
    BilinearGRUCell,
    BilinearLayer,
    BilinearLSTM,
    BilinearLSTMCell,
    BilinearReversibleEmbedding,
    BilinearSeparableConv1D,
    BilinearSeparableConv2D,
    BilinearSimpleRNN,
    BilinearSimpleRNNCell,
    Converter,
    register,
)
from keras_bilinear.litert.export import export_litert
from keras_bilinear.reports.summary import compare, summarize
from keras_bilinear.rewriting.callback import BilinearRewrite
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.planner import plan_rewrite
from keras_bilinear.rewriting.rewrite import Rewriter, expand_model, rewrite_model
from keras_bilinear.version import __version__

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
    "BilinearRewrite",
    "BilinearSeparableConv1D",
    "BilinearSeparableConv2D",
    "BilinearSimpleRNN",
    "BilinearSimpleRNNCell",
    "Converter",
    "RewritePlan",
    "Rewriter",
    "__version__",
    "compare",
    "expand_model",
    "export_litert",
    "exporting",
    "plan_rewrite",
    "register",
    "rewrite_model",
    "summarize",
]


def __dir__() -> list[str]:
    return __all__
