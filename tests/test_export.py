import keras
import numpy as np
import pytest

from keras_bilinear import BilinearDense, BilinearEmbedding
from keras_bilinear.export import export_litert, float32_twin, measure_litert

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


def test_a_mixed_precision_model_is_exported_in_float32(exported):
    dtype = "mixed_bfloat16"
    inner = keras.Sequential([keras.Input((20,)), BilinearDense(12, dtype=dtype)])
    model = keras.Sequential([keras.Input((20,)), inner, keras.layers.Dense(4, dtype=dtype)])
    inputs = np.random.default_rng(0).normal(size=(8, 20)).astype("float32")
    assert exported(model, inputs).difference < 1e-5
    hidden = inputs @ keras.ops.convert_to_numpy(inner.layers[0].kernel)
    expected = hidden @ model.get_weights()[-2]  # all biases are zero
    np.testing.assert_allclose(float32_twin(model).predict(inputs, verbose=0), expected, atol=1e-4)


def test_a_float32_model_is_its_own_twin():
    model = keras.Sequential([keras.Input((4,)), BilinearDense(4)])
    assert float32_twin(model) is model


def test_an_export_that_needs_more_than_builtin_operations_fails_and_leaves_the_file(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"older")
    model = keras.Sequential([keras.Input((8, 4)), keras.layers.LSTM(2)])
    with pytest.raises(ValueError, match=r"^The model cannot be exported .* only: .*tf\.\w+.*"):
        export_litert(model, path)
    assert path.read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 1
