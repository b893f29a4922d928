"""What every bilinear layer shares: its factors, its arguments, the way from and to full."""

import inspect
from collections.abc import Sequence
from typing import Self

import keras
import numpy as np
from keras import ops

from keras_bilinear.kronecker.factorization import Factorization, check_factors, check_positive_int
from keras_bilinear.kronecker.statistics import Moments
from keras_bilinear.layers.calibration import calibrate

IMPLEMENTATIONS = ("auto", "factorized", "materialized")
SHARED = ("rank", "input_factors", "output_factors", "implementation")
OF_EVERY_LAYER = ("name", "trainable", "dtype", "activity_regularizer")


class BilinearLayer(keras.layers.Layer):
    """Base of the bilinear layers: the arguments they share and the way from and to full ones.

    Subclasses set `full_class`, the stock Keras layer they stand for, and
    `_full_kernels`, pairs of the name of a kernel there, if it has that, and of
    their attribute that stands for it, a `KroneckerKernel` that `build` makes, or
    `None`. `_own_arguments` are those of the constructor that the stock layer does
    not have.

    Those that can be fitted to calibration data have a class method
    `_kernel_inputs(layer, inputs, **options)`. For each kernel of the full layer,
    and each group or gate of it, it returns the rows that it is applied to when
    the layer is called with these inputs, a NumPy array, and other arguments.
    """

    full_class = None
    _full_kernels = (("kernel", "_kernel"),)
    _own_arguments = SHARED

    def __init__(self, *args, rank, input_factors, output_factors, implementation, **kwargs):
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
        self._kernel = None

    @property
    def factorization(self) -> Factorization:
        """The `Factorization` that was chosen when the layer was built."""
        return self._built_kernel().factorization

    @property
    def left_kernel(self) -> keras.Variable:
        """The stored left factor, a variable of shape `(rank, *left_window, d1, u1)`.

        The kernel has a constant gain besides the factors, such that these train at the full
        layer's learning rate: `kernel` includes it.
        """
        return self._built_kernel().left

    @property
    def right_kernel(self) -> keras.Variable:
        """The stored right factor, a variable of shape `(rank, *right_window, d2, u2)`."""
        return self._built_kernel().right

    @property
    def kernel(self):
        """The kernel that the factors stand for, a new tensor of full size."""
        return self._kernel_to_full(self._built_kernel().materialize())

    def _built_kernel(self):
        if self._kernel is None:
            raise AttributeError(f"You must build the layer '{self.name}' before using its kernel.")
        return self._kernel

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in self._own_arguments},
        }

    def _unbuilt_full_layer(self):
        config = self.get_config()
        return self.full_class.from_config(
            {key: value for key, value in config.items() if key not in self._own_arguments}
        )

    def _input_shape(self, kernel_shape, built):
        """Shape of an input of the full layer with a kernel of this shape.

        Args:
            kernel_shape: of the full layer.
            built: a layer with such inputs.
        """
        return (None, kernel_shape[0])

    @staticmethod
    def _kernel_from_full(layer, kernel):
        """The kernel of a full layer, of the shape that its `Factorization` has."""
        return kernel

    def _kernel_to_full(self, kernel):
        """The way back."""
        return kernel

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
        """Makes a bilinear layer from a built full one.

        The factors are the Kronecker sum nearest to the full kernel (singular
        value decomposition of the rearranged kernel; Van Loan and Pitsianis,
        1993). It is exact when the rank reaches
        `layer.factorization.sufficient_rank`.

        With calibration data, the factors and the bias are fitted such that the
        outputs before the activation differ least on them (alternating least
        squares, see `keras_bilinear.kronecker.fit`). That keeps far more of what a trained
        network does.

        Args:
            layer: a built layer of exactly the stock class that this one stands
                for. It is left untouched.
            rank: number of Kronecker terms.
            input_factors: `(d1, d2)`; `None` chooses them.
            output_factors: `(u1, u2)`; `None` chooses them.
            implementation: `"auto"`, `"factorized"` or `"materialized"`.
            calibration_data: inputs of the layer, an array or an iterable of
                arrays, each of which is read once.

        Returns:
            A built layer with the same name and options; a constraint of the
            kernel becomes one of each factor.

        Raises:
            TypeError: if `layer` is not of the stock class, or `calibration_data`
                neither an array nor iterable.
            ValueError: if `layer` is not built, is quantized or holds NaN or
                infinite weights; if there are no calibration data, or they are
                not finite or no inputs of the layer; or if another argument is
                not valid.
        """
        check_full(cls, layer)
        return cls._from_full(
            layer,
            calibrate(cls, layer, calibration_data),
            rank=rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
        )

    @classmethod
    def _from_full(cls, layer, calibration=None, **own_arguments):
        weights = _finite_weights(cls, layer)
        bilinear = cls._like(layer, **own_arguments)
        bias = weights.pop("bias", None)
        for row, (name, kernel) in enumerate(bilinear._kernels.items()):
            if calibration is None:
                kernel.assign(weights[name])
                continue
            missing = kernel.fit(calibration.moments[name], calibration.has_bias)
            if calibration.has_bias:
                bias = bilinear._add_to_bias(bias, missing, row)
        if bias is not None:
            bilinear.bias.assign(bias)
        return bilinear

    @classmethod
    def _like(cls, layer, **own_arguments):
        """A built layer with the options of a full one, and factors of its own."""
        accepted = {*inspect.signature(cls.__init__).parameters, *OF_EVERY_LAYER}
        if "args" in accepted:  # those of the stock layer
            accepted |= {*inspect.signature(cls.full_class.__init__).parameters}
        config = {key: value for key, value in layer.get_config().items() if key in accepted}
        bilinear = cls.from_config({**config, **own_arguments})
        first_kernel, _ = cls._full_kernels[0]
        bilinear.build(bilinear._input_shape(getattr(layer, first_kernel).shape, layer))
        return bilinear

    @property
    def _kernels(self):
        """The `KroneckerKernel` for each kernel of the full layer, by that one's name."""
        kernels = {name: getattr(self, attribute) for name, attribute in self._full_kernels}
        return {name: kernel for name, kernel in kernels.items() if kernel is not None}

    @classmethod
    def _kernel_parts(cls, layer):
        """For each kernel of a full layer those of its groups or gates, `(inputs, outputs)`."""
        count = cls._count_parts(layer)
        weights = _finite_weights(cls, layer)
        return {
            name: np.split(weights[name].reshape(-1, weights[name].shape[-1]), count, axis=1)
            for name, _ in cls._full_kernels
            if name in weights
        }

    def _add_to_bias(self, bias, missing, index):
        """A bias to which is added what the outputs of a kernel miss on average.

        Args:
            bias: an array of the shape of the variable.
            missing: for each output of the kernel; zero where `_has_bias` is not so.
            index: number of the kernel.
        """
        return bias + missing

    @staticmethod
    def _has_bias(layer):
        """Whether a full layer has a bias, which can take the mean of an error."""
        return getattr(layer, "bias", None) is not None

    @staticmethod
    def _count_parts(layer):
        """The number of groups or gates of a full layer."""
        return 1

    @staticmethod
    def _moments(name, kernel):
        """An empty sum over examples for one part of the kernel of that name."""
        return Moments(kernel)

    def expand(self) -> keras.layers.Layer:
        """Makes the stock Keras layer that computes the same.

        Returns:
            A built layer of the stock class with the same name, options and
            bias, and the materialized kernel.

        Raises:
            AttributeError: if the layer is not built.
        """
        self._built_kernel()
        kernels = [self._kernel_to_full(kernel.materialize()) for kernel in self._kernels.values()]
        full = self._unbuilt_full_layer()
        full.build(self._input_shape(kernels[0].shape, self))
        full.set_weights([*kernels, *self.get_weights()[2 * len(kernels) :]])
        return full


