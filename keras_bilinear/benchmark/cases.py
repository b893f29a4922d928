"""The layer shapes that the benchmark times."""

import abc
import dataclasses
import math

from keras_bilinear.kronecker import cost
from keras_bilinear.kronecker.factorization import Order

# Every import of Keras stands in a function: a benchmark's parent process has no backend.


@dataclasses.dataclass(frozen=True)
class Case(abc.ABC):
    """A layer shape to time.

    Attributes:
        batch: shape of the batch, without the width.
        input_dim: width of the input, number of channels, or size of the vocabulary.
        output_dim: width of the output, or number of filters.
        rank: rank of the bilinear layer.
    """

    batch: tuple
    input_dim: int
    output_dim: int
    rank: int

    def __str__(self):
        batch = "x".join(map(str, self.batch))
        shape = f"{self.input_dim:,} -> {self.output_dim}"
        return f"{self.kind} B={batch}, {shape}{self._details()}, rank {self.rank}"

    def _details(self):
        return ""

    @abc.abstractmethod
    def layers(self):
        """A full and a bilinear layer of this shape, and others of the same use."""

    def inputs(self):
        import numpy as np

        shape = (*self.batch, self.input_dim)
        return np.random.default_rng(0).normal(size=shape).astype("float32")

    def floors(self, layer, rates):
        """Least seconds for a forward pass and for a training step of `layer`."""
        macs, inputs, outputs, read = self._least(layer)
        # Adam reads and writes each parameter and its two moments.
        step = 2 * inputs + 2 * outputs + 6 * layer.count_params()
        return (
            max(macs / rates["macs"], 4 * (inputs + outputs + read) / rates["bytes"]),
            max(3 * macs / rates["macs"], 4 * step / rates["bytes"]),
        )

    @abc.abstractmethod
    def _least(self, layer):
        """MACs, and numbers of the inputs, the outputs and the weights that a pass reads."""


class DenseCase(Case):
    kind = "dense"

    def layers(self):
        import keras

        import keras_bilinear

        return (
            keras.layers.Dense(self.output_dim),
            keras_bilinear.BilinearDense(self.output_dim, rank=self.rank),
        )

    def _least(self, layer):
        positions = math.prod(self.batch)
        plan = getattr(layer, "factorization", None)
        macs = plan.macs if plan else self.input_dim * self.output_dim
        widths = self.input_dim, self.output_dim
        return positions * macs, *(positions * width for width in widths), layer.count_params()


class EmbeddingCase(Case):
    kind = "embedding"

    def layers(self):
        import keras

        import keras_bilinear

        sizes = self.input_dim, self.output_dim
        return (
            keras.layers.Embedding(*sizes),
            keras_bilinear.BilinearEmbedding(*sizes, rank=self.rank),
        )

    def inputs(self):
        import numpy as np

        return np.random.default_rng(0).integers(0, self.input_dim, self.batch).astype("int32")

    def _least(self, layer):
        positions = math.prod(self.batch)
        plan = getattr(layer, "factorization", None)
        macs = positions * plan.rank * plan.padded_output_dim if plan else 0
        outputs = positions * self.output_dim
        return macs, positions, outputs, min(layer.count_params(), outputs)


@dataclasses.dataclass(frozen=True)
class ConvCase(Case):
    """A convolution with padding `"same"`.

    Attributes:
        window: size of the window along each axis.
        strides: along each axis.
        pattern: of the bilinear layer.
        patches: whether to time the algorithm that extracts patches as well.
    """

    window: int = 3
    strides: int = 1
    pattern: str = "auto"
    patches: bool = False

    @property
    def kind(self):
        return f"conv{len(self.batch) - 1}d"

    def _details(self):
        details = f", window {self.window}"
        if self.strides > 1:
            details += f", strides {self.strides}"
        return details if self.pattern == "auto" else f"{details}, {self.pattern}"

    def layers(self):
        import keras

        import keras_bilinear

        dimensions = len(self.batch) - 1
        arguments = self.output_dim, self.window, self.strides, "same"
        full = getattr(keras.layers, f"Conv{dimensions}D")(*arguments)
        bilinear = getattr(keras_bilinear, f"BilinearConv{dimensions}D")(
            *arguments, rank=self.rank, pattern=self.pattern
        )
        if not self.patches:
            return full, bilinear
        return full, bilinear, _patch_extracting_layer(self.output_dim, self.window)

    def _least(self, layer):
        inputs = math.prod(self.batch) * self.input_dim
        outputs = math.prod(layer.compute_output_shape((*self.batch, self.input_dim)))
        positions = outputs // self.output_dim
        plan = getattr(layer, "factorization", None)
        if plan:
            strides = (self.strides,) * (len(self.batch) - 1)
            macs = min(cost.count_macs(plan, order, strides) for order in Order)
        else:
            macs = math.prod(layer.kernel.shape)
        return positions * macs, inputs, outputs, layer.count_params()


