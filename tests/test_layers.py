import keras
import numpy as np
import pytest
from layer_checks import LayerChecks, LayerSpec

from keras_bilinear import BilinearDense, BilinearEmbedding

random = np.random.default_rng(0)

SHARED = {
    "rank": 2,
    "implementation": "materialized",
    "name": "bilinear",
    "trainable": False,
    "dtype": "mixed_bfloat16",
    "activity_regularizer": keras.regularizers.L2(0.2),
}

SPECS = {
    "dense": LayerSpec(
        BilinearDense,
        arguments={"units": 10},
        every_argument={
            **SHARED,
            "units": 10,
            "activation": "relu",
            "use_bias": False,
            "kernel_initializer": keras.initializers.HeNormal(seed=3),
            "bias_initializer": keras.initializers.Ones(),
            "kernel_regularizer": keras.regularizers.L2(0.1),
            "bias_regularizer": keras.regularizers.L1(0.1),
            "kernel_constraint": keras.constraints.MaxNorm(2.0),
            "bias_constraint": keras.constraints.NonNeg(),
            "input_factors": (4, 3),
            "output_factors": (5, 2),
        },
        inputs=tuple(
            random.normal(size=(*leading, 12)).astype("float32")
            for leading in ((4,), (4, 3), (2, 3, 5))
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
}


@pytest.fixture(params=SPECS)
def spec(request):
    return SPECS[request.param]


@pytest.fixture
def specs():
    return SPECS


class TestEveryLayer(LayerChecks):
    pass
