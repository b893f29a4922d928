"""How much the loss of a full model feels each of its layers, from calibration data."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import keras
from keras import ops, tree

from keras_bilinear.layers.calibration import (
    Calibration,
    Sensitivity,
    calibrations_of,
    collect,
    collect_gradients,
)
from keras_bilinear.progress import track
from keras_bilinear.rewriting.output_gradients import output_gradients


class Sensitivities:
    """The gradients of a full model, taken in one pass through the calibration data.

    Args:
        model: the model, in which all layers are full.
        layers: the layers to be fitted, by their paths; none if only `add` is used.
        batches: the calibration data.
    """

    def __init__(self, model: keras.Model, layers: Mapping[str, keras.Layer], batches: Iterable):
        self._weigh = output_gradients(model, batches)
        self._found: dict[str, Sensitivity] = {}
        self._weights: dict[bytes, dict[str, list]] = {}
        if self._weigh is None or not layers:
            return
        calibrations = calibrations_of(layers)
        layers = {path: layers[path] for path in calibrations}
        for batch in track(batches, "taking gradients"):
            calls = collect(model, layers, batch)
            self._weights[_digest(batch)] = self.add(calibrations, model, batch, calls)
        self._found = {path: found.sensitivity for path, found in calibrations.items()}

    @property
    def known(self) -> bool:
        """Whether gradients can be taken: not if outputs are no floating-point numbers."""
        return self._weigh is not None

    def add(
        self,
        calibrations: Mapping[str, Calibration],
        model: keras.Model,
        batch: Any,
        calls: Mapping[str, list],
    ) -> dict[str, list]:
        """Adds the gradients of a batch to calibrations of layers.

        Args:
            calibrations: the calibrations, by the paths of the layers.
            model: the full model.
            batch: the batch.
            calls: what `collect` returns for these layers and this batch.

        Returns:
            By the path, what `Calibration.add_gradients` returns for each call.
        """
        if self._weigh is None:
            return {path: [None] * len(of_layer) for path, of_layer in calls.items()}
        layers = {path: calibration.layer for path, calibration in calibrations.items()}
        gradients = collect_gradients(model, layers, batch, calls, self._weigh)
        return {
            path: [
                calibrations[path].add_gradients(inputs, gradient, outputs, **options)
                for (inputs, options, outputs), gradient in zip(
                    of_layer, gradients[path], strict=True
                )
            ]
            for path, of_layer in calls.items()
        }

    def share(self, calibrations: Mapping[str, Calibration]) -> None:
        """Gives what is known of layers to new calibrations of them."""
        for path, calibration in calibrations.items():
            if path in self._found:
                calibration.share(self._found[path])

    def weights(
        self,
        model: keras.Model,
        layers: Mapping[str, keras.Layer],
        batch: Any,
        calls: Mapping[str, list],
    ) -> dict[str, list]:
        """By the path, the weights of the examples of a batch, for each call of the layer.

        Args:
            model: the full model.
            layers: its layers, by their paths.
            batch: the batch.
            calls: what `collect` returns for these layers and this batch.
        """
        known = self._weights.get(_digest(batch)) if self.known else None
        if known is None:
            # Gradients are not known at all, or the data come in another order each time.
            known = self.add(calibrations_of(layers) if self.known else {}, model, batch, calls)
        return known


def _digest(batch: Any) -> bytes:
    """What tells a batch from others."""
    inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
    digest = hashlib.blake2b(digest_size=16)
    for values in tree.flatten(inputs):
        digest.update(ops.convert_to_numpy(values).tobytes())
    return digest.digest()