@dataclasses.dataclass(frozen=True)
class RecurrentCase(Case):
    """A recurrent layer that returns its last output; the batch is `(examples, time steps)`.

    Attributes:
        kind: `"LSTM"` or `"GRU"`.
    """

    kind: str = "LSTM"

    def layers(self):
        import keras

        import keras_bilinear

        return (
            getattr(keras.layers, self.kind)(self.output_dim),
            getattr(keras_bilinear, f"Bilinear{self.kind}")(self.output_dim, rank=self.rank),
        )

    def _least(self, layer):
        steps = math.prod(self.batch)
        plans = [
            getattr(layer.cell, name, None) for name in ("factorization", "recurrent_factorization")
        ]
        if all(plans):
            macs = sum(plan.macs for plan in plans)
        else:
            macs = math.prod(layer.cell.kernel.shape) + math.prod(layer.cell.recurrent_kernel.shape)
        outputs = self.batch[0] * self.output_dim
        return steps * macs, steps * self.input_dim, outputs, layer.count_params()


def _patch_extracting_layer(filters, window):
    """The algorithm of the paper's own code, with one term and biases.

    Each patch of the input becomes a row of numbers, which is reshaped into a
    matrix and multiplied from both sides.
    """
    import keras
    from keras import ops

    from keras_bilinear.kronecker.factorization import choose_factors

    class PatchConv2D(keras.layers.Layer):
        def build(self, input_shape):
            self.rows = choose_factors(window**2 * input_shape[-1])
            columns = choose_factors(filters)
            self.left, self.right = (
                self.add_weight(shape=shape) for shape in zip(self.rows, columns, strict=True)
            )
            self.bias = self.add_weight(shape=(filters,), initializer="zeros")

        def call(self, inputs):
            x = ops.image.extract_patches(inputs, window, strides=1, padding="same")
            x = ops.reshape(x, (*ops.shape(x)[:-1], *self.rows))
            x = ops.tensordot(x, self.left, ((3,), (0,)))
            x = ops.tensordot(x, self.right, ((3,), (0,)))
            return ops.reshape(x, (*ops.shape(inputs)[:-1], filters)) + self.bias

        def compute_output_shape(self, input_shape):
            return (*input_shape[:-1], filters)

    return PatchConv2D()


def _conv_cases():
    shapes = ((32, 64), (16, 128), (8, 256), (8, 512))
    for size, channels in shapes:
        for rank, pattern in ((1, "auto"), (4, "auto"), (1, "spatial")):
            patches = rank == 1 and pattern == "auto" and channels <= 128
            sizes = (32, size, size), channels, channels, rank
            yield ConvCase(*sizes, pattern=pattern, patches=patches)
    yield ConvCase((32, 32, 32), 64, 128, 1, strides=2)
    yield ConvCase((32, 16, 16), 128, 128, 1, window=5)
    yield ConvCase((32, 16, 16), 256, 256, 1, window=1)
    yield ConvCase((32, 1000), 128, 128, 1, window=5)
    yield ConvCase((4, 16, 16, 16), 64, 64, 1)


CASES = {
    "dense": [
        DenseCase((batch,), width, width, rank)
        for batch, width in ((128, 1024), (128, 4096), (1, 4096))
        for rank in (1, 4)
    ],
    "embedding": [
        EmbeddingCase((64, 100), vocabulary, width, rank)
        for vocabulary, width in ((20_000, 128), (100_000, 256), (1_000_000, 256))
        for rank in (1, 4)
    ],
    "conv": list(_conv_cases()),
    "recurrent": [
        RecurrentCase((batch, 100), width, units, rank, kind)
        for kind in ("LSTM", "GRU")
        for batch, width, units in ((64, 128, 256), (64, 512, 1024), (1, 512, 1024))
        for rank in (1, 4)
    ],
}
# Trained alone in a process of its own, for its peak memory; no full layer fits.
HUGE = EmbeddingCase((64, 100), 10**9, 256, 4)
