"""Gradients at what kernels make, for all layers: their products with the inputs are known."""

import backend_gradient
import keras
import numpy as np
import pytest
from keras import layers, ops, tree

from keras_bilinear.layers.converter import converter_of

CASES = {
    "dense": (lambda: layers.Dense(5, activation="tanh"), (4, 3, 6)),
    "softmax": (lambda: layers.Dense(5, activation="softmax", use_bias=False), (4, 6)),
    "einsum": (
        lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 4), bias_axes="e", activation="tanh"),
        (3, 5, 6),
    ),
    "einsum with heads": (
        lambda: layers.EinsumDense("abcd,cde->abe", (None, 4), bias_axes="e", activation="tanh"),
        (3, 5, 2, 6),
    ),
    "conv 1d": (lambda: layers.Conv1D(4, 3, padding="causal", activation="elu"), (3, 7, 5)),
    "conv 2d": (
        lambda: layers.Conv2D(4, (3, 2), strides=2, padding="same", groups=2, activation="tanh"),
        (3, 7, 6, 4),
    ),
    "separable": (lambda: layers.SeparableConv2D(4, 3, activation="tanh"), (2, 6, 5, 3)),
    "transposed": (lambda: layers.Conv1DTranspose(4, 3, strides=2, activation="tanh"), (2, 6, 3)),
    "simple": (lambda: layers.SimpleRNN(4), (3, 5, 6)),
    "gru": (lambda: layers.GRU(4, return_sequences=True), (3, 5, 6)),
    "gru before": (lambda: layers.GRU(4, reset_after=False, go_backwards=True), (3, 5, 6)),
    "lstm": (lambda: layers.LSTM(4, return_sequences=True, return_state=True), (3, 5, 6)),
    "conv lstm 1d": (
        lambda: layers.ConvLSTM1D(3, 3, strides=2, padding="same", return_sequences=True),
        (2, 4, 7, 2),
    ),
    "conv lstm 2d": (lambda: layers.ConvLSTM2D(2, (2, 3), go_backwards=True), (2, 3, 5, 6, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_inputs_times_gradients_are_the_gradients_of_the_kernels(case):
    make, shape = CASES[case]
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    layer, x = make(), rng.normal(size=shape).astype("float32")
    outputs = tree.map_structure(lambda y: rng.normal(size=y.shape).astype("float32"), layer(x))
    converter = converter_of(layer)
    rows = converter.rows(layer, x)
    gradients = converter.gradients(layer, x, rows, outputs)
    weights = layer.trainable_variables

    def loss(*values):
        others = [variable.value for variable in layer.non_trainable_variables]
        y, _ = layer.stateless_call(values, others, ops.convert_to_tensor(x))
        pairs = zip(tree.flatten(y), tree.flatten(outputs), strict=True)
        return sum(ops.sum(ops.multiply(a, ops.convert_to_tensor(b))) for a, b in pairs)

    found = backend_gradient.gradients(loss, *layer.get_weights()[: len(weights)])
    for name, blocks in rows.items():
        (index,) = (i for i, w in enumerate(weights) if w is getattr(converter.holder(layer), name))
        products = [x.T @ g for x, g in zip(blocks, gradients[name], strict=True)]
        expected = converter.to_matrix(layer, found[index])
        expected = expected.reshape(-1, expected.shape[-1])
        np.testing.assert_allclose(np.concatenate(products, 1), expected, rtol=1e-3, atol=1e-4)


def test_masked_steps_have_no_gradients():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    layer, x = layers.LSTM(4), rng.normal(size=(2, 5, 3)).astype("float32")
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    layer(x, mask=mask)
    rows = converter_of(layer).rows(layer, x, mask=mask)
    outputs = np.ones((2, 4), "float32")
    found = converter_of(layer).gradients(layer, x, rows, outputs, mask=mask)
    assert [g.shape for g in found["kernel"]] == [(7, 4)] * 4
    short = converter_of(layer).rows(layer, x[:1, :2])
    alone = converter_of(layer).gradients(layer, x[:1, :2], short, outputs[:1])
    for a, b in zip(found["kernel"], alone["kernel"], strict=True):
        np.testing.assert_allclose(a[:2], b, rtol=1e-4, atol=1e-6)
