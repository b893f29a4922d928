import functools
import json

import keras
import model_kinds
import numpy as np
import pytest
from keras import layers, ops

from keras_bilinear import (
    BilinearConv2D,
    BilinearDense,
    BilinearEinsumDense,
    BilinearGRU,
    BilinearGRUCell,
    BilinearLSTM,
    BilinearSeparableConv2D,
    BilinearSimpleRNN,
    compare,
    rewrite_model,
    summarize,
)
from keras_bilinear.kronecker.factorization import Order
from keras_bilinear.reports import summary, timing


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    short = functools.partial(timing.median_seconds, rounds=1, burst=0.0)
    monkeypatch.setattr(summary, "median_seconds", short)


def network(*more):
    return keras.Sequential([keras.Input((64,)), *more], name="network")


@pytest.mark.parametrize("make", model_kinds.KINDS)
def test_every_kind_of_model_is_summarized(make):
    model, x = make()
    costs = summarize(model, x)
    assert costs.parameters == model.count_params()
    if make is not model_kinds.tied:  # where a layer that holds another has weights of its own
        assert sum(layer.parameters for layer in costs.layers) == model.count_params()
    assert costs.bytes == 4 * costs.parameters
    assert costs.latency_ms > 0
    assert costs.not_counted == ()
    assert costs.accuracy is None
    assert costs.peak_activation_bytes >= max(one.activation_bytes for one in costs.layers)
    if make in (model_kinds.subclassed, model_kinds.tied):
        assert summarize(model).macs is None
    else:
        assert summarize(model).macs == costs.macs


def test_a_layer_costs_what_it_holds_and_does():
    first, last = summarize(network(layers.Dense(32, name="a"), layers.Dense(10))).layers
    assert (first.path, first.type) == ("a", "Dense")
    assert (first.parameters, first.bytes, first.macs) == (64 * 32 + 32, 4 * 2080, 64 * 32)
    assert first.activation_bytes == 4 * (64 + 32)
    assert last.macs == 320


def test_a_shared_layer_is_stored_once_and_computed_twice():
    inputs = keras.Input((8,))
    shared = layers.Dense(8)
    (layer,) = summarize(keras.Model(inputs, shared(shared(inputs)))).layers
    assert (layer.parameters, layer.macs) == (72, 128)


def test_what_lies_between_both_factors_counts():
    dense = BilinearDense(64, rank=3, implementation="factorized", use_bias=False)
    (layer,) = summarize(network(dense)).layers
    assert layer.activation_bytes == 4 * (64 + 3 * 64 + 64)
    dense = BilinearDense(64, implementation="materialized", use_bias=False)
    (layer,) = summarize(network(dense)).layers
    assert layer.activation_bytes == 4 * (64 + 64)

    options = {"padding": "same", "implementation": "factorized", "input_factors": (4, 4)}
    conv = BilinearConv2D(16, 3, output_factors=(2, 8), rank=2, strides=2, **options)
    model = keras.Sequential([keras.Input((6, 6, 16)), conv])
    # The left factor comes first, at every position: only the right one has a window.
    left_first = conv._kernel.order is Order.LEFT_FIRST
    between = 36 * 2 * 2 * 4 if left_first else 9 * 2 * 4 * 8
    (layer,) = summarize(model).layers
    assert layer.activation_bytes == 4 * (36 * 16 + between + 9 * 16)


STEPS, FEATURES, UNITS = 8, 52, 64


@pytest.mark.parametrize("bilinear", [BilinearSimpleRNN, BilinearGRU, BilinearLSTM])
def test_activations_of_recurrent_layers_are_counted_in_one_way(bilinear):
    def activations(layer):
        (costs,) = summarize(keras.Sequential([keras.Input((STEPS, FEATURES)), layer])).layers
        return costs.activation_bytes // 4

    ends = STEPS * FEATURES + UNITS
    assert activations(bilinear.full_class(UNITS)) == ends
    assert activations(bilinear(UNITS, implementation="materialized")) == ends
    layer = bilinear(UNITS, implementation="factorized", rank=2)
    found = activations(layer)
    # The inputs of all steps are projected before the loop, or those of each step in it.
    rows = 1 if layer.cell.projects_in_steps(1) else STEPS
    kernel, recurrent_kernel = layer.kernels.values()
    assert found == ends + rows * kernel.between + recurrent_kernel.between
    assert kernel.between > 0


def test_activations_of_cells_are_those_of_a_step():
    cells = keras.layers.GRUCell(64), BilinearGRUCell(64, implementation="materialized")
    models = [keras.Sequential([keras.Input((8, 52)), layers.RNN(cell)]) for cell in cells]
    full, small = (summarize(model).layers[0].activation_bytes for model in models)
    assert full == small


def test_activations_of_separable_convolutions_are_counted_in_one_way():
    options = {"padding": "same", "depth_multiplier": 2}
    full = layers.SeparableConv2D(16, 3, **options)
    small = BilinearSeparableConv2D(16, 3, implementation="materialized", **options)
    for layer in (full, small):
        (costs,) = summarize(keras.Sequential([keras.Input((6, 6, 8)), layer])).layers
        assert costs.activation_bytes == 4 * 36 * (8 + 2 * 8 + 16)


