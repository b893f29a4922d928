"""Keras layers that store a bilinear projection instead of a full one."""

import sys

from keras_bilinear.version import __version__


def _is_command_line() -> bool:
    """Whether the command line starts; it needs no Keras for its help, and loads the rest later."""
    console_script = getattr(sys.modules.get("keras_bilinear_cli"), "starting", False)
    # While Python looks for the module of `python -m MODULE`, `-m` stands in place of its file.
    python_m = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in (
        __name__,
        f"-m{__name__}",
    )
    return console_script or python_m


if not _is_command_line():
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
    from keras_bilinear.litert.tradeoff import tradeoff
    from keras_bilinear.reports.summary import compare, summarize
    from keras_bilinear.rewriting.callback import BilinearRewrite
    from keras_bilinear.rewriting.plan import RewritePlan
    from keras_bilinear.rewriting.planner import plan_rewrite
    from keras_bilinear.rewriting.recovery import recover
    from keras_bilinear.rewriting.rewrite import Rewriter, expand_model, rewrite_model
    from keras_bilinear.rewriting.smallest import smallest_plan

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
    "recover",
    "register",
    "rewrite_model",
    "smallest_plan",
    "summarize",
    "tradeoff",
]


def __dir__() -> list[str]:
    return __all__
