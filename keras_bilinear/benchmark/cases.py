"""The layer shapes that the benchmark times."""

import abc
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bilinear import layers
from keras_bilinear.kronecker import cost
from keras_bilinear.kronecker.factorization import Order, choose_factors


@dataclasses.dataclass(frozen=True)
class Case(abc.ABC):
    """A layer shape to time.

    Attributes:
        batch: shape of the inputs without the last axis.
        input_dim: width of the inputs, number of channels, or size of the vocabulary.
        output_dim: width of the outputs, or number of filters.
        rank: number of Kronecker terms of the bilinear layer.
    """

    batch: tuple[int, ...]
    input_dim: int
    output_dim: int
    rank: int

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """What the layer is called in tables."""

    def __str__(self) -> str:
        batch = "x".join(map(str, self.batch))
        shape = f"{self.input_dim:,} -> {self.output_dim}"
        return f"{self.kind} B={batch}, {shape}{self._details()}, rank {self.rank}"

    def _details(self) -> str:
        """The attributes of a subclass, in the name of the case."""
        return ""

    @abc.abstractmethod
    def layers(self) -> tuple[keras.Layer, ...]:
        """A full layer and a bilinear layer of this shape, and further layers to compare."""

    def inputs(self) -> np.ndarray:
        """Inputs of the layers."""
        shape = (*self.batch, self.input_dim)
        return np.random.default_rng(0).normal(size=shape).astype("float32")

    def floors(self, layer: keras.Layer, rates: Mapping[str, float]) -> tuple[float, float]:
        """The least time that this machine needs for a layer, however it is computed.

        Args:
            layer: a built layer of this case.
            rates: the measured rates, as `worker.measure_rates` returns them.

        Returns:
            Seconds of a forward pass and of a training step.
        """
        macs, inputs, outputs, read = self._least(layer)
        # Adam reads and writes each parameter and its two moments.
        step = 2 * inputs + 2 * outputs + 6 * layer.count_params()
        return (
            max(macs / rates["macs"], 4 * (inputs + outputs + read) / rates["bytes"]),
            max(3 * macs / rates["macs"], 4 * step / rates["bytes"]),
        )

    @abc.abstractmethod
    def _least(self, layer: Any) -> tuple[int, int, int, int]:
        """What a forward pass takes at least.

        Returns:
            Multiply-accumulate operations, and how many numbers are in the inputs, in the outputs
            and in the weights that are read.
        """


class DenseCase(Case):
    """A dense layer."""

    @property
    def kind(self) -> str:
        return "dense"

    def layers(self) -> tuple[keras.Layer, ...]:
        return (
            keras.layers.Dense(self.output_dim),
            layers.BilinearDense(self.output_dim, rank=self.rank),
        )

    def _least(self, layer: Any) -> tuple[int, int, int, int]:
        positions = math.prod(self.batch)
        factorization = getattr(layer, "factorization", None)
        macs = factorization.macs if factorization else self.input_dim * self.output_dim
        return (
            positions * macs,
            positions * self.input_dim,
            positions * self.output_dim,
            layer.count_params(),
        )


class EmbeddingCase(Case):
    """An embedding of a vocabulary of `input_dim` words."""

    @property
    def kind(self) -> str:
        return "embedding"

    def layers(self) -> tuple[keras.Layer, ...]:
        sizes = self.input_dim, self.output_dim
        return keras.layers.Embedding(*sizes), layers.BilinearEmbedding(*sizes, rank=self.rank)

    def inputs(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, self.input_dim, self.batch).astype("int32")

    def _least(self, layer: Any) -> tuple[int, int, int, int]:
        positions = math.prod(self.batch)
        factorization = getattr(layer, "factorization", None)
        products = factorization.rank * factorization.padded_output_dim if factorization else 0
        outputs = positions * self.output_dim
        return positions * products, positions, outputs, min(layer.count_params(), outputs)