def test_bytes_and_activations_follow_the_dtype():
    model = network(layers.Dense(32, dtype="mixed_bfloat16"))
    (layer,) = summarize(model).layers
    assert layer.bytes == 4 * 2080
    assert layer.activation_bytes in (2 * 32 + 2 * 64, 2 * 32 + 4 * 64)
    (layer,) = summarize(network(layers.Dense(32, dtype="bfloat16"))).layers
    assert layer.bytes == 2 * 2080


@pytest.mark.parametrize("bilinear", [False, True])
def test_macs_of_einsum_layers(bilinear):
    layer_class = BilinearEinsumDense if bilinear else layers.EinsumDense
    options = {"implementation": "materialized"} if bilinear else {}
    layer = layer_class("abc,cde->abde", (None, 3, 8), **options)
    model = keras.Sequential([keras.Input((5, 16)), layer])
    assert summarize(model).macs == 5 * 16 * 3 * 8


def test_macs_of_convolutions_of_every_kind():
    def macs(layer):
        return summarize(keras.Sequential([keras.Input((8, 8, 6)), layer])).macs

    assert macs(layers.DepthwiseConv2D(3, padding="same")) == 64 * 9 * 6
    assert macs(layers.SeparableConv2D(4, 3, padding="same")) == 64 * (9 * 6 + 6 * 4)
    assert macs(layers.Conv2DTranspose(4, 3, strides=2, padding="same")) == 64 * 9 * 6 * 4
    assert macs(layers.Conv2D(4, 3, groups=2, padding="same")) == 64 * 9 * 3 * 4


def test_sizes_that_are_not_known_need_data():
    model = keras.Sequential([keras.Input((None, 4)), layers.Dense(3)])
    costs = summarize(model)
    assert (costs.macs, costs.latency_ms, costs.peak_activation_bytes) == (None, None, None)
    assert "unknown" in str(costs)
    assert summarize(model, np.ones((5, 7, 4), "float32")).macs == 7 * 12


def test_operations_that_are_not_known_are_said():
    model = keras.Sequential([keras.Input((2, 4, 4, 4, 3)), layers.ConvLSTM3D(2, 3, name="odd")])
    assert summarize(model).not_counted == ("odd/conv_lstm_cell",)


def identity_network():
    model = network(layers.Dense(64, use_bias=False))
    model.layers[0].kernel.assign(np.eye(64))
    return model


@pytest.mark.parametrize("one_hot", [False, True])
def test_accuracy_is_the_share_of_right_answers(one_hot):
    x = np.eye(64, dtype="float32")[:50]
    y = np.arange(50)
    y[:10] += 1
    y = np.eye(64)[y] if one_hot else y
    model = identity_network()
    assert summarize(model, (x, y)).accuracy == 0.8
    assert summarize(model, [(x[:25], y[:25]), (x[25:], y[25:])]).accuracy == 0.8


@pytest.mark.skipif(keras.config.backend() != "jax", reason="JAX takes no tensors of others")
def test_data_may_be_of_another_library():
    torch = pytest.importorskip("torch")
    examples = torch.utils.data.TensorDataset(torch.eye(64), torch.arange(64))
    data = torch.utils.data.DataLoader(examples, batch_size=32)
    assert summarize(identity_network(), data).accuracy == 1.0


def test_quantized_layers_count():
    model = keras.Sequential([keras.Input((64,)), layers.Dense(64), layers.Dense(32)])
    full = summarize(model)
    model.quantize("int8")
    assert summarize(model).macs == full.macs == 64 * 96
    assert summarize(model).peak_activation_bytes == full.peak_activation_bytes


def test_one_output_is_a_probability():
    model = keras.Sequential([keras.Input((1,)), layers.Flatten()])
    x = np.array([[0.2], [0.7], [0.9], [0.1]], "float32")
    for y in (np.array([0, 1, 0, 0]), np.array([[0], [1], [0], [0]])):
        assert summarize(model, (x, y)).accuracy == 0.75
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    assert summarize(model, (x - 0.5, y)).accuracy == 0.75


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="as many labels as examples"):
        summarize(identity_network(), (np.eye(64), np.arange(300)))
    with pytest.raises(ValueError, match="a label, an integer or a one-hot vector, for each"):
        summarize(identity_network(), (np.eye(64), np.ones((64, 3))))


def two_outputs(as_dict):
    """A model that answers its one-hot inputs: the class, and whether the class is 0."""
    inputs = keras.Input((8,))
    first = layers.Dense(8, use_bias=False, name="kind")
    second = layers.Dense(1, use_bias=False, name="is_first")
    outputs = {"kind": first(inputs), "is_first": second(inputs)}
    model = keras.Model(inputs, outputs if as_dict else [*outputs.values()])
    first.set_weights([np.eye(8)])
    second.set_weights([np.eye(8)[:, :1]])
    return model


