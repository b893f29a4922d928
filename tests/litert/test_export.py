import json
import subprocess

import keras
import model_kinds
import numpy as np
import pytest
from keras import layers, ops

from keras_bilinear import (
    BilinearConv1D,
    BilinearConv2D,
    BilinearConv3D,
    BilinearDense,
    BilinearEmbedding,
    BilinearGRU,
    BilinearLSTM,
    BilinearSimpleRNN,
    export_litert,
    exporting,
    rewrite_model,
)
from keras_bilinear.keras_private.graph import all_layers
from keras_bilinear.litert import converter
from keras_bilinear.litert import export as export_module
from keras_bilinear.litert.contents import inspect_litert
from keras_bilinear.litert.export import inference_twin
from keras_bilinear.litert.run import run_litert

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

RNG = np.random.default_rng(0)
on_tensorflow = pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="other backends export in a process with TensorFlow, which some tests show",
)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


@pytest.fixture
def exported(tmp_path):
    def export(model, *arguments, **options):
        path = tmp_path / "model.tflite"
        report = export_litert(model, path, *arguments, **options)
        assert [file.name for file in tmp_path.iterdir()] == ["model.tflite"]
        assert report.path == str(path)
        assert report.bytes == path.stat().st_size
        assert report.difference <= report.tolerance
        return report

    return export


@pytest.fixture
def refuses(tmp_path):
    """Exports what cannot be; nothing is made, and what was there stays."""

    def refuse(error, match, model, name="model.tflite", **options):
        (tmp_path / "model.tflite").write_bytes(b"older")
        with pytest.raises(error, match=match):
            export_litert(model, tmp_path / name, **options)
        assert (tmp_path / "model.tflite").read_bytes() == b"older"
        assert [file.name for file in tmp_path.iterdir()] == ["model.tflite"]

    return refuse


def test_a_file_answers_as_the_float64_kernel_does(exported):
    layer = BilinearDense(1024, rank=2)
    x = normal(3, 1024)
    report = exported(
        keras.Sequential([keras.Input((1024,), name="x"), layer]), representative_data=x
    )
    kernel = ops.convert_to_numpy(layer.kernel).astype("float64")
    (outputs,) = run_litert(report.path, {"x": x[:, None]}, seconds=0.0).outputs.values()
    np.testing.assert_allclose(outputs[:, 0], x @ kernel, rtol=1e-4, atol=1e-4)
    assert report.difference < 1e-6
    assert report.bytes < 22_000
    assert report.ops == {"RESHAPE": 3, "TRANSPOSE": 2, "FULLY_CONNECTED": 2}
    assert 4 * 2048 <= report.arena_bytes <= 4 * 6 * 1024
    assert report.latency_us > 0
    assert report.memory_bytes is None or 1e6 < report.memory_bytes < 2e8


@on_tensorflow
def test_a_report_is_a_table_and_json(exported):
    report = exported(keras.Sequential([keras.Input((8,)), BilinearDense(8)]))
    assert "FULLY_CONNECTED" in str(report)
    assert "<table>" in report._repr_html_()
    assert "same largest output" in str(report)
    assert json.loads(report.to_json())["bytes"] == report.bytes


@on_tensorflow
def test_a_masked_embedding_is_exported(exported):
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            BilinearEmbedding(1000, 30, mask_zero=True, rank=2),
            layers.GlobalAveragePooling1D(),
            BilinearDense(3),
        ]
    )
    tokens = RNG.integers(0, 1000, (8, 6))
    assert exported(model, representative_data=tokens).difference < 1e-5


@on_tensorflow
def test_an_integer_embedding_multiplies_without_offsets(exported):
    from ai_edge_litert.interpreter import Interpreter

    embedding = BilinearEmbedding(1000, 32, rank=4)
    model = keras.Sequential([keras.Input((6,), dtype="int32"), embedding])
    for variable in embedding.trainable_variables:  # no longer symmetric around zero
        variable.assign(np.abs(variable) + 0.01)
    tokens = RNG.integers(-1000, 1000, (64, 6))
    report = exported(model, "int8", representative_data=tokens)
    interpreter = Interpreter(report.path)
    interpreter.allocate_tensors()
    (product,) = (one for one in interpreter._get_ops_details() if one["op_name"] == "BATCH_MATMUL")
    details = {one["index"]: one for one in interpreter.get_tensor_details()}
    assert details[product["inputs"][1]]["quantization"][1] == 0
    assert report.difference < 0.02