@dataclasses.dataclass(frozen=True)
class ConvCase(Case):
    """A convolution with padding `"same"`.

    Attributes:
        window: size of the window along each axis.
        strides: stride along each axis.
        pattern: pattern of the bilinear layer's factors.
        patches: whether to time the algorithm that extracts patches as well.
    """

    window: int = 3
    strides: int = 1
    pattern: str = "auto"
    patches: bool = False

    @property
    def kind(self) -> str:
        return f"conv{self._dimensions}d"

    @property
    def _dimensions(self) -> int:
        return len(self.batch) - 1

    def _details(self) -> str:
        details = f", window {self.window}"
        if self.strides > 1:
            details += f", strides {self.strides}"
        return details if self.pattern == "auto" else f"{details}, {self.pattern}"

    def layers(self) -> tuple[keras.Layer, ...]:
        arguments = self.output_dim, self.window, self.strides, "same"
        full = getattr(keras.layers, f"Conv{self._dimensions}D")(*arguments)
        bilinear = getattr(layers, f"BilinearConv{self._dimensions}D")(
            *arguments, rank=self.rank, pattern=self.pattern
        )
        if not self.patches:
            return full, bilinear
        return full, bilinear, PatchConv2D(self.output_dim, self.window)

    def _least(self, layer: Any) -> tuple[int, int, int, int]:
        inputs = math.prod(self.batch) * self.input_dim
        outputs = math.prod(layer.compute_output_shape((*self.batch, self.input_dim)))
        positions = outputs // self.output_dim
        factorization = getattr(layer, "factorization", None)
        if factorization:
            strides = (self.strides,) * self._dimensions
            macs = min(cost.count_macs(factorization, order, strides) for order in Order)
        else:
            macs = math.prod(layer.kernel.shape)
        return positions * macs, inputs, outputs, layer.count_params()


@dataclasses.dataclass(frozen=True)
class RecurrentCase(Case):
    """A recurrent layer that returns its last output; `batch` is `(examples, time steps)`.

    Attributes:
        layer_name: `"LSTM"` or `"GRU"`.
    """

    layer_name: str = "LSTM"

    @property
    def kind(self) -> str:
        return self.layer_name

    def layers(self) -> tuple[keras.Layer, ...]:
        return (
            getattr(keras.layers, self.layer_name)(self.output_dim),
            getattr(layers, f"Bilinear{self.layer_name}")(self.output_dim, rank=self.rank),
        )

    def _least(self, layer: Any) -> tuple[int, int, int, int]:
        steps = math.prod(self.batch)
        cell = layer.cell
        if hasattr(cell, "factorization"):
            macs = cell.factorization.macs + cell.recurrent_factorization.macs
        else:
            macs = math.prod(cell.kernel.shape) + math.prod(cell.recurrent_kernel.shape)
        outputs = self.batch[0] * self.output_dim
        return steps * macs, steps * self.input_dim, outputs, layer.count_params()


class PatchConv2D(keras.Layer):
    """The convolution of the paper's own code, with one Kronecker term and a bias.

    Each patch of the input is reshaped into a matrix and multiplied from both sides.

    Args:
        filters: number of filters.
        window: size of the window along each axis.
    """

    def __init__(self, filters: int, window: int) -> None:
        super().__init__()
        self.filters, self.window = filters, window

    def build(self, input_shape):
        self.rows = choose_factors(self.window**2 * input_shape[-1])
        columns = choose_factors(self.filters)
        self.left, self.right = (
            self.add_weight(shape=shape) for shape in zip(self.rows, columns, strict=True)
        )
        self.bias = self.add_weight(shape=(self.filters,), initializer="zeros")

    def call(self, inputs):
        sizes: Any = ops.shape(inputs)[:-1]
        axes: Any = ((3,), (0,))
        x = ops.image.extract_patches(inputs, self.window, strides=1, padding="same")
        x = ops.reshape(x, (*sizes, *self.rows))
        x = ops.tensordot(x, self.left, axes)
        x = ops.tensordot(x, self.right, axes)
        return ops.reshape(x, (*sizes, self.filters)) + self.bias

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.filters)


def _conv_cases() -> Iterator[ConvCase]:
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


# For each suite, the shapes to time.
CASES: dict[str, Sequence[Case]] = {
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
# An embedding that is trained alone, for its peak memory, as the full layer does not fit in memory.
HUGE = EmbeddingCase((64, 100), 10**9, 256, 4)
