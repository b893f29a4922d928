import keras
import numpy as np
import pytest
from layer_checks import LayerChecks, LayerSpec

from keras_bilinear import (
    BilinearConv1D,
    BilinearConv1DTranspose,
    BilinearConv2D,
    BilinearConv2DTranspose,
    BilinearConv3D,
    BilinearConv3DTranspose,
    BilinearDense,
    BilinearEinsumDense,
    BilinearEmbedding,
    BilinearReversibleEmbedding,
    BilinearSeparableConv1D,
    BilinearSeparableConv2D,
)

random = np.random.default_rng(0)

SHARED = {
    "rank": 2,
    "implementation": "materialized",
    "name": "bilinear",
    "trainable": False,
    "dtype": "mixed_bfloat16",
    "activity_regularizer": keras.regularizers.L2(0.2),
}

KERNEL_AND_BIAS = {
    "activation": "relu",
    "use_bias": False,
    "kernel_initializer": keras.initializers.HeNormal(seed=3),
    "bias_initializer": keras.initializers.Ones(),
    "kernel_regularizer": keras.regularizers.L2(0.1),
    "bias_regularizer": keras.regularizers.L1(0.1),
    "kernel_constraint": keras.constraints.MaxNorm(2.0),
    "bias_constraint": keras.constraints.NonNeg(),
}


def conv_spec(layer_class, dimensions):
    sizes = (6, 5, 4)[:dimensions], (5, 4, 5)[:dimensions]
    return LayerSpec(
        layer_class,
        arguments={"filters": 10, "kernel_size": 3, "implementation": "factorized"},
        every_argument={
            **SHARED,
            **KERNEL_AND_BIAS,
            "filters": 8,
            "kernel_size": (3, 2, 2)[:dimensions],
            "strides": (2,) * dimensions,
            "padding": "same",
            "data_format": "channels_last",
            "dilation_rate": 1,
            "groups": 2,
            "input_factors": (2, 3),
            "output_factors": (2, 2),
            "pattern": "spatial",
        },
        inputs=tuple(random.normal(size=(3, *size, 12)).astype("float32") for size in sizes),
        # Strides and dilation exclude each other.
        at_default=("dilation_rate",),
    )


def conv_transpose_spec(layer_class, dimensions):
    sizes = (4, 3, 3)[:dimensions], (3, 4, 2)[:dimensions]
    return LayerSpec(
        layer_class,
        arguments={"filters": 10, "kernel_size": 3, "implementation": "factorized"},
        every_argument={
            **SHARED,
            **KERNEL_AND_BIAS,
            "filters": 8,
            "kernel_size": (3, 2, 2)[:dimensions],
            "strides": (2,) * dimensions,
            "padding": "same",
            "output_padding": (1,) * dimensions,
            "data_format": "channels_last",
            "dilation_rate": 1,
            "input_factors": (4, 3),
            "output_factors": (2, 4),
            "pattern": "spatial",
        },
        inputs=tuple(random.normal(size=(3, *size, 12)).astype("float32") for size in sizes),
        # Strides and dilation exclude each other.
        at_default=("dilation_rate",),
    )


def separable_conv_spec(layer_class, dimensions):
    sizes = (6, 5)[:dimensions], (5, 4)[:dimensions]
    of_both = {
        key.replace("kernel", kernel): value
        for key, value in KERNEL_AND_BIAS.items()
        for kernel in ("depthwise", "pointwise")
    }
    return LayerSpec(
        layer_class,
        arguments={"filters": 10, "kernel_size": 3, "implementation": "factorized"},
        every_argument={
            **SHARED,
            **of_both,
            "filters": 8,
            "kernel_size": (3, 2)[:dimensions],
            "strides": (2,) * dimensions,
            "padding": "same",
            "data_format": "channels_last",
            "dilation_rate": 1,
            "depth_multiplier": 2,
            "input_factors": (6, 4),
            "output_factors": (2, 4),
        },
        inputs=tuple(random.normal(size=(3, *size, 12)).astype("float32") for size in sizes),
        # Not every backend has both strides and dilation.
        at_default=("dilation_rate",),
    )