@pytest.mark.parametrize("as_dict", [False, True])
def test_each_output_has_its_accuracy(as_dict, tmp_path):
    model, x = two_outputs(as_dict), np.eye(8, dtype="float32")
    kind, is_first = np.arange(8), np.array([0, 0, 0, 0, 0, 0, 1, 0])
    kind[0] = 1
    labels = {"kind": kind, "is_first": is_first}
    expected = {"kind": 0.875, "is_first": 0.75}
    assert summarize(model, (x, labels)).accuracy == expected
    batches = [
        (x[:5], {name: values[:5] for name, values in labels.items()}),
        (x[5:], {name: values[5:] for name, values in labels.items()}),
    ]
    assert summarize(model, batches).accuracy == expected
    assert summarize(model, (x, {"kind": np.eye(8)[kind]})).accuracy == {"kind": 0.875}
    if not as_dict:
        assert summarize(model, (x, [kind, is_first])).accuracy == expected
        assert summarize(model, [(x, (kind, is_first))]).accuracy == expected
    comparison = compare(model, model, (x, labels, np.ones(8)))
    assert "accuracy of is_first" in str(comparison)
    assert "accuracy of kind 87.50%" in " ".join(str(comparison.full).split())
    comparison.plot(tmp_path / "plot.svg")
    assert summarize(model, x).accuracy is None


def test_labels_of_one_output_may_have_its_name():
    x = np.eye(64, dtype="float32")
    model = identity_network()
    name = model.layers[-1].name
    for labels in ({name: np.arange(64)}, [np.arange(64)], list(range(64))):
        assert summarize(model, (x, labels)).accuracy == 1.0


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (np.zeros(8), r"for each output: .* Received: an array of shape \(8,\) and .* 2 outputs"),
        ([np.zeros(8)] * 3, r"for each output: .* Received: a list of \(8,\), \(8,\), \(8,\)"),
        ({"kin": np.zeros(8)}, "Received: labels for 'kin' and .* 2 outputs 'kind', 'is_first'"),
        ({"kind": np.zeros(7)}, r"as many labels as examples.*\(7,\) for 8 examples"),
        ({"kind": ["a"] * 8}, "must be numbers: .* Received: .* of type list"),
        ({"kind": {"a": np.zeros(8)}}, r"must be numbers: .* Received: a dict of a: \(8,\)"),
        ([[0, 1], [0]], "must be numbers: .* Received: .* of type list"),
        ({"kind": np.zeros((8, 3))}, r"a label, .* labels of shape \(8, 3\) for outputs"),
    ],
)
def test_labels_that_fit_no_output_are_refused(labels, text):
    with pytest.raises(ValueError, match=text):
        summarize(two_outputs(as_dict=False), (np.eye(8), labels))


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="others have no strings")
def test_models_of_texts_are_summarized():
    words = layers.TextVectorization(output_sequence_length=4, vocabulary=["good", "bad"])
    last = layers.Embedding(4, 8), layers.GlobalAveragePooling1D(), layers.Dense(2)
    model = keras.Sequential([keras.Input((1,), dtype="string"), words, *last])
    texts = ops.convert_to_tensor([["good bad"], ["bad"]])
    assert summarize(model).parameters == 50
    assert summarize(model, [(texts, np.zeros(2))]).accuracy is not None


def test_models_that_are_not_built_are_refused():
    with pytest.raises(ValueError, match="must be a built Keras model"):
        summarize(keras.Sequential([layers.Dense(2)]))
    with pytest.raises(ValueError, match="must be a built Keras model"):
        compare(identity_network(), layers.Dense(3))


def test_two_models_are_compared_layer_by_layer(tmp_path):
    model = network(layers.Dense(64, name="hidden"), layers.Dense(10, name="last"))
    small = rewrite_model(model, layers={"hidden": 1, "last": None}, budget=0.9)
    x, y = np.random.default_rng(0).random((30, 64), "float32"), np.arange(30) % 10
    comparison = compare(model, small, (x, y))
    assert comparison.full.parameters == model.count_params()
    assert comparison.small.parameters == small.count_params()
    text = str(comparison)
    assert "hidden: Dense to BilinearDense" in text
    assert "last" not in text
    assert "<table>" in comparison._repr_html_()
    content = json.loads(comparison.to_json())
    assert content["full"]["accuracy"] == comparison.full.accuracy
    assert content["small"]["layers"][0]["type"] == "BilinearDense"
    figure = comparison.plot(tmp_path / "comparison.svg")
    assert len(figure.axes) == 2
    assert (tmp_path / "comparison.svg").read_text().count("<svg") == 1
    assert len(compare(model, small).plot().axes) == 1
    assert len(summarize(model).plot(tmp_path / "summary.png").axes) == 1
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_layers_of_a_copy_are_found_by_their_order():
    model, x = model_kinds.subclassed()
    small = rewrite_model(model, rank=1)
    assert str(compare(model, small, x)).count("Dense to BilinearDense") == 5


def test_summarizing_leaves_the_model_as_it_was():
    model, x = model_kinds.sequential()
    before = model.get_weights()
    summarize(model, (x, np.zeros(len(x))))
    assert all("call" not in vars(layer) for layer in model.layers)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
