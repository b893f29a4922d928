"""What Adam is to know of new factors."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_bilinear as kb
from keras_bilinear.layers.converter import full_converter
from keras_bilinear.rewriting import adam
from keras_bilinear.rewriting.adam import CAUTION
from keras_bilinear.rewriting.callback import BilinearRewrite

RNG = np.random.default_rng(0)
# Full layers, with paddings, groups and gates, and shapes of their inputs.
LAYERS = {
    "dense": (lambda: keras.layers.Dense(23), (15,)),
    "einsum": (lambda: keras.layers.EinsumDense("abc,cde->abde", (None, 3, 8)), (2, 12)),
    "conv": (lambda: keras.layers.Conv2D(10, (3, 2), groups=2), (6, 6, 12)),
    "transposed conv": (lambda: keras.layers.Conv2DTranspose(10, (3, 2), 2), (4, 4, 7)),
    "separable conv": (lambda: keras.layers.SeparableConv2D(10, 3, depth_multiplier=2), (6, 6, 7)),
    "conv lstm": (lambda: keras.layers.ConvLSTM1D(6, 3), (3, 6, 5)),
    "gru": (lambda: keras.layers.GRU(12), (3, 10)),
    "lstm": (lambda: keras.layers.LSTM(12), (3, 10)),
    "embedding": (lambda: keras.layers.Embedding(37, 16), ()),
}


def full_and_bilinear(kind, rank=2):
    make, shape = LAYERS[kind]
    full = make()
    full.build((None, *shape))
    cls = getattr(kb, f"Bilinear{type(full).__name__}")
    return full, cls.from_full(full, rank=rank)


def kernels(layer):
    return layer.kernels


def model_of(layer):
    model = keras.Sequential([layer], name="model")
    model.built = True
    return model


def normal(shape):
    return RNG.normal(size=shape).astype("float32")


def arrays(kernel):
    return [ops.convert_to_numpy(one) for one in (kernel.left, kernel.right)]


@pytest.mark.parametrize("kind", LAYERS)
def test_the_chain_rule(kind):
    _, layer = full_and_bilinear(kind)
    for kernel in kernels(layer).values():
        left, right = arrays(kernel)
        gradient = normal(kernel.factorization.full_shape)
        pulled = adam.pull_back(kernel, gradient, left, right)
        # The kernel is linear in each factor: <gradient, W(E, R)> is <gradient of L, E>.
        for side, factors in enumerate(((normal(left.shape), right), (left, normal(right.shape)))):
            full = ops.convert_to_numpy(kernel.full(*factors)).astype("float64")
            expected = (gradient.astype("float64") * full).sum()
            found = (pulled[side].astype("float64") * factors[side]).sum()
            assert pulled[side].shape == factors[side].shape
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_of_one_gradient_the_squares_have_the_exact_sum(kind):
    full, layer = full_and_bilinear(kind)
    before, after = model_of(full), model_of(layer)
    inner = getattr(full, "cell", full)
    moments, gradients = {}, {}
    shared = full_converter(type(full)).shared_names
    for name in (*kernels(layer), *shared)[: len(inner.trainable_variables)]:
        variable = getattr(inner, name)
        gradients[name] = normal(variable.shape)
        moments[id(variable)] = gradients[name], np.square(gradients[name])
    layer.name = full.name
    known = adam.of_kernels(before, moments)
    squares = adam.of_factors(after, known)
    for name in gradients.keys() & {*shared}:
        np.testing.assert_array_equal(
            squares.pop(id(getattr(getattr(layer, "cell", layer), name))),
            CAUTION * np.square(gradients[name]),
        )
    assert len(squares) == 2 * len(kernels(layer))
    for name, kernel in kernels(layer).items():
        gradient = full_converter(type(full)).to_matrix(full, gradients[name])
        exact = adam.pull_back(kernel, gradient, *arrays(kernel))
        for variable, its_gradient in zip((kernel.left, kernel.right), exact, strict=True):
            found = squares[id(variable)]
            assert found.shape == tuple(variable.shape)
            assert (found >= 0).all()
            expected = CAUTION * np.square(its_gradient).sum()
            np.testing.assert_allclose(found.sum(), expected, rtol=1e-3)


@pytest.mark.parametrize("kind", LAYERS)
def test_from_factors_to_the_same_factors(kind):
    _, layer = full_and_bilinear(kind)
    model = model_of(layer)
    # Gradients of a kernel whose squares are an outer product and that are independent.
    moments, expected = {}, {}
    for kernel in kernels(layer).values():
        squares = [np.square(normal(one.shape)) for one in arrays(kernel)]
        axis = 0 if kernel.factorization.share_right else 1
        full = kernel.full(*(one.sum(axis, keepdims=True) for one in squares))
        full = ops.convert_to_numpy(full)
        pulled = adam.pull_back(kernel, full, *map(np.square, arrays(kernel)))
        for variable, its_squares in zip((kernel.left, kernel.right), pulled, strict=True):
            moments[id(variable)] = np.zeros_like(its_squares), its_squares
            expected[id(variable)] = CAUTION * its_squares
    found = adam.of_factors(model, adam.of_kernels(model, moments))
    assert set(found) == set(expected)
    for key, squares in found.items():
        np.testing.assert_allclose(squares.sum(), expected[key].sum(), rtol=0.2)


def test_nothing_is_made_of_nothing():
    full, layer = full_and_bilinear("dense")
    layer.name = full.name
    zeros = np.zeros((15, 23), "float32")
    known = adam.of_kernels(model_of(full), {id(full.kernel): (zeros, zeros)})
    for squares in adam.of_factors(model_of(layer), known).values():
        np.testing.assert_array_equal(squares, np.zeros_like(squares))
    assert adam.of_kernels(model_of(full), {}) == {}


class Weights(keras.callbacks.Callback):
    """Keeps the weights of the first steps after an epoch begins."""

    def on_epoch_begin(self, epoch, logs=None):
        self.before = [ops.convert_to_numpy(v) for v in self.model.trainable_variables]

    def on_train_end(self, logs=None):
        self.after = [ops.convert_to_numpy(v) for v in self.model.trainable_variables]


@pytest.mark.parametrize("schedule", [{1: 0.3}, {1: 0.5, 2: 0.2}])
def test_first_steps_of_new_factors_are_no_larger_than_the_rate(schedule):
    keras.utils.set_random_seed(0)
    x, y = normal((1, 32)), normal((1, 24))
    x, y = np.repeat(x, 8, 0), np.repeat(y, 8, 0)
    model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(24, use_bias=False)])
    rate, weights = 1e-5, Weights()
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=False)
    model.fit(x, y, epochs=1, verbose=0)
    # As after a long training, in which the gradient has hardly changed.
    model.optimizer.iterations.assign(100_000)
    for slots, power in ((model.optimizer._momentums, 1), (model.optimizer._velocities, 2)):
        missing = 1 - (model.optimizer.beta_1, model.optimizer.beta_2)[power - 1]
        slots[0].assign(ops.convert_to_numpy(slots[0]) / missing)
    callbacks = [BilinearRewrite(schedule=schedule), weights]
    model.fit(x, y, epochs=1 + max(schedule), verbose=0, batch_size=8, callbacks=callbacks)
    assert isinstance(model.layers[0], kb.BilinearDense)
    for before, after in zip(weights.before, weights.after, strict=True):
        step = np.sqrt(np.square(after - before).mean())
        # With means of squares that begin at zero, the first is 3.2 times the rate.
        assert 0.01 * rate < step < rate


@pytest.mark.parametrize("kind", ["dense", "conv", "lstm"])
def test_terms_that_start_at_zero_are_not_forgotten(kind):
    full, _ = full_and_bilinear(kind)
    for variable in full.weights:
        variable.assign(np.zeros(variable.shape))
    layer = getattr(kb, f"Bilinear{type(full).__name__}").from_full(full, rank=2)
    for kernel in kernels(layer).values():
        shape = kernel.factorization.full_shape
        squares = adam._squares_of_factors(kernel, normal(shape), np.square(normal(shape)))
        for factor, of_factor in zip(arrays(kernel), squares, strict=True):
            assert of_factor.shape == factor.shape
            assert np.all(np.isfinite(of_factor))
            rows = of_factor.reshape(-1, of_factor.shape[-1])
            assert np.mean(rows > 0) > 0.9  # all but padding
