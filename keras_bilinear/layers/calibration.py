"""Statistics of what a full layer sees of calibration data, for the fit of its kernels."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from absl import logging
from keras import ops, tree

from keras_bilinear.data import batches
from keras_bilinear.keras_private.capture import record, record_gradients
from keras_bilinear.kronecker.factorization import Factorization
from keras_bilinear.kronecker.fit import estimate_errors, fit_errors
from keras_bilinear.layers.converter import Converter, converter_of


@dataclasses.dataclass
class Sensitivity:
    """What errors of a full layer do to the loss of its model.

    Attributes:
        gradients: for each kernel, and each of its blocks, the sums over gradients.
        cost_of_zero: by how much the outputs 0 would raise the loss, in all examples together, if
            gradients within the layer are not known; otherwise 0.
    """

    gradients: dict[str, list]
    cost_of_zero: float = 0.0


class Calibration:
    """Collects the inputs of a full layer's kernels, and the gradients at their outputs.

    Args:
        converter: the converter of the layer.
        layer: the built full layer.
    """

    def __init__(self, converter: Converter, layer: keras.Layer):
        self.layer = layer
        self._converter = converter
        self.has_bias = converter.has_bias(layer)
        self.statistics = {
            name: [converter.statistics(name, block) for block in blocks]
            for name, blocks in converter.kernels(layer).items()
        }
        self.sensitivity = Sensitivity(
            {
                name: [block.gradients for block in blocks]
                for name, blocks in self.statistics.items()
            }
        )

    def share(self, sensitivity: "Sensitivity") -> None:
        """Takes over the gradients that another calibration of the layer has collected."""
        self.sensitivity = sensitivity
        for name, blocks in self.statistics.items():
            for block, gradients in zip(blocks, sensitivity.gradients[name], strict=True):
                block.gradients = gradients

    def add_gradients(
        self, inputs: Any, gradients: Any, outputs: Any, **options: Any
    ) -> dict[str, list] | None:
        """Adds the gradients of the loss at the outputs of one call of the full layer.

        Args:
            inputs: the inputs of the call.
            gradients: the gradients, of the structure of the outputs.
            outputs: the outputs.
            **options: other arguments of the call, such as `mask`.

        Returns:
            For each kernel, and each of its blocks, the weights of the rows that the block
            multiplies. `None` if gradients within the layer are not known.
        """
        rows = self._rows(inputs, options)
        gradients = tree.map_structure(lambda x: x.astype("float32"), gradients)
        inputs = np.asarray(ops.convert_to_numpy(inputs))
        found = self._converter.gradients(self.layer, inputs, rows, gradients, **options)
        if found is None:
            self.sensitivity.cost_of_zero += _cost_of_zero(outputs, gradients)
            return None
        return {
            name: [
                sums.add(x, g) for sums, x, g in zip(blocks, rows[name], found[name], strict=True)
            ]
            for name, blocks in self.sensitivity.gradients.items()
        }

    def add(
        self,
        inputs: Any,
        full_inputs: Any = None,
        weights: Mapping[str, list] | None = None,
        **options: Any,
    ) -> None:
        """Adds the inputs of one call.

        Args:
            inputs: inputs that the bilinear layer is going to see.
            full_inputs: inputs that the full layer sees in the full model; `None` for
                the same inputs.
            weights: what `add_gradients` returns for the call; `None` if it is not known.
            **options: other arguments of the call, such as `mask`.

        Raises:
            ValueError: if the layer cannot take the inputs, or if some of them
                are NaN or infinite.
        """
        examples = full = self._rows(inputs, options)
        if full_inputs is not None:
            full = self._rows(full_inputs, options)
        for name, blocks in self.statistics.items():
            for index, block in enumerate(blocks):
                of_block = None if weights is None else weights[name][index]
                block.add(examples[name][index], full[name][index], of_block)

    def _rows(self, inputs, options):
        inputs = np.asarray(ops.convert_to_numpy(inputs))
        if "int" not in inputs.dtype.name and inputs.dtype != "float64":
            inputs = inputs.astype("float32")
        if not np.isfinite(inputs).all():
            raise ValueError(
                "`calibration_data` must be finite. Received: calibration_data with NaN or "
                f"infinite values for the layer {self.layer.name!r}"
            )
        return self._converter.rows(self.layer, inputs, **options)

    def has_examples(self) -> bool:
        """Whether each kernel has seen something."""
        return all(block.count for blocks in self.statistics.values() for block in blocks)

    def errors(
        self, factorizations: Iterable[Factorization], ranks: Sequence[int], sweeps: int = 5
    ) -> tuple[dict[int, float], dict[int, float]]:
        """What fits at some ranks leave.

        Args:
            factorizations: factorizations of the kernels, in their order.
            ranks: numbers of Kronecker terms.
            sweeps: the largest number of times that a fit solves for both factors.

        Returns:
            `(errors, losses)`, each by the rank. The error is relative, a root mean square over
            the kernels: 0 is exact, 1 is as bad as the mean output. The loss is by how much the
            fit raises the sum of the loss over all rows. There are no losses if no gradient
            reaches the layer, as where the model stops gradients.
        """
        squares, losses = dict.fromkeys(ranks, 0.0), dict.fromkeys(ranks, 0.0)
        kernels = 0
        for factorization, blocks in zip(factorizations, self.statistics.values(), strict=True):
            for coupled in factorization.couple(blocks):
                found = fit_errors(coupled, factorization.coupled, ranks, self.has_bias, sweeps)
                kernels += 1
                felt = any(block.gradients.any() for block in coupled)
                cost = found.squares * coupled[0].count if felt else 0.0
                for rank, error in found.relative.items():
                    squares[rank] += error**2
                    losses[rank] += error**2 * cost
        errors = {rank: float(np.sqrt(total / kernels)) for rank, total in squares.items()}
        if cost := self.sensitivity.cost_of_zero:
            losses = {rank: error**2 * cost for rank, error in errors.items()}
        return errors, losses if any(losses.values()) else {}

    def estimated_errors(
        self, factorizations: Iterable[Factorization], ranks: Sequence[int]
    ) -> dict[int, float]:
        """About the errors of the fit at some ranks, from one decomposition of each kernel.

        Args:
            factorizations: factorizations of the kernels, in their order.
            ranks: numbers of Kronecker terms.

        Returns:
            The error by the rank, relative, as in `errors`.
        """
        found = [
            estimate_errors(coupled, factorization.coupled, ranks, self.has_bias)
            for factorization, blocks in zip(factorizations, self.statistics.values(), strict=True)
            for coupled in factorization.couple(blocks)
        ]
        return {
            rank: float(np.sqrt(np.mean([errors[rank] ** 2 for errors in found]))) for rank in ranks
        }

    def check(self) -> None:
        """Checks that there are examples, and warns if they are few.

        Raises:
            ValueError: if there are none.
        """
        for name, blocks in self.statistics.items():
            for block in blocks:
                if not block.count:
                    raise ValueError(
                        "`calibration_data` must have at least one example. Received: none that "
                        f"reaches {name!r} of the layer {self.layer.name!r}"
                    )
                if block.count < len(block.kernel):
                    logging.warning(
                        "%d calibration examples for the %d inputs of %r of the layer %r: "
                        "the fit keeps near its kernel.",
                        block.count,
                        len(block.kernel),
                        name,
                        self.layer.name,
                    )
                    break


def _cost_of_zero(outputs, gradients) -> float:
    """The rise of the loss if errors as large as the outputs were in all directions alike."""
    cost = 0.0
    for output, gradient in zip(tree.flatten(outputs), tree.flatten(gradients), strict=True):
        norms = np.square(gradient).reshape(-1, gradient.shape[-1]).sum(1)
        sizes = np.square(output, dtype="float64").reshape(-1, output.shape[-1]).mean(1)
        cost += 0.5 * float(norms @ sizes)
    return cost


def calibrate(converter: Converter, layer: keras.Layer, data: Any) -> Calibration | None:
    """The calibration of a single layer.

    Args:
        converter: the converter of the layer.
        layer: the built full layer.
        data: inputs of the layer: an array, or an iterable of arrays. `None` gives `None`.

    Raises:
        TypeError: if the data are neither an array nor iterable.
        ValueError: if there are no data, or if the layer cannot take them.
    """
    if data is None:
        return None
    calibration = Calibration(converter, layer)
    for batch in batches(data):
        calibration.add(batch)
    calibration.check()
    return calibration


def calibrations_of(layers: Mapping[str, keras.Layer]) -> dict[str, Calibration]:
    """Empty calibrations of the layers that can be fitted to inputs, by the same keys.

    Args:
        layers: built full layers, each with a converter.
    """
    converters = {key: converter_of(layer) for key, layer in layers.items()}
    return {
        key: Calibration(converter, layers[key])
        for key, converter in converters.items()
        if converter.can_calibrate(layers[key])
    }


def collect(model: keras.Model, layers: Mapping[str, keras.Layer], batch: Any) -> dict[str, list]:
    """Runs a model on a batch and notes what some of its layers are called with.

    Args:
        model: the model.
        layers: layers of the model, by any key.
        batch: inputs, or a tuple of inputs and something else.

    Returns:
        For each key the calls of the layer: `(inputs, other arguments, outputs)`.
    """
    inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
    return record(model, layers, inputs, _inputs_and_options)


def collect_gradients(
    model: keras.Model,
    layers: Mapping[str, keras.Layer],
    batch: Any,
    calls: Mapping[str, list],
    weigh: Callable[[list], list],
) -> dict[str, list]:
    """The gradients of a loss at the outputs of some layers of a model, for a batch.

    Args:
        model: the model.
        layers: layers of the model, by any key.
        batch: inputs, or a tuple of inputs and something else.
        calls: what `collect` returns for the batch.
        weigh: from the outputs of the model to the gradients of the loss at them, both a list of
            arrays.

    Returns:
        For each key, and each call of the layer, the gradients at its outputs.
    """
    inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
    outputs = {key: [outputs for *_, outputs in found] for key, found in calls.items()}
    return record_gradients(model, layers, inputs, outputs, weigh)


def _inputs_and_options(inputs, arguments, outputs):
    names = ("mask", "initial_state")
    options = {name: arguments[name] for name in names if arguments.get(name) is not None}
    outputs = tree.map_structure(ops.convert_to_numpy, outputs)
    # Keras calls an embedding with keywords for all arguments but the inputs.
    return inputs, {**options, "reverse": arguments.get("reverse", False)}, outputs
