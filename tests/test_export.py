import keras
import numpy as np
import pytest

from keras_bilinear import (
    BilinearConv1D,
    BilinearConv2D,
    BilinearDense,
    BilinearEmbedding,
    BilinearGRU,
)
from keras_bilinear.export import export_litert, inference_twin, measure_litert

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")


@pytest.fixture
def exported(tmp_path):
    def export(model, inputs):
        path = tmp_path / "model.tflite"
        export_litert(model, path)
        assert [file.name for file in tmp_path.iterdir()] == ["model.tflite"]
        return measure_litert(path, model, inputs)

    return export


def test_a_square_rank_1_layer_is_exported_factorized(exported):
    model = keras.Sequential([keras.Input((1024,)), BilinearDense(1024)])
    measured = exported(model, np.random.default_rng(0).normal(size=(8, 1024)).astype("float32"))
    assert measured.bytes < 25_000
    assert measured.difference < 1e-5
    assert 0 < measured.latency_us < 1e5


def test_a_masked_embedding_is_exported_with_builtin_operations(exported):
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            BilinearEmbedding(1000, 30, mask_zero=True, rank=2),
            keras.layers.GlobalAveragePooling1D(),
            BilinearDense(3),
        ]
    )
    measured = exported(model, np.random.default_rng(0).integers(0, 1000, (8, 6)))
    assert measured.difference < 1e-5


def test_convolutions_are_exported_as_their_factors(exported):
    bilinear = BilinearConv2D(64, 3, rank=2, implementation="materialized")
    spatial = BilinearConv2D(32, 3, 2, padding="same", pattern="spatial", activation="relu")
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            BilinearConv2D(64, 3, padding="same"),
            bilinear,
            spatial,
            keras.layers.Reshape((25, 32)),
            BilinearConv1D(16, 5, padding="causal", dilation_rate=2, implementation="factorized"),
            BilinearConv1D(16, 3, groups=2, implementation="factorized"),
            keras.layers.GlobalAveragePooling1D(),
        ]
    )
    inputs = np.random.default_rng(0).normal(size=(4, 12, 12, 3)).astype("float32")
    measured = exported(model, inputs)
    assert measured.difference < 1e-5
    assert 4 * model.count_params() < measured.bytes < 4 * bilinear.factorization.full_parameters


def test_a_mixed_precision_model_is_exported_in_float32(exported):
    dtype = "mixed_bfloat16"
    inner = keras.Sequential([keras.Input((20,)), BilinearDense(12, dtype=dtype)])
    model = keras.Sequential([keras.Input((20,)), inner, keras.layers.Dense(4, dtype=dtype)])
    inputs = np.random.default_rng(0).normal(size=(8, 20)).astype("float32")
    assert exported(model, inputs).difference < 1e-5
    hidden = inputs @ keras.ops.convert_to_numpy(inner.layers[0].kernel)
    expected = hidden @ model.get_weights()[-2]  # all biases are zero
    np.testing.assert_allclose(
        inference_twin(model).predict(inputs, verbose=0), expected, atol=1e-4
    )


def test_a_float32_model_is_its_own_twin():
    model = keras.Sequential([keras.Input((4,)), BilinearDense(4)])
    assert inference_twin(model) is model


def test_a_materialized_layer_has_a_factorized_twin_where_that_is_smaller():
    small = BilinearDense(64, implementation="materialized", name="small")
    large = BilinearDense(64, rank=60, implementation="materialized", name="large")
    model = keras.Sequential([keras.Input((64,)), small, large])
    twin = inference_twin(model)
    implementations = [layer.implementation for layer in twin.layers]
    assert implementations == ["factorized", "materialized"]
    x = np.random.default_rng(0).normal(size=(8, 64)).astype("float32")
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(twin.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-4)


def test_a_materialized_recurrent_layer_has_a_factorized_twin():
    layer = BilinearGRU(64, rank=2, implementation="materialized", unroll=True)
    model = keras.Sequential([keras.Input((3, 16)), layer])
    twin = inference_twin(model)
    assert twin.layers[0].cell.implementation == "factorized"
    x = np.random.default_rng(0).normal(size=(8, 3, 16)).astype("float32")
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(twin.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)


def test_an_export_that_needs_more_than_builtin_operations_fails_and_leaves_the_file(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"older")
    model = keras.Sequential([keras.Input((8, 4)), keras.layers.LSTM(2)])
    with pytest.raises(ValueError, match=r"^The model cannot be exported .* only: .*tf\.\w+.*"):
        export_litert(model, path)
    assert path.read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 1