@on_tensorflow
def test_convolutions_are_exported_as_their_factors(exported):
    materialized = BilinearConv2D(64, 3, rank=2, implementation="materialized")
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            BilinearConv2D(64, 3, padding="same"),
            materialized,
            BilinearConv2D(32, 3, 2, padding="same", pattern="spatial", activation="relu"),
            layers.Reshape((25, 32)),
            BilinearConv1D(16, 5, padding="causal", dilation_rate=2),
            BilinearConv1D(16, 3, groups=2),
            BilinearConv1D(20, 1),
            layers.GlobalAveragePooling1D(),
        ]
    )
    report = exported(model)
    assert report.difference < 1e-5
    assert 4 * model.count_params() < report.bytes < 4 * materialized.factorization.full_parameters


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("pattern", ["channel", "spatial"])
@on_tensorflow
def test_a_convolution_transposes_twice_in_a_file(exported, pattern, quantize):
    layer = BilinearConv2D(64, 3, padding="same", rank=2, pattern=pattern)
    model = keras.Sequential([keras.Input((12, 12, 32)), layer])
    report = exported(model, quantize, representative_data=normal(8, 12, 12, 32))
    assert report.ops["TRANSPOSE"] == 2
    assert "GATHER" not in report.ops


@on_tensorflow
def test_a_convolution_over_three_axes_is_exported(exported):
    model = keras.Sequential([keras.Input((4, 5, 6, 4)), BilinearConv3D(8, 3, padding="same")])
    assert exported(model).difference < 1e-5


def images(*filters):
    return keras.Sequential(
        [
            keras.Input((8, 8, 32)),
            *(BilinearConv2D(size, 3, padding="same", rank=2) for size in filters),
            layers.Flatten(),
            BilinearDense(128, rank=4),
        ]
    )


@on_tensorflow
def test_every_quantization_makes_smaller_files_of_whole_factors(exported):
    model, x = images(64, 64), normal(64, 8, 8, 32)
    sizes = {}
    for quantize in (None, "float16", "dynamic_int8", "int8"):
        report = exported(model, quantize=quantize, representative_data=x)
        assert (report.difference < 1e-5) == (quantize is None)
        # Each factor is a constant on the right of a built-in operation.
        assert report.ops["FULLY_CONNECTED"] == 4
        assert report.ops["CONV_2D"] == 2
        assert "BATCH_MATMUL" not in report.ops
        sizes[quantize] = report.bytes
    assert sizes["float16"] < 0.7 * sizes[None]
    assert sizes["dynamic_int8"] < sizes["float16"]
    assert sizes["int8"] < sizes["float16"]


@on_tensorflow
def test_integers_go_in_and_come_out_on_request(exported):
    model, x = images(32), normal(64, 8, 8, 32)
    converted = exported(model, quantize="int8", representative_data=x)
    integers = exported(model, quantize="int8", representative_data=x, quantize_io=True)
    assert {"QUANTIZE", "DEQUANTIZE"} <= converted.ops.keys()
    assert not {"QUANTIZE", "DEQUANTIZE"} & integers.ops.keys()


def recurrent(*layers, steps=6):
    return keras.Sequential([keras.Input((steps, 16)), *layers])


@on_tensorflow
@pytest.mark.parametrize("layer", [BilinearSimpleRNN, BilinearGRU, BilinearLSTM])
def test_recurrent_layers_are_a_loop_or_unrolled(exported, layer):
    model = recurrent(layer(32, rank=2, implementation="materialized"))
    loop = exported(model)
    assert loop.ops["WHILE"] == 1
    assert loop.difference < 1e-5
    unrolled = exported(model, unroll=True)
    assert "WHILE" not in unrolled.ops
    assert unrolled.difference < 1e-5
    assert loop.bytes < unrolled.bytes
    integers = exported(model, quantize="int8", representative_data=normal(50, 6, 16))
    assert "WHILE" not in integers.ops
    low_rank = exported(recurrent(layer(32, rank=2, output_factors=(1, 32))))
    assert low_rank.difference < 1e-5


@on_tensorflow
def test_masks_states_and_directions_of_recurrent_layers_are_exported(exported):
    model = keras.Sequential(
        [
            keras.Input((7,), dtype="int32"),
            BilinearEmbedding(50, 16, mask_zero=True),
            layers.Bidirectional(BilinearLSTM(12, return_sequences=True)),
            layers.TimeDistributed(BilinearDense(9)),
            BilinearGRU(16, reset_after=False, go_backwards=True),
        ]
    )
    tokens = RNG.integers(1, 50, (8, 7))
    tokens[:4, 3:] = 0
    assert exported(model, representative_data=tokens).difference < 1e-5


