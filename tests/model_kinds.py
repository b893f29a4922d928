"""Small models of every kind that can be rewritten, with inputs for them."""

import keras
import numpy as np
from keras import layers

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(40, 24)).astype("float32")
IMAGES = RNG.normal(size=(10, 8, 8, 3)).astype("float32")
SEQUENCES = RNG.normal(size=(12, 6, 20)).astype("float32")
TOKENS = RNG.integers(0, 50, (8, 4)).astype("int32")


def sequential():
    hidden = (layers.Dense(32, activation="relu"), layers.BatchNormalization())
    return keras.Sequential([keras.Input((24,)), *hidden, layers.Dense(30)]), VECTORS


def shared():
    inputs = keras.Input((24,))
    dense = layers.Dense(24, activation="tanh")
    return keras.Model(inputs, layers.Dense(9)(layers.add([dense(dense(inputs)), inputs]))), VECTORS


def nested():
    inner = keras.Sequential([keras.Input((24,)), layers.Dense(20), layers.Dense(24)], name="inner")
    inputs = keras.Input((24,))
    x = inner(layers.Dense(24)(inputs))
    outer = keras.Model(inputs, x, name="middle")
    return keras.Sequential([keras.Input((24,)), outer, layers.Dense(12)]), VECTORS


def two_inputs():
    a, b = keras.Input((24,), name="a"), keras.Input((24,), name="b")
    x = layers.concatenate([layers.Dense(16)(a), layers.Dense(16)(b)])
    model = keras.Model({"a": a, "b": b}, [layers.Dense(12)(x), layers.Dense(20)(x)])
    return model, {"a": VECTORS, "b": VECTORS[::-1].copy()}


def convolutional():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.DepthwiseConv2D(3),
            layers.Conv2D(16, 1),
            layers.Flatten(),
            layers.Dense(10),
        ]
    ), IMAGES


def recurrent():
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(50, 20, mask_zero=True),
            layers.Bidirectional(layers.GRU(16, return_sequences=True)),
            layers.TimeDistributed(layers.Dense(20)),
            layers.LSTM(16, return_sequences=True),
            layers.RNN(layers.StackedRNNCells([layers.GRUCell(16), layers.SimpleRNNCell(16)])),
        ]
    ), TOKENS


def attention():
    inputs = keras.Input((6, 20))
    x = layers.LayerNormalization()(inputs)
    x = layers.Dense(20)(layers.MultiHeadAttention(2, 10)(x, x))
    return keras.Model(inputs, layers.add([inputs, x])), SEQUENCES


@keras.saving.register_keras_serializable(package="tests")
class SameEmbedding(layers.ReversibleEmbedding):
    pass


def language():
    inputs = keras.Input((4,), dtype="int32")
    tied = SameEmbedding(50, 20)
    x = layers.GroupQueryAttention(10, 4, 2)(tied(inputs), tied(inputs))
    x = layers.EinsumDense("abc,cd->abd", (None, 20), bias_axes="d")(x)
    apart = layers.ReversibleEmbedding(50, 20, tie_weights=False)
    x = layers.add([apart(inputs), x])
    return keras.Model(inputs, [tied(x, reverse=True), apart(x, reverse=True)]), TOKENS


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    """A layer that makes its own layers, one of them in a list."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.hidden = [layers.Dense(units, activation="relu"), layers.Dense(units)]

    def build(self, input_shape):
        for layer in self.hidden:
            layer.build(input_shape)
            input_shape = layer.compute_output_shape(input_shape)

    def call(self, x):
        for layer in self.hidden:
            x = layer(x)
        return x

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def composite():
    inputs = keras.Input((24,))
    return keras.Model(inputs, layers.Dense(18)(Block(24)(inputs))), VECTORS


@keras.saving.register_keras_serializable(package="tests")
class Tied(layers.Layer):
    """A layer that has the kernel of another one as its own."""

    def __init__(self, other, **kwargs):
        super().__init__(**kwargs)
        self.other = other

    def build(self, input_shape):
        self.kernel = self.other._kernel
        self.bias = self.add_weight(shape=(self.other.units,), name="bias")

    def call(self, x):
        return keras.ops.matmul(x, self.kernel) + self.bias

    def get_config(self):
        other = keras.saving.serialize_keras_object(self.other)
        return {**super().get_config(), "other": other}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("other")), **config)


@keras.saving.register_keras_serializable(package="tests")
class TiedModel(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(24)
        self.middle = layers.Dense(24)
        self.tied = Tied(self.first)

    def build(self, input_shape):
        for layer in (self.first, self.middle, self.tied):
            layer.build(input_shape)

    def call(self, x):
        return self.tied(self.middle(self.first(x)))


def tied():
    model = TiedModel()
    model.build((None, 24))
    return model, VECTORS


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, units=24, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = layers.Dense(units, activation="relu")
        self.block = Block(units)
        self.head = keras.Sequential([layers.Dense(20), layers.Dense(12)])

    def call(self, x):
        return self.head(self.block(self.first(x)))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def subclassed():
    model = Subclassed()
    model(VECTORS[:1])
    return model, VECTORS


KINDS = (
    sequential,
    shared,
    nested,
    two_inputs,
    convolutional,
    recurrent,
    attention,
    language,
    composite,
    subclassed,
    tied,
)