def check_full(cls, layer):
    """Checks that `cls.from_full` can take a layer.

    Raises:
        TypeError: if it is not of exactly the stock class that `cls` stands for.
        ValueError: if it is not built or quantized.
    """
    if type(layer) is not cls.full_class:
        raise TypeError(
            f"`{cls.__name__}.from_full` takes a `keras.layers.{cls.full_class.__name__}`. "
            f"Received: layer={layer!r} (of type {type(layer).__name__})"
        )
    if not layer.built:
        raise ValueError(
            f"`{cls.__name__}.from_full` takes a built layer: call it on data, or its "
            f"`build` method, first. Received: layer={layer!r}"
        )
    if layer.dtype_policy.quantization_mode is not None:
        raise ValueError(
            f"`{cls.__name__}.from_full` takes a layer that is not quantized. "
            f"Received: layer={layer!r} with dtype policy {layer.dtype_policy.name!r}"
        )


def _finite_weights(cls, layer):
    """The kernels and the bias of a full layer, in float32 or float64, by their names."""
    weights = {}
    for name in (*dict(cls._full_kernels), "bias"):
        if getattr(layer, name, None) is not None:
            values = ops.convert_to_numpy(getattr(layer, name))
            # A copy of a precision that NumPy calculates in.
            values = values.astype("float64" if values.dtype == "float64" else "float32")
            if not np.isfinite(values).all():
                raise ValueError(
                    f"`{cls.__name__}.from_full` takes finite weights. "
                    f"Received: layer={layer!r} with NaN or infinite values in `{name}`"
                )
            is_kernel = name in dict(cls._full_kernels)
            weights[name] = cls._kernel_from_full(layer, values) if is_kernel else values
    return weights


def check_width(layer, inputs, width, axis=-1):
    """Checks that calibration data can be inputs of a full layer.

    Raises:
        ValueError: if they have another width.
    """
    if inputs.ndim < 2 or inputs.shape[axis] != width:
        raise ValueError(
            f"`calibration_data` must be inputs of the layer {layer.name!r}, of width {width} on "
            f"axis {axis}. Received: an array of shape {inputs.shape}"
        )
