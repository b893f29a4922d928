"""How a full layer and its bilinear layer belong together: the protocol and the registry.

A `Converter` knows one pair of classes. It reads the kernels of the full layer, the rows that
they are applied to, and makes either layer from the other. Plans, fits, rewrites, the callback,
reports and exports know layers by their converters alone. So a layer of your own joins them by
`register`, in one file.
"""

import functools
import inspect
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bilinear.keras_private.cloning import copy_flags
from keras_bilinear.keras_private.gradients import gradients as gradients_of
from keras_bilinear.kronecker.factorization import Factorization
from keras_bilinear.kronecker.initializers import to_be_overwritten
from keras_bilinear.kronecker.statistics import IndexCounts, InputStatistics

# Arguments of `keras.layers.Layer` that both layers have.
_OF_EVERY_LAYER = ("name", "trainable", "dtype", "activity_regularizer")
# Kernels with more inputs are not fitted to data: their Gram matrix would take gigabytes.
MOST_INPUTS = 16_384


class Converter:
    """Converts between a full layer and the bilinear layer that stands for it.

    The methods of this class fit a dense layer: one kernel, an attribute named `kernel` of shape
    `(input_dim, output_dim)`, that multiplies the last axis of the inputs, and a `bias` or none.
    A converter for another kind of layer overrides what differs. Methods that take a layer say
    whether it is a full or a bilinear layer; `layer` alone may be either.

    Args:
        full_class: class of the full layer.
        bilinear_class: class of the bilinear layer: a `keras.Layer` with a property `kernels`
            (a `KroneckerKernel` for each name in `kernel_names` that the layer has), a method
            `factorize(input_shape)` (a `Factorization` for each of these kernels) and a
            tuple `own_arguments` (arguments of its constructor that the full layer lacks).
            `BilinearLayer` has all three.

    Attributes:
        kernel_names: attributes of the full layer that become sums of Kronecker products.
        shared_names: attributes of both layers with the weights that stay as they are; a fit
            may add to the one that is named `bias`.
        constraint_names: arguments of the full layer that constrain its kernels. A rewrite
            leaves a layer with such a constraint alone, as factors do not keep it.
        width: argument of both layers that sets the number of output channels, if a plan may
            widen the layer (`scale=` of `plan_rewrite`); `None` if not.
    """

    kernel_names: tuple[str, ...] = ("kernel",)
    shared_names: tuple[str, ...] = ("bias",)
    constraint_names: tuple[str, ...] = ("kernel_constraint",)
    width: str | None = None

    def __init__(self, full_class: type, bilinear_class: type):
        self.full_class = full_class
        self.bilinear_class = bilinear_class

    # What the full layer computes.

    def holder(self, layer: keras.Layer) -> keras.Layer:
        """What has the kernels as attributes: the layer itself, or its cell."""
        return layer

    def to_matrix(self, full: keras.Layer, kernel: np.ndarray) -> np.ndarray:
        """A kernel of the full layer in the shape of its `Factorization.full_shape`."""
        return kernel

    def from_matrix(self, bilinear: keras.Layer, kernel: Any) -> Any:
        """The way back: a tensor of `full_shape` in the shape that the full layer has."""
        return kernel

    def count_blocks(self, full: keras.Layer) -> int:
        """How many matrices lie side by side in a kernel: groups, or gates."""
        return 1

    def weights(self, full: keras.Layer) -> dict[str, np.ndarray]:
        """The kernels, as `to_matrix` gives them, and the shared weights, by their names.

        Raises:
            ValueError: if a weight is NaN or infinite.
        """
        weights = {}
        for name in (*self.kernel_names, *self.shared_names):
            variable = getattr(self.holder(full), name, None)
            if variable is None:
                continue
            values = ops.convert_to_numpy(variable)
            # A copy of a precision that NumPy calculates in.
            values = values.astype("float64" if values.dtype == "float64" else "float32")
            if not np.isfinite(values).all():
                raise ValueError(
                    f"`{self.bilinear_class.__name__}.from_full` takes finite weights. "
                    f"Received: layer={full!r} with NaN or infinite values in `{name}`"
                )
            weights[name] = self.to_matrix(full, values) if name in self.kernel_names else values
        return weights

    def kernels(self, full: keras.Layer) -> dict[str, list[np.ndarray]]:
        """For each kernel its blocks, matrices of shape `(inputs, outputs)`.

        Raises:
            ValueError: if a weight is NaN or infinite.
        """
        blocks, weights = self.count_blocks(full), self.weights(full)
        return {
            name: np.split(weights[name].reshape(-1, weights[name].shape[-1]), blocks, axis=1)
            for name in self.kernel_names
            if name in weights
        }

    def rows(self, full: keras.Layer, inputs: np.ndarray, **call: Any) -> dict[str, list]:
        """What each block of each kernel multiplies in a call of the full layer.

        Args:
            full: a built full layer.
            inputs: inputs of the call.
            **call: other arguments of the call, such as `mask`.

        Returns:
            For each kernel a list with an array of shape `(rows, inputs)` for each block.

        Raises:
            ValueError: if the layer cannot take the inputs.
        """
        check_width(full, inputs, self.input_dim(full))
        return {self.kernel_names[0]: [inputs.reshape(-1, inputs.shape[-1])]}

    def gradients(
        self,
        full: keras.Layer,
        inputs: np.ndarray,
        rows: dict[str, list],
        gradients: Any,
        **call: Any,
    ) -> dict[str, list] | None:
        """The gradients of a loss at what each block of each kernel makes in a call.

        Args:
            full: a built full layer.
            inputs: inputs of the call.
            rows: what the blocks multiply in the call, as `rows` gives it.
            gradients: the gradients of the loss at the outputs of the call, of their structure.
            **call: other arguments of the call, such as `mask`.

        Returns:
            For each kernel a list with an array of shape `(rows, outputs)` for each block, in
            the order of `rows`. Where `rows` leaves some out, the others are larger, so that
            the sum of their squares is that of all, on average. `None` if they are not known: this
            method knows layers with one kernel that a bias and an `activation` may follow.
        """
        if len(rows) > 1:
            return None
        (name,) = rows
        outputs, gradients = gradients, self.output_rows(full, gradients)
        activation = getattr(full, "activation", None)
        if activation not in (None, keras.activations.linear):
            blocks = zip(rows[name], self.kernels(full)[name], strict=True)
            products = np.concatenate([x @ kernel for x, kernel in blocks], axis=1)
            if full.bias is not None:
                products = products + self.bias_rows(full, outputs)
            (gradients,) = gradients_of(
                lambda tensors: [activation(tensors[0])],
                [products.astype("float32")],
                lambda _: [gradients],
            )
        return {name: np.split(gradients, self.count_blocks(full), axis=1)}

    def output_rows(self, full: keras.Layer, outputs: np.ndarray) -> np.ndarray:
        """Outputs of a call in the order of the rows: an array of shape `(rows, outputs)`."""
        return outputs.reshape(-1, outputs.shape[-1])

    def bias_rows(self, full: keras.Layer, outputs: np.ndarray) -> np.ndarray:
        """What the bias adds to outputs, in a shape that broadcasts to that of `output_rows`."""
        return ops.convert_to_numpy(full.bias)

    def statistics(self, name: str, block: np.ndarray) -> InputStatistics | IndexCounts:
        """Empty statistics of the rows of one block of the kernel of that name."""
        return InputStatistics(block)

    def has_bias(self, full: keras.Layer) -> bool:
        """Whether a bias can take the mean of the error that a fit leaves."""
        return getattr(self.holder(full), "bias", None) is not None

    def add_to_bias(
        self, bilinear: keras.Layer, bias: np.ndarray, missing: np.ndarray, index: int
    ) -> np.ndarray:
        """The bias with what the outputs of a kernel miss on average added to it.

        Args:
            bilinear: the built bilinear layer.
            bias: the bias, of the shape of the variable.
            missing: an array with a number for each output of the kernel.
            index: position of the kernel in `kernel_names`.
        """
        return bias + missing

    def can_calibrate(self, full: keras.Layer) -> bool:
        """Whether the kernels can be fitted to inputs: not if they have too many inputs."""
        holder = self.holder(full)
        kernels = [getattr(holder, name, None) for name in self.kernel_names]
        return all(math.prod(k.shape[:-1]) <= MOST_INPUTS for k in kernels if k is not None)

    def reason_to_leave(self, full: keras.Layer) -> str:
        """Why a rewrite leaves the layer alone; empty if it need not."""
        if full.dtype_policy.quantization_mode is not None:
            return "quantized"
        if any(getattr(full, name, None) for name in self.constraint_names):
            return "has a constraint, which factors do not keep"
        if getattr(full, "lora_enabled", False):
            return "has LoRA enabled"
        return ""

    # From a full layer to a bilinear one and back.

    def input_dim(self, layer: keras.Layer) -> int:
        """The width of the inputs of a block of the first kernel of a built layer."""
        if is_bilinear(layer):
            return layer.kernels[self.kernel_names[0]].factorization.input_dim
        return getattr(self.holder(layer), self.kernel_names[0]).shape[-2]

    def input_shape(self, layer: keras.Layer) -> tuple:
        """A shape of inputs that a built layer takes; `None` where any size will do."""
        return (None, self.input_dim(layer))

    def options(self, full: keras.Layer) -> dict[str, Any]:
        """The arguments that the bilinear layer has in common with a full layer."""
        accepted = {*inspect.signature(self.bilinear_class.__init__).parameters, *_OF_EVERY_LAYER}
        if "args" in accepted:  # those of the stock layer
            accepted |= {*inspect.signature(self.full_class.__init__).parameters}
        return {name: value for name, value in full.get_config().items() if name in accepted}

    def like(self, full: keras.Layer, **own: Any) -> keras.Layer:
        """A bilinear layer, not built, with the options of a full layer.

        Args:
            full: a built full layer.
            **own: arguments that only the bilinear layer has, such as `rank`.
        """
        return self.bilinear_class.from_config({**self.options(full), **own})

    def built_like(self, full: keras.Layer, **own: Any) -> keras.Layer:
        """A built bilinear layer with the options of a full layer, trainable, with any weights.

        Args:
            full: a built full layer.
            **own: arguments that only the bilinear layer has, such as `rank`.
        """
        bilinear = self.like(full, **own)
        # Trainable while it makes its variables, see `copy_flags`.
        bilinear.trainable = True
        with to_be_overwritten():
            bilinear.build(self.input_shape(full))
        return bilinear

    def factorizations(self, full: keras.Layer) -> dict[str, Factorization]:
        """The shapes that the kernels of the bilinear layer would have, at rank 1."""
        return self.like(full).factorize(self.input_shape(full))

    def copy_shared(self, source: keras.Layer, target: keras.Layer) -> None:
        """Copies the weights that both layers have from one built layer to the other."""
        for name in self.shared_names:
            values = getattr(self.holder(source), name, None)
            if values is not None:
                # Through NumPy, as JAX gives away the memory of what it updates.
                getattr(self.holder(target), name).assign(ops.convert_to_numpy(values))

    def from_full(self, full: keras.Layer, calibration=None, **own: Any) -> keras.Layer:
        """Makes the bilinear layer from a full layer.

        Args:
            full: a built full layer. It stays as it is.
            calibration: the `Calibration` of the layer, to fit the factors to its inputs;
                `None` takes the factors that are nearest to the kernel.
            **own: arguments that only the bilinear layer has, such as `rank`.

        Returns:
            A built bilinear layer.

        Raises:
            ValueError: if a weight of the full layer is NaN or infinite, or if an argument is
                not valid.
        """
        weights = self.weights(full)
        bilinear = self.built_like(full, **own)
        self.copy_shared(full, bilinear)
        bias = weights.get("bias")
        for index, (name, kernel) in enumerate(bilinear.kernels.items()):
            if calibration is None:
                kernel.assign(weights[name])
                continue
            missing = kernel.fit(calibration.statistics[name], calibration.has_bias)
            if bias is not None and calibration.has_bias:
                bias = self.add_to_bias(bilinear, bias, missing, index)
        if bias is not None:
            self.holder(bilinear).bias.assign(bias)
        self._copy_flags(full, bilinear)
        return bilinear

    def unbuilt_full(self, bilinear: keras.Layer) -> keras.Layer:
        """A full layer, not built, with the options of a bilinear layer."""
        own = bilinear.own_arguments
        config = {name: value for name, value in bilinear.get_config().items() if name not in own}
        return self.full_class.from_config(config)

    def expand(self, bilinear: keras.Layer) -> keras.Layer:
        """Makes the full layer that computes the same as a built bilinear layer.

        Raises:
            AttributeError: if the bilinear layer is not built.
        """
        check_built(bilinear)
        kernels = {
            name: self.from_matrix(bilinear, kernel.materialize())
            for name, kernel in bilinear.kernels.items()
        }
        full = self.unbuilt_full(bilinear)
        full.trainable = True
        full.build(self.input_shape(bilinear))
        for name, kernel in kernels.items():
            getattr(self.holder(full), name).assign(kernel)
        self.copy_shared(bilinear, full)
        self._copy_flags(bilinear, full)
        return full

    def _copy_flags(self, source: keras.Layer, target: keras.Layer) -> None:
        """Freezes what is frozen in the other layer: layer, cell, kernels and shared weights."""
        copy_flags(source, target)
        for name in self.kernel_names:
            # A kernel with LoRA is a tensor, without a flag.
            flags = [getattr(v, "trainable", True) for v in self._variables(source, name)]
            for variable in self._variables(target, name):
                variable.trainable = all(flags)
        for name in self.shared_names:
            variable = getattr(self.holder(source), name, None)
            copy = getattr(self.holder(target), name, None)
            if variable is not None and copy is not None:
                copy.trainable = variable.trainable

    def _variables(self, layer, name):
        """The variables that stand for a kernel: the kernel, both factors, or none."""
        if is_bilinear(layer):
            kernel = layer.kernels.get(name)
            return [] if kernel is None else [kernel.left, kernel.right]
        kernel = getattr(self.holder(layer), name, None)
        return [] if kernel is None else [kernel]

    # What a call costs.

    def applications(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        """How often a call multiplies a row by the kernels, each time by all of them.

        Args:
            layer: a built layer.
            inputs: shape of the inputs of the call.
            outputs: shape of its outputs.
        """
        return math.prod(inputs) // self.input_dim(layer)

    def macs(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        """Multiply-accumulate operations of the kernels in a call; see `applications`."""
        if is_bilinear(layer):
            row = sum(kernel.macs for kernel in layer.kernels.values())
        else:
            holder = self.holder(layer)
            kernels = [getattr(holder, name, None) for name in self.kernel_names]
            row = sum(math.prod(kernel.shape) for kernel in kernels if kernel is not None)
        return self.applications(layer, inputs, outputs) * row

    def workspace(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        """Numbers that a call holds between its inputs and its outputs.

        A bilinear layer that applies its factors holds the numbers between both of them. Weights
        do not count, nor does a kernel that a bilinear layer forms, as that of a full layer does
        not.
        """
        if not is_bilinear(layer):
            return 0
        rows = self.applications(layer, inputs, outputs)
        return sum(rows * between_factors(kernel) for kernel in layer.kernels.values())


def between_factors(kernel: Any) -> int:
    """Numbers between both factors of a kernel for each row; none if the kernel is formed."""
    return 0 if kernel.materialized else kernel.between


_OF_FULL: dict[type, Converter] = {}
_OF_BILINEAR: dict[type, Converter] = {}


def register(
    full_class: type, bilinear_class: type | None = None, converter: type[Converter] = Converter
) -> Any:
    """Makes a bilinear layer stand for a full layer, everywhere in the package.

    Afterwards `plan_rewrite`, `rewrite_model`, `Rewriter`, `BilinearRewrite`, `summarize`,
    `compare`, `expand_model` and `export_litert` treat both classes as they treat the layers of
    Keras and of this package. Register before you plan, rewrite or load a model.

    Args:
        full_class: class of the full layer, a `keras.Layer`. A subclass that adds nothing but
            a name counts as its base; other subclasses need a registration of their own.
        bilinear_class: class of the bilinear layer, a `BilinearLayer`. `None` makes `register`
            a decorator of that class.
        converter: class of the `Converter` between both. The default suits a layer with one
            kernel of shape `(input_dim, output_dim)`, named `kernel`.

    Returns:
        `bilinear_class`, or a decorator.

    Raises:
        TypeError: if a class is none of these.

    Example:

    >>> @keras.saving.register_keras_serializable()
    ... class MyDense(keras.layers.Dense):
    ...     def call(self, inputs):
    ...         return 2 * super().call(inputs)
    >>> @register(MyDense)
    ... @keras.saving.register_keras_serializable()
    ... class MyBilinearDense(BilinearDense):
    ...     def call(self, inputs):
    ...         return 2 * super().call(inputs)
    >>> model = keras.Sequential([keras.Input((64,)), MyDense(256)])
    >>> rewrite_model(model, rank=2).layers[0].__class__.__name__
    'MyBilinearDense'
    """
    if bilinear_class is None:
        return functools.partial(register, full_class, converter=converter)
    _check_class("full_class", full_class, ())
    _check_class("bilinear_class", bilinear_class, ("kernels", "factorize", "own_arguments"))
    if not (isinstance(converter, type) and issubclass(converter, Converter)):
        raise TypeError(f"`converter` must be a `Converter` class. Received: {converter!r}")
    bilinear_class.full_class = full_class
    _OF_FULL[full_class] = _OF_BILINEAR[bilinear_class] = converter(full_class, bilinear_class)
    return bilinear_class


def _check_class(name: str, value: Any, attributes: tuple[str, ...]) -> None:
    if not (isinstance(value, type) and issubclass(value, keras.Layer)):
        raise TypeError(f"`{name}` must be a class of Keras layers. Received: {name}={value!r}")
    missing = [attribute for attribute in attributes if not hasattr(value, attribute)]
    if missing:
        raise TypeError(
            f"`{name}` must be a `BilinearLayer`, which has {', '.join(attributes)}. "
            f"Received: {name}={value!r} without {', '.join(missing)}"
        )


def full_converter(cls: type) -> Converter | None:
    """The converter of a class of full layers; `None` if no bilinear layer stands for it."""
    return look_up(cls, _OF_FULL)


def bilinear_converter(cls: type) -> Converter | None:
    """The converter of a class of bilinear layers, or of its nearest registered base.

    A subclass that is not registered gets a converter that makes layers of the subclass.
    """
    for base in cls.__mro__:
        if base in _OF_BILINEAR:
            found = _OF_BILINEAR[base]
            return found if base is cls else type(found)(found.full_class, cls)
    return None


def converter_of(layer: keras.Layer) -> Converter:
    """The converter of a layer, be it full or bilinear.

    Raises:
        TypeError: if no converter is registered for the class of the layer.
    """
    found = bilinear_converter(type(layer)) or full_converter(type(layer))
    if found is None:
        raise TypeError(
            f"No converter is registered for the layer: call `keras_bilinear.register` first. "
            f"Received: layer={layer!r} (of type {type(layer).__name__})"
        )
    return found


def is_bilinear(layer: keras.Layer) -> bool:
    """Whether a layer is of a class of bilinear layers, or of a subclass of one."""
    return any(base in _OF_BILINEAR for base in type(layer).__mro__)


def counting_converter(layer: keras.Layer) -> Converter | None:
    """The converter that knows what a call of a layer costs; `None` if none does.

    A subclass may compute something else, so only those that add nothing but a name count.
    """
    return look_up(type(layer), _OF_FULL) or look_up(type(layer), _OF_BILINEAR)


def look_up(cls: type, table: dict) -> Any:
    """What a table has for a class; `None` if it has nothing.

    A subclass that adds nothing but its name, as KerasHub has one, counts as its base.
    """
    while cls not in table and len(cls.__bases__) == 1 and _is_only_a_name(cls):
        (cls,) = cls.__bases__
    return table.get(cls)


def _is_only_a_name(cls: type) -> bool:
    about_it = ("__annotations__", "__doc__", "__module__", "_api_export")
    return all(name.startswith(about_it) for name in vars(cls))


def check_full(converter: Converter, layer: keras.Layer) -> None:
    """Checks that `from_full` of the bilinear class can take a layer.

    Raises:
        TypeError: if the layer is not of exactly the full class.
        ValueError: if the layer is not built, or is quantized.
    """
    name, full_class = converter.bilinear_class.__name__, converter.full_class
    if type(layer) is not full_class:
        public = (
            "keras.layers."
            if full_class is getattr(keras.layers, full_class.__name__, None)
            else ""
        )
        raise TypeError(
            f"`{name}.from_full` takes a `{public}{full_class.__name__}`. "
            f"Received: layer={layer!r} (of type {type(layer).__name__})"
        )
    if not layer.built:
        raise ValueError(
            f"`{name}.from_full` takes a built layer: call it on data, or its "
            f"`build` method, first. Received: layer={layer!r}"
        )
    if layer.dtype_policy.quantization_mode is not None:
        raise ValueError(
            f"`{name}.from_full` takes a layer that is not quantized. "
            f"Received: layer={layer!r} with dtype policy {layer.dtype_policy.name!r}"
        )


def check_built(bilinear: keras.Layer) -> None:
    """Checks that a bilinear layer has kernels.

    Raises:
        AttributeError: if it is not built.
    """
    if not bilinear.kernels:
        raise AttributeError(f"You must build the layer '{bilinear.name}' before using its kernel.")


def check_width(layer: keras.Layer, inputs: np.ndarray, width: int, axis: int = -1) -> None:
    """Checks that calibration data can be inputs of a full layer.

    Raises:
        ValueError: if they have another width on an axis.
    """
    if inputs.ndim < 2 or inputs.shape[axis] != width:
        raise ValueError(
            f"`calibration_data` must be inputs of the layer {layer.name!r}, of width {width} on "
            f"axis {axis}. Received: an array of shape {inputs.shape}"
        )