SPECS = {
    "dense": LayerSpec(
        BilinearDense,
        arguments={"units": 10},
        every_argument={
            **SHARED,
            **KERNEL_AND_BIAS,
            "units": 10,
            "input_factors": (4, 3),
            "output_factors": (5, 2),
        },
        inputs=tuple(
            random.normal(size=(*leading, 12)).astype("float32")
            for leading in ((4,), (4, 3), (2, 3, 5))
        ),
    ),
    "einsum_dense": LayerSpec(
        BilinearEinsumDense,
        arguments={"equation": "abc,cd->abd", "output_shape": (None, 10)},
        every_argument={
            **SHARED,
            **{key: KERNEL_AND_BIAS[key] for key in KERNEL_AND_BIAS if key != "use_bias"},
            "equation": "abc,cde->abde",
            "output_shape": (None, 5, 2),
            "bias_axes": "de",
            "input_factors": (4, 3),
            "output_factors": (5, 2),
        },
        inputs=tuple(
            random.normal(size=(*leading, 12)).astype("float32") for leading in ((4, 3), (2, 5))
        ),
    ),
    "embedding": LayerSpec(
        BilinearEmbedding,
        arguments={"input_dim": 50, "output_dim": 10},
        every_argument={
            **SHARED,
            "input_dim": 50,
            "output_dim": 10,
            "embeddings_initializer": keras.initializers.RandomNormal(seed=3),
            "embeddings_regularizer": keras.regularizers.L2(0.1),
            "embeddings_constraint": keras.constraints.MaxNorm(2.0),
            "mask_zero": True,
            "weights": random.normal(size=(50, 10)),
            "input_factors": (10, 5),
            "output_factors": (5, 2),
        },
        inputs=tuple(
            random.integers(50, size=shape).astype("int32") for shape in ((4,), (4, 6), (2, 3, 5))
        ),
        not_in_config=("weights",),
    ),
    "reversible_embedding": LayerSpec(
        BilinearReversibleEmbedding,
        arguments={"input_dim": 50, "output_dim": 10},
        every_argument={
            **SHARED,
            "input_dim": 50,
            "output_dim": 10,
            "tie_weights": False,
            "embeddings_initializer": keras.initializers.RandomNormal(seed=3),
            "embeddings_regularizer": keras.regularizers.L2(0.1),
            "embeddings_constraint": keras.constraints.MaxNorm(2.0),
            "mask_zero": True,
            "reverse_dtype": "float32",
            "logit_soft_cap": 3.0,
            "input_factors": (10, 5),
            "output_factors": (5, 2),
        },
        inputs=tuple(
            random.integers(50, size=shape).astype("int32") for shape in ((4,), (4, 6), (2, 3, 5))
        ),
    ),
    "conv1d": conv_spec(BilinearConv1D, 1),
    "conv2d": conv_spec(BilinearConv2D, 2),
    "conv3d": conv_spec(BilinearConv3D, 3),
    "conv2d_transpose": conv_transpose_spec(BilinearConv2DTranspose, 2),
    "separable_conv2d": separable_conv_spec(BilinearSeparableConv2D, 2),
}
# They have the code of the layers of two dimensions, and are saved and loaded only.
OTHER_DIMENSIONS = {
    "conv1d_transpose": conv_transpose_spec(BilinearConv1DTranspose, 1),
    "conv3d_transpose": conv_transpose_spec(BilinearConv3DTranspose, 3),
    "separable_conv1d": separable_conv_spec(BilinearSeparableConv1D, 1),
}


@pytest.fixture(params=SPECS)
def spec(request):
    return SPECS[request.param]


@pytest.fixture
def specs():
    return {**SPECS, **OTHER_DIMENSIONS}


class TestEveryLayer(LayerChecks):
    pass
