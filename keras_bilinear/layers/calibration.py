"""Statistics of what a full layer sees of calibration data, for the fit of its kernels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from absl import logging
from keras import ops

from keras_bilinear.data import batches
from keras_bilinear.keras_private.capture import record
from keras_bilinear.kronecker.factorization import Factorization
from keras_bilinear.kronecker.fit import fit_errors
from keras_bilinear.layers.converter import Converter, converter_of


class Calibration:
    """Collects the inputs of a full layer's kernels.

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

    def add(self, inputs: Any, full_inputs: Any = None, **options: Any) -> None:
        """Adds the inputs of one call.

        Args:
            inputs: inputs that the bilinear layer is going to see.
            full_inputs: inputs that the full layer sees in the full model; `None` for
                the same inputs.
            **options: other arguments of the call, such as `mask`.

        Raises:
            ValueError: if the layer cannot take the inputs, or if some of them
                are NaN or infinite.
        """
        examples = self._examples(inputs, options)
        full = examples if full_inputs is None else self._examples(full_inputs, options)
        for name, blocks in self.statistics.items():
            for block, rows, full_rows in zip(blocks, examples[name], full[name], strict=True):
                block.add(rows, full_rows)

    def _examples(self, inputs, options):
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
    ) -> dict[int, float]:
        """The relative error of the fit at some ranks: root mean square over the kernels.

        Args:
            factorizations: factorizations of the kernels, in their order.
            ranks: numbers of Kronecker terms.
            sweeps: the largest number of times that a fit solves for both factors.

        Returns:
            The error by the rank: 0 is exact, 1 is as bad as the mean output.
        """
        found = []
        for factorization, blocks in zip(factorizations, self.statistics.values(), strict=True):
            found += [
                fit_errors(coupled, factorization.coupled, ranks, self.has_bias, sweeps)
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
        For each key the calls of the layer: `(inputs, other arguments)`.
    """
    inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
    return record(model, layers, inputs, _inputs_and_options)


def _inputs_and_options(inputs, arguments, outputs):
    del outputs
    names = ("mask", "initial_state")
    options = {name: arguments[name] for name in names if arguments.get(name) is not None}
    # Keras calls an embedding with keywords for all arguments but the inputs.
    return inputs, {**options, "reverse": arguments.get("reverse", False)}
