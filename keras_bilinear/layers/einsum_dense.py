import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import activations, constraints, initializers, ops, regularizers

from keras_bilinear.keras_private import graph
from keras_bilinear.kronecker.factorization import Factorization
from keras_bilinear.layers.base import BilinearLayer
from keras_bilinear.layers.converter import Converter, is_bilinear, register


class _Axes:
    """The axes of an einsum whose second operand, the kernel, is a matrix of grouped axes.

    Attributes:
        contracted: labels that the kernel takes from the inputs, in its order.
        produced: labels that the kernel adds to the outputs, in its order.
    """

    def __init__(self, equation):
        match = re.fullmatch(
            r"(\.\.\.)?([a-zA-Z]+)(\.\.\.)?,([a-zA-Z]+)->(\.\.\.)?([a-zA-Z]+)(\.\.\.)?",
            equation if isinstance(equation, str) else "",
        )
        if not match or (match[1], match[3]) != (match[5], match[7]):
            raise ValueError(
                "`equation` must have the form X,Y->Z, ...X,Y->...Z or X...,Y->Z.... "
                f"Received: equation={equation!r}"
            )
        self.before, self.inputs, self.after, self.kernel = match.groups()[:4]
        self.outputs = match[6]
        self.contracted = [a for a in self.kernel if a in self.inputs and a not in self.outputs]
        self.produced = [a for a in self.kernel if a in self.outputs and a not in self.inputs]
        if not self.contracted or len(self.contracted + self.produced) != len(set(self.kernel)):
            raise ValueError(
                "The kernel of `equation` must be a matrix: each of its axes is either one of the "
                f"inputs only or one of the outputs only. Received: equation={equation!r}"
            )

    def sizes(self, labels: Sequence[str], kernel_shape: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(kernel_shape[self.kernel.index(label)] for label in labels)

    def as_rows(self, x):
        """Inputs as `(..., prod(contracted))`, and the labels of the leading axes."""
        labels = self.labels(self.inputs, x.shape)
        summed = [a for a in labels if a not in self.outputs and a not in self.kernel]
        summed = [a for a in summed if a.isalpha()]
        if summed:
            x = ops.sum(x, axis=[labels.index(a) for a in summed])
            labels = [a for a in labels if a not in summed]
        kept = [a for a in labels if a not in self.contracted]
        x = ops.transpose(x, [labels.index(a) for a in (*kept, *self.contracted)])
        if len(self.contracted) > 1:
            width = math.prod(x.shape[len(kept) :])
            x = ops.reshape(x, (*ops.shape(x)[: len(kept)], width))
        return x, kept

    def from_rows(self, y, kept, kernel_shape):
        """`(..., prod(produced))` as outputs."""
        if len(self.produced) != 1:
            sizes = self.sizes(self.produced, kernel_shape)
            y = ops.reshape(y, (*ops.shape(y)[: len(kept)], *sizes))
        have = [*kept, *self.produced]
        want = self.labels(self.outputs, have)
        return ops.transpose(y, [have.index(a) for a in want])

    def output_rows(self, y):
        """Outputs, in NumPy, as `(rows, prod(produced))`, with the rows of `as_rows`."""
        have = self.labels(self.outputs, y.shape)
        axes_of_inputs = len(have) - len(self.outputs) + len(self.inputs)
        kept = [a for a in self.labels(self.inputs, (None,) * axes_of_inputs) if a in have]
        order = [have.index(a) for a in (*kept, *self.produced)]
        y = y.transpose(order)
        return y.reshape(-1, math.prod(y.shape[len(kept) :]))

    def as_matrix(self, kernel):
        """A full kernel as `(prod(contracted), prod(produced))`, in NumPy."""
        order = [self.kernel.index(a) for a in (*self.contracted, *self.produced)]
        kernel = kernel.transpose(order)
        return kernel.reshape(math.prod(kernel.shape[: len(self.contracted)]), -1)

    def from_matrix(self, matrix, kernel_shape):
        """The way back."""
        have = [*self.contracted, *self.produced]
        tensor = ops.reshape(matrix, self.sizes(have, kernel_shape))
        return ops.transpose(tensor, [have.index(a) for a in self.kernel])

    def labels(self, labels, shape):
        """A label for each axis of a shape: numbers for those of the ellipsis."""
        more = [str(i) for i in range(len(shape) - len(labels))]
        return [*(more if self.before else ()), *labels, *(more if self.after else ())]


def _as_factors(sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Two axes, such as heads and their width, as the factors of their product."""
    return sizes if len(sizes) == 2 and min(sizes) > 1 else None


class EinsumDenseConverter(Converter):
    """Between `keras.layers.EinsumDense` and `BilinearEinsumDense`."""

    def to_matrix(self, full: keras.Layer, kernel: np.ndarray) -> np.ndarray:
        return _Axes(full.equation).as_matrix(kernel)

    def from_matrix(self, bilinear: keras.Layer, kernel: Any) -> Any:
        return _Axes(bilinear.equation).from_matrix(kernel, bilinear.kernel_shape)

    def input_shape(self, layer: keras.Layer) -> tuple:
        axes = _Axes(layer.equation)
        kernel_shape = layer.kernel_shape if is_bilinear(layer) else layer.kernel.shape
        outputs = layer.partial_output_shape if axes.before else (None, *layer.partial_output_shape)
        sizes = dict(zip(axes.outputs, outputs, strict=False))
        sizes |= dict(zip(axes.kernel, kernel_shape, strict=True))
        more = (None,) * (layer.input_spec.ndim - len(axes.inputs))
        known = tuple(sizes.get(label) for label in axes.inputs)
        return (*more, *known) if axes.before else (*known, *more)

    def rows(self, full: keras.Layer, inputs: np.ndarray, **call: Any) -> dict[str, list]:
        axes = _Axes(full.equation)
        if inputs.ndim != full.input_spec.ndim:
            raise ValueError(
                f"`calibration_data` must be inputs of the layer {full.name!r}, of "
                f"{full.input_spec.ndim} axes. Received: an array of shape {inputs.shape}"
            )
        rows, _ = axes.as_rows(inputs)
        rows = ops.convert_to_numpy(rows)
        if rows.shape[-1] != math.prod(axes.sizes(axes.contracted, full.kernel.shape)):
            raise ValueError(
                f"`calibration_data` must be inputs of the layer {full.name!r}. "
                f"Received: an array of shape {inputs.shape}"
            )
        return {"kernel": [rows.reshape(-1, rows.shape[-1])]}

    def output_rows(self, full: keras.Layer, outputs: np.ndarray) -> np.ndarray:
        return _Axes(full.equation).output_rows(outputs)

    def bias_rows(self, full: keras.Layer, outputs: np.ndarray) -> np.ndarray:
        bias = np.broadcast_to(ops.convert_to_numpy(full.bias), outputs.shape)
        return self.output_rows(full, bias)

    def has_bias(self, full: keras.Layer) -> bool:
        # A bias without all output axes of the kernel cannot take every mean.
        produced = _Axes(full.equation).produced
        return full.bias is not None and set(full.bias_axes) >= {*produced}

    def add_to_bias(
        self, bilinear: keras.Layer, bias: np.ndarray, missing: np.ndarray, index: int
    ) -> np.ndarray:
        axes = _Axes(bilinear.equation)
        produced, outputs = axes.produced, axes.outputs
        missing = missing.reshape(axes.sizes(produced, bilinear.kernel_shape))
        missing = missing.transpose([produced.index(a) for a in outputs if a in produced])
        # The bias has the axes of the outputs from its first one on, and more behind an ellipsis.
        first = min(map(outputs.index, bilinear.bias_axes))
        sizes = iter(missing.shape)
        shape = [next(sizes) if a in produced else 1 for a in outputs[first:]]
        return bias + missing.reshape(*shape, *[1] * (bias.ndim - len(shape)))

    def applications(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        # An axis that the equation sums over before it multiplies counts once.
        axes = _Axes(layer.equation)
        kernel_shape = layer.kernel_shape if is_bilinear(layer) else layer.kernel.shape
        return math.prod(outputs) // math.prod(axes.sizes(axes.produced, kernel_shape))


@register(keras.layers.EinsumDense, converter=EinsumDenseConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearEinsumDense(BilinearLayer):
    """A dense layer over any axes whose kernel is a sum of Kronecker products.

    It stands for `keras.layers.EinsumDense`, from which Transformers are made.
    The axes that the kernel takes from the inputs make the rows of a matrix, the
    axes that it adds to the outputs its columns. This matrix is the sum of
    Kronecker products.

    Args:
        equation: an einsum of the inputs and the kernel, such as
            `"abc,cde->abde"`. Each axis of the kernel must be one of the inputs
            only or one of the outputs only.
        output_shape: the shape of the outputs without the batch axis; `None` for
            an axis that is that of the inputs.
        activation: activation function; `None` applies none.
        bias_axes: axes of the outputs that the bias has; `None` for no bias.
        kernel_initializer: initializer of the full kernel, as a matrix. The
            factors start such that their product has the variance that it gives.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of each stored factor.
        bias_regularizer: regularizer of the bias.
        kernel_constraint: constraint of each stored factor.
        bias_constraint: constraint of the bias.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(d1, d2)` with a product of at least that of the axes
            taken from the inputs. `None` takes the axes themselves where they
            are two, such as heads and their width, and else near-square factors.
        output_factors: `(u1, u2)` with a product of at least that of the axes
            added to the outputs. `None` chooses them likewise.
        implementation: `"factorized"` multiplies by one factor after the other,
            `"materialized"` forms the kernel first. `"auto"` takes the way with
            fewer multiplications; on a GPU it forms all kernels but large ones.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        That of the first operand of the equation.

    Output shape:
        That of its result.

    Raises:
        ValueError: if the equation has another form, its kernel is no matrix, or
            another argument is not valid.

    Example:

    >>> layer = BilinearEinsumDense("abc,cde->abde", (None, 8, 32), bias_axes="de")
    >>> layer(np.ones((2, 10, 256), "float32")).shape == (2, 10, 8, 32)
    True
    >>> layer.count_params()  # an EinsumDense layer has 65,792
    896

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    def __init__(
        self,
        equation: str,
        output_shape: int | Sequence[int | None],
        activation: str | Callable | None = None,
        bias_axes: str | None = None,
        kernel_initializer: str | dict | Callable = "glorot_uniform",
        bias_initializer: str | dict | Callable = "zeros",
        kernel_regularizer: str | dict | Callable | None = None,
        bias_regularizer: str | dict | Callable | None = None,
        kernel_constraint: str | dict | Callable | None = None,
        bias_constraint: str | dict | Callable | None = None,
        rank: int = 1,
        input_factors: Sequence[int] | None = None,
        output_factors: Sequence[int] | None = None,
        implementation: str = "auto",
        **kwargs,
    ):
        super().__init__(
            rank=rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
            **kwargs,
        )
        self._axes = _Axes(equation)
        self.equation = equation
        partial = (output_shape,) if isinstance(output_shape, int) else tuple(output_shape)
        self.partial_output_shape = partial
        self.bias_axes = bias_axes
        self.activation = activations.get(activation)
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.bias_constraint = constraints.get(bias_constraint)
        self.bias, self.kernel_shape = None, ()

    def factorize(self, input_shape: tuple) -> dict[str, Factorization]:
        kernel_shape, *_ = self._shapes(input_shape)
        inputs, outputs = (
            self._axes.sizes(labels, kernel_shape)
            for labels in (self._axes.contracted, self._axes.produced)
        )
        if None in inputs:
            raise ValueError(
                "The axes that the kernel of `BilinearEinsumDense` takes from the inputs must be "
                f"known. Received: input_shape={input_shape}, equation={self.equation!r}"
            )
        return {
            "kernel": self.factorization_of(
                math.prod(inputs),
                math.prod(outputs),
                input_factors=self.input_factors or _as_factors(inputs),
                output_factors=self.output_factors or _as_factors(outputs),
            )
        }

    def build(self, input_shape: tuple):
        self.kernel_shape, bias_shape, _ = self._shapes(input_shape)
        self._kernel = self.add_kernel(
            "kernel",
            self.factorize(input_shape)["kernel"],
            self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        if bias_shape is not None:
            self.bias = self.add_weight(
                name="bias",
                shape=bias_shape,
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape))
        self.built = True

    def _shapes(self, input_shape):
        """The shapes of kernel, bias and outputs of the stock layer."""
        return graph.analyze_einsum(
            self.equation, self.bias_axes, input_shape, self.partial_output_shape
        )

    def call(self, inputs, training: bool | None = None):
        del training  # changes nothing
        x, kept = self._axes.as_rows(inputs)
        x = self._kernel.project(x)
        x = self._axes.from_rows(x, kept, self.kernel_shape)
        if self.bias is not None:
            x = ops.add(x, self.bias)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        _, _, shape = self._shapes(input_shape)
        labels = self._axes.labels(self._axes.inputs, input_shape)
        pairs = zip(labels, input_shape, strict=True)
        sizes = {label: size for label, size in pairs if size is not None}
        # The stock layer leaves axes open, and turns those of an ellipsis round.
        return tuple(
            sizes.get(label, size)
            for label, size in zip(self._axes.labels(self._axes.outputs, shape), shape, strict=True)
        )

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "equation": self.equation,
            "output_shape": self.partial_output_shape,
            "activation": activations.serialize(self.activation),
            "bias_axes": self.bias_axes,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": constraints.serialize(self.kernel_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
        }