@on_tensorflow
def test_an_unknown_number_of_steps_can_be_given(exported, refuses):
    assert (
        exported(recurrent(BilinearLSTM(8), steps=None), input_shapes=(1, 5, 16)).difference < 1e-5
    )
    model = recurrent(layers.LSTM(8), steps=None)
    assert exported(model, input_shapes=(2, 5, 16)).difference < 1e-5
    refuses(ValueError, r"`input_shapes` must say the sizes of .*None", model)


@on_tensorflow
def test_any_names_of_inputs_and_outputs_are_exported(exported):
    names = ("file", "self", "a-b", "a_b", "größe x", "1st", "class")
    inputs = [keras.Input((8,), name=name) for name in names]
    hidden = layers.concatenate(inputs)
    # In a dictionary, output 10 comes before output 2.
    outputs = {
        f"output_{i}": BilinearDense(4, bias_initializer=keras.initializers.Constant(i))(hidden)
        for i in range(1, 12)
    }
    assert exported(keras.Model(inputs, outputs)).difference < 1e-5
    outputs = {"größe x-1": outputs["output_1"], "a": outputs["output_2"]}
    assert exported(keras.Model(inputs, outputs)).difference < 1e-5
    nested = {"pair": [*outputs.values()], "one": outputs["a"]}
    assert exported(keras.Model(inputs, nested)).difference < 1e-5


@on_tensorflow
def test_loops_of_an_unknown_number_of_steps_are_not_unrolled(refuses):
    model = recurrent(layers.LSTM(8), steps=None)
    refuses(ValueError, "Cannot unroll a RNN", model, input_shapes=(2, 5, 16), unroll=True)


@pytest.mark.parametrize("kind", ["two_inputs", "attention", "subclassed"])
def test_rewritten_models_of_other_kinds_are_exported(exported, kind):
    model, inputs = getattr(model_kinds, kind)()
    small = rewrite_model(model, rank=1)
    report = exported(small, representative_data=inputs)
    assert report.difference < 1e-5


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_a_mixed_precision_model_is_exported_in_float32(exported, dtype):
    inner = keras.Sequential([keras.Input((20,)), BilinearDense(12, dtype=dtype)])
    model = keras.Sequential([keras.Input((20,)), inner, layers.Dense(4, dtype=dtype)])
    x = normal(8, 20)
    hidden = x @ ops.convert_to_numpy(inner.layers[0].kernel)
    expected = hidden @ model.get_weights()[-2]  # all biases are zero
    twin = inference_twin(model)
    np.testing.assert_allclose(twin.predict(x, verbose=0), expected, atol=1e-4)
    if keras.config.backend() == "tensorflow":
        assert exported(model, representative_data=x).difference < 1e-5


def test_a_float32_model_is_its_own_twin():
    model = keras.Sequential([keras.Input((4,)), BilinearDense(4), BilinearDense(4)])
    assert inference_twin(model) is model
    assert inference_twin(model, unroll=True) is model


def test_a_twin_made_on_a_gpu_does_without_cudnn(monkeypatch):
    x = normal(4, 5, 6)
    wrapped = layers.Bidirectional(layers.LSTM(8, return_sequences=True))
    model = keras.Sequential([keras.Input((5, 6)), wrapped, BilinearGRU(8)])
    expected = model.predict(x, verbose=0)
    monkeypatch.setattr(export_module, "on_gpu", lambda: True)
    twin = inference_twin(model)
    recurrent = [layer for layer in all_layers(twin) if hasattr(layer, "use_cudnn")]
    assert len(recurrent) == 3
    assert not any(layer.use_cudnn for layer in recurrent)
    np.testing.assert_allclose(twin.predict(x, verbose=0), expected, atol=1e-6)
    no_loop = keras.Sequential([keras.Input((4,)), BilinearDense(4)])
    assert inference_twin(no_loop) is no_loop


