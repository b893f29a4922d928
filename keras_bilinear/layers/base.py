"""The base of the bilinear layers: their own arguments, their kernels, the way from and to full."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import initializers

from keras_bilinear.kronecker.factorization import Factorization, check_factors, check_positive_int
from keras_bilinear.kronecker.initializers import draw_full
from keras_bilinear.layers.calibration import calibrate
from keras_bilinear.layers.converter import (
    bilinear_converter,
    check_built,
    check_full,
    converter_of,
)
from keras_bilinear.layers.kernel import KroneckerKernel

IMPLEMENTATIONS = ("auto", "factorized", "materialized")
SHARED = ("rank", "input_factors", "output_factors", "implementation")


class BilinearLayer(keras.layers.Layer):
    """Base class of layers whose kernels are sums of Kronecker products.

    A layer of your own inherits from it, says in `factorize` what shapes its kernels have,
    makes them in `build` by `add_kernel`, and multiplies by them in `call`: see
    `KroneckerKernel.project`. `keras_bilinear.register` makes it stand for a full layer.

    Args:
        *args: arguments of the next base class, if the layer has another one.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(d1, d2)` with a product of at least the width of the inputs;
            `None` chooses near-square factors.
        output_factors: `(u1, u2)` with a product of at least the number of units; `None`
            chooses near-square factors.
        implementation: `"factorized"` multiplies by one factor after the other,
            `"materialized"` forms the kernel first, `"auto"` takes what is faster.
        **kwargs: arguments of `keras.layers.Layer`.

    Attributes:
        full_class: class of the full layer that the layer stands for; `register` sets it.
        own_arguments: names of the arguments that the full layer does not have.

    Raises:
        ValueError: if an argument is not valid.

    Example:

    >>> class BilinearSquare(BilinearLayer):
    ...     def factorize(self, input_shape):
    ...         width = input_shape[-1]
    ...         return {"kernel": self.factorization_of(width, width)}
    ...
    ...     def build(self, input_shape):
    ...         self.add_kernel("kernel", self.factorize(input_shape)["kernel"])
    ...
    ...     def call(self, inputs):
    ...         return self.kernels["kernel"].project(inputs)
    >>> layer = BilinearSquare(rank=2)
    >>> layer(np.ones((8, 64), "float32")).shape == (8, 64)
    True
    >>> layer.count_params()  # a full kernel has 4,096
    256

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    full_class: type[keras.Layer]
    own_arguments: tuple[str, ...] = SHARED
    _kernels: dict[str, KroneckerKernel]

    def __init__(
        self,
        *args,
        rank: int = 1,
        input_factors: Sequence[int] | None = None,
        output_factors: Sequence[int] | None = None,
        implementation: str = "auto",
        **kwargs,
    ):
        rank = check_positive_int("rank", rank)
        input_factors = check_factors("input_factors", input_factors)
        output_factors = check_factors("output_factors", output_factors)
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"`implementation` must be one of {IMPLEMENTATIONS}. "
                f"Received: implementation={implementation!r}"
            )
        super().__init__(*args, **kwargs)
        self.rank = rank
        self.input_factors = input_factors
        self.output_factors = output_factors
        self.implementation = implementation
        self._kernels = {}

    def factorize(self, input_shape: tuple) -> dict[str, Factorization]:
        """The shapes of the kernels, for inputs of some shape.

        Nothing is built: plans ask for shapes alone.

        Args:
            input_shape: shape of the inputs, as `build` gets it.

        Returns:
            A `Factorization` for the name of each kernel of the full layer, such as
            `{"kernel": self.factorization_of(input_shape[-1], self.units)}`.

        Raises:
            ValueError: if the layer cannot take such inputs.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must implement `factorize`.")

    def factorization_of(self, input_dim: int, output_dim: int, **options: Any) -> Factorization:
        """The shapes of one kernel with the rank and the factors of the layer's arguments.

        Args:
            input_dim: number of inputs.
            output_dim: number of outputs.
            **options: other arguments of `Factorization.create`.
        """
        own = {
            "input_factors": self.input_factors,
            "output_factors": self.output_factors,
            "rank": self.rank,
        }
        return Factorization.create(
            input_dim=input_dim, output_dim=output_dim, **{**own, **options}
        )

    def add_kernel(
        self,
        name: str,
        factorization: Factorization,
        initializer: str | dict | Callable = "glorot_uniform",
        regularizer: Callable | None = None,
        constraint: Callable | None = None,
        kernel_class: type[KroneckerKernel] = KroneckerKernel,
        variables: str | None = None,
        **options: Any,
    ) -> KroneckerKernel:
        """Adds the variables of a kernel; `build` calls it once for each kernel.

        Args:
            name: name of the kernel in the full layer, such as `"kernel"`.
            factorization: shapes of the kernel, as `factorize` gives them.
            initializer: initializer of the full kernel. The factors start such that the
                kernel has the variance that it gives. If it gives a matrix of the shape of
                the full kernel alone, they start at the nearest sum.
            regularizer: regularizer of each stored factor; `None` for none.
            constraint: constraint of each stored factor; `None` for none.
            kernel_class: class of the kernel.
            variables: what the names of both variables end with, after `left_` and
                `right_`; `None` takes `name`.
            **options: other arguments of the class.

        Returns:
            The kernel. The property `kernels` has it as well.
        """
        kernel = kernel_class(
            self,
            factorization,
            initializers.get(initializer),
            regularizer=regularizer,
            constraint=constraint,
            name=variables or name,
            draw=functools.partial(self._draw_full, factorization),
            **{"implementation": self.implementation, **options},
        )
        self._kernels[name] = kernel
        return kernel

    def _draw_full(self, factorization, initializer):
        """What an initializer gives for the kernel of the full layer, in `full_shape`."""
        converter, shape = bilinear_converter(type(self)), factorization.full_shape
        if converter is None:
            return draw_full(initializer, shape)
        shape = converter.from_matrix(self, np.zeros(shape, "bool")).shape
        return converter.to_matrix(self, draw_full(initializer, shape))

    @property
    def kernels(self) -> dict[str, KroneckerKernel]:
        """The kernels by their names in the full layer; none before the layer is built."""
        return dict(self._kernels)

    @property
    def factorization(self) -> Factorization:
        """The `Factorization` that was chosen when the layer was built."""
        return self._built_kernel().factorization

    @property
    def left_kernel(self) -> keras.Variable:
        """The stored left factor, a variable of shape `(rank, *left_window, d1, u1)`.

        The kernel has a constant gain besides the factors, which makes them train at the full
        layer's learning rate: `kernel` includes the gain.
        """
        return self._built_kernel().left

    @property
    def right_kernel(self) -> keras.Variable:
        """The stored right factor, a variable of shape `(rank, *right_window, d2, u2)`."""
        return self._built_kernel().right

    @property
    def kernel(self):
        """The kernel that the factors stand for, a new tensor of full size."""
        kernel = self._built_kernel().materialize()
        return converter_of(self).from_matrix(self, kernel)

    def _built_kernel(self) -> KroneckerKernel:
        check_built(self)
        return next(iter(self._kernels.values()))

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in self.own_arguments},
        }

    @classmethod
    def from_full(
        cls,
        layer: keras.layers.Layer,
        rank: int = 1,
        input_factors: Sequence[int] | None = None,
        output_factors: Sequence[int] | None = None,
        implementation: str = "auto",
        calibration_data=None,
    ) -> Self:
        """Makes a bilinear layer from a built full layer.

        The factors are the Kronecker sum nearest to the full kernel (singular
        value decomposition of the rearranged kernel; Van Loan and Pitsianis,
        1993). It is exact when the rank reaches
        `layer.factorization.sufficient_rank`.

        With calibration data, the factors and the bias are fitted such that the
        outputs before the activation differ least on them (alternating least
        squares on both factors). That keeps far more of what a trained
        network does.

        Args:
            layer: a built layer of exactly the full class that this layer
                stands for. It stays as it is.
            rank: number of Kronecker terms.
            input_factors: `(d1, d2)`; `None` chooses them.
            output_factors: `(u1, u2)`; `None` chooses them.
            implementation: `"auto"`, `"factorized"` or `"materialized"`.
            calibration_data: inputs of the layer, an array or an iterable of
                arrays, each of which is read once.

        Returns:
            A built layer with the same name and options; a constraint of the
            kernel becomes a constraint of each factor.

        Raises:
            TypeError: if `layer` is not of the stock class, or `calibration_data`
                neither an array nor iterable.
            ValueError: if `layer` is not built, is quantized or holds NaN or
                infinite weights; if there are no calibration data, or they are
                not finite or no inputs of the layer; or if another argument is
                not valid.
        """
        return convert(
            cls,
            layer,
            calibration_data,
            rank=rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
        )

    def expand(self) -> keras.layers.Layer:
        """Makes the stock Keras layer that computes the same.

        Returns:
            A built layer of the stock class with the same name, options and
            bias, and the materialized kernel.

        Raises:
            AttributeError: if the layer is not built.
        """
        return converter_of(self).expand(self)


def convert(cls: type, full: keras.Layer, calibration_data: Any, **own: Any) -> keras.Layer:
    """A bilinear layer of a class from a full layer; what `from_full` of the class does.

    Args:
        cls: a registered class of bilinear layers, or a subclass.
        full: the full layer.
        calibration_data: inputs of the layer; `None` takes the nearest factors.
        **own: arguments that only the bilinear layer has.

    Raises:
        TypeError: if the class is not registered, or if the full layer is of another class
            than the one that it stands for.
        ValueError: if the full layer or an argument is not valid.
    """
    converter = bilinear_converter(cls)
    if converter is None:
        raise TypeError(
            f"`{cls.__name__}` stands for no full layer: call `keras_bilinear.register` first."
        )
    check_full(converter, full)
    return converter.from_full(full, calibrate(converter, full, calibration_data), **own)