@pytest.mark.parametrize("layer", [BilinearDense, BilinearGRU])
def test_while_a_model_is_exported_factors_are_applied_where_they_are_smaller(layer):
    small = layer(64, rank=2, implementation="materialized")
    large = layer(64, rank=60, implementation="factorized")
    for one, smaller in ((small, True), (large, False)):
        one(normal(2, 3, 64)[:, 0] if layer is BilinearDense else normal(2, 3, 64))
        kernel = one.cell._recurrent_kernel if layer is BilinearGRU else one._kernel
        assert kernel.materialized == smaller
        with exporting():
            assert kernel.materialized != smaller
        assert kernel.materialized == smaller


@pytest.mark.parametrize("export_format", ["tf_saved_model", "onnx"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (BilinearDense(256, rank=2, implementation="materialized"), (256,)),
        (BilinearConv2D(64, 3, padding="same", implementation="materialized"), (8, 8, 64)),
        (BilinearGRU(64, implementation="materialized"), (5, 64)),
        (BilinearLSTM(64, implementation="materialized"), (5, 64)),
    ],
    ids=["dense", "conv", "gru", "lstm"],
)
@on_tensorflow
def test_saved_models_and_onnx_files_hold_factors(tmp_path, layer, shape, export_format):
    model = keras.Sequential([keras.Input(shape, name="x"), layer])
    x = normal(4, *shape)
    expected = ops.convert_to_numpy(model(x))
    path = tmp_path / "model.onnx"
    with exporting():
        model.export(path, format=export_format, verbose=False)
    if export_format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        (outputs,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
        stored = path.stat().st_size
    else:
        import tensorflow as tf

        serve = tf.saved_model.load(path).signatures["serving_default"]
        (outputs,) = serve(x=tf.constant(x)).values()
        stored = (path / "variables/variables.data-00000-of-00001").stat().st_size
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    full = sum(kernel.factorization.full_parameters for kernel in kernels(layer))
    assert stored < 0.5 * 4 * full


@pytest.mark.parametrize("bilinear", [BilinearSimpleRNN, BilinearGRU, BilinearLSTM])
@pytest.mark.skipif(
    keras.config.backend() != "torch", reason="TensorFlow's are above, and JAX writes no ONNX"
)
def test_onnx_files_of_recurrent_layers_on_pytorch(tmp_path, bilinear):
    onnxruntime = pytest.importorskip("onnxruntime")
    both = layers.Bidirectional(bilinear(8, rank=2, return_sequences=True))
    model = keras.Sequential([keras.Input((5, 6), name="x"), both, bilinear(8)])
    x = normal(3, 5, 6)
    expected = ops.convert_to_numpy(model(x))
    path = tmp_path / "model.onnx"
    with exporting():
        model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    keras.config.backend() != "jax", reason="other backends have no symbols for sizes"
)
def test_recurrent_layers_are_exported_by_jax_for_any_batch():
    import jax

    model = keras.Sequential([keras.Input((5, 6)), BilinearLSTM(8)])
    states = [
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 5, 6"), "float32")
    call = jax.jit(lambda x: model.stateless_call(*states, x)[0])
    x = normal(3, 5, 6)
    outputs = jax.export.export(call)(shape).call(x)
    np.testing.assert_allclose(outputs, model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", ["channel", "spatial"])
@on_tensorflow
def test_onnx_files_take_images_of_any_size(tmp_path, pattern):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = BilinearConv2D(10, 3, padding="same", rank=2, pattern=pattern)
    model = keras.Sequential([keras.Input((None, None, 6), name="x"), layer])
    images = normal(1, 7, 4, 6), normal(3, 5, 6, 6)
    expected = [model(x) for x in images]
    path = tmp_path / "model.onnx"
    with exporting():
        model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    for x, y in zip(images, expected, strict=True):
        np.testing.assert_allclose(session.run(None, {"x": x})[0], y, rtol=1e-4, atol=1e-5)


def kernels(layer):
    return layer.kernels.values()


@on_tensorflow
def test_what_is_no_built_in_operation_is_refused_with_its_layer(refuses):
    class Determinant(keras.layers.Layer):
        def call(self, x):
            return ops.det(x)

    model = keras.Sequential([keras.Input((3, 3)), Determinant(name="volume")])
    refuses(ValueError, r"built-in .* layer 'volume' \(Determinant\): 'tf\.\w+' op", model)


@on_tensorflow
def test_a_file_that_differs_too_much_is_not_kept(refuses):
    model, x = images(16), normal(8, 8, 8, 32)
    options = {"quantize": "int8", "representative_data": x, "tolerance": 1e-6}
    refuses(ValueError, r"differ from the model's by .*tolerance=1e-06", model, **options)


@on_tensorflow
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quantize": "int4"}, r"must be one of .* Received: quantize='int4'"),
        ({"quantize": "int8"}, "needs `representative_data`"),
        ({"quantize_io": True}, "`quantize_io` needs `quantize='int8'`"),
        (
            {"quantize": "int8", "representative_data": np.ones((9, 6, 16)), "unroll": False},
            "no integer loops",
        ),
        ({"representative_data": np.ones((9, 6, 17))}, r"must fit the input .* \(9, 6, 17\)"),
        ({"representative_data": "x"}, "`representative_data` must be an array"),
        ({"input_shapes": (1, 6, 17)}, r"must fit the input .* Received: shape=\(1, 6, 17\)"),
        ({"input_shapes": [(1, 6, 16)] * 2}, "a shape for each of the 1 inputs"),
        ({"input_shapes": {"y": (1, 6, 16)}}, "by the names of inputs"),
        ({"name": "model.bin"}, r"must end with \.tflite"),
        ({"tolerance": float("nan")}, "not negative. Received: tolerance=nan"),
        ({"tolerance": "1%"}, "`tolerance` must be"),
    ],
)
def test_arguments_that_are_not_valid_are_refused_before_work_starts(
    refuses, options, match, monkeypatch
):
    model = recurrent(BilinearGRU(8))
    monkeypatch.setattr("keras_bilinear.litert.export.inference_twin", None)
    refuses((ValueError, TypeError), match, model, **options)


@on_tensorflow
def test_an_unbuilt_model_and_a_missing_folder_are_refused(refuses):
    refuses(ValueError, "must be a built Keras model", keras.Sequential([BilinearDense(8)]))
    model = keras.Sequential([keras.Input((4,)), BilinearDense(8)])
    refuses(OSError, "no writable folder", model, name="missing/model.tflite")


@on_tensorflow
def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "model.tflite").mkdir()
    model = keras.Sequential([keras.Input((4,)), BilinearDense(8)])
    with pytest.raises(OSError, match="it is a folder"):
        export_litert(model, tmp_path / "model.tflite")


@on_tensorflow
def test_missing_packages_are_named(refuses, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = keras.Sequential([keras.Input((4,)), BilinearDense(8)])
    refuses(ImportError, "needs tensorflow: run `pip install tensorflow`", model)


@on_tensorflow
def test_a_file_that_is_none_cannot_be_run(tmp_path):
    path = tmp_path / "broken.tflite"
    path.write_bytes(b"not a model")
    with pytest.raises(RuntimeError, match=r"cannot run 'broken\.tflite'"):
        run_litert(path, {"x": np.ones((1, 1, 4))})


@on_tensorflow
def test_the_arena_is_what_lives_at_once(exported):
    inputs = keras.Input((100,))
    hidden = layers.Dense(300)(inputs)
    model = keras.Model(inputs, layers.Dense(50)(hidden))
    report = exported(model)
    assert inspect_litert(report.path)["arena_bytes"] == report.arena_bytes == 4 * 400


def test_states_and_texts_are_refused(refuses):
    gru = layers.GRU(4, stateful=True)
    model = keras.Sequential([keras.Input((5, 4), batch_size=1), gru])
    refuses(ValueError, "keeps no states", model)
    if keras.config.backend() == "tensorflow":
        words = layers.TextVectorization(vocabulary=["good", "bad"], output_sequence_length=2)
        model = keras.Sequential([keras.Input((1,), dtype="string"), words])
        refuses(ValueError, "take numbers.*strings", model)


class Own(layers.Dense):
    """A class that is not registered."""


@on_tensorflow
def test_the_process_with_tensorflow_finds_the_classes_of_the_user(monkeypatch, tmp_path):
    known = keras.saving.get_custom_objects()
    monkeypatch.setitem(known, "Own", Own)
    model = keras.Sequential([keras.Input((4,)), Own(8)])

    def run(command, **_):
        monkeypatch.delitem(known, "Own")
        *_, source, file, inputs, order = command
        converter._main(source, file, inputs, order)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    path, options = tmp_path / "model.tflite", {"quantize": None, "quantize_io": False}
    specs = [keras.KerasTensor((1, 4))]
    converter._convert_in_subprocess(model, path, specs, {"input_1": normal(1, 1, 4)}, options)
    assert known["Own"] is Own
    assert inspect_litert(path)["ops"] == {"FULLY_CONNECTED": 1}
