"""Warnings about calibration data that a network was not trained on, or that are few."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
from absl import logging
from keras import ops

from keras_bilinear.keras_private.capture import record
from keras_bilinear.layers.calibration import Calibration
from keras_bilinear.progress import track
from keras_bilinear.rewriting.saturation import flat_layers
from keras_bilinear.rewriting.sites import walk
from keras_bilinear.rewriting.training_batches import enough

# Inputs of a channel differ from those of the training if their mean is so many deviations off,
# or their variance so many times as large or as small.
MOST_DEVIATIONS, MOST_RATIO = 5, 100
# Fewer channels than this share may differ.
SHARE = 0.1
# So many examples of a batch are looked at, and a variance of fewer numbers says little.
_EXAMPLES, _FEW = 32, 30


def warn_of_other_inputs(model: keras.Model, batches: Iterable[Any]) -> None:
    """Warns if calibration data do not look like what a model was trained on, see `other_inputs`.

    Args:
        model: the built model.
        batches: the calibration data, see `model_batches`.
    """
    if warning := other_inputs(model, batches):
        logging.warning("%s", warning)


def other_inputs(model: keras.Model, batches: Iterable[Any]) -> str | None:
    """How data differ from what a model was trained on; `None` if they do not.

    What it was trained on is known of the inputs of `BatchNormalization` and `Normalization`.
    A model without these layers may show it by layers that are saturated or dead. Inputs that are
    too small show nowhere. Only the first layer with a sign of other inputs is named.

    Args:
        model: the built model.
        batches: the calibration data, see `model_batches`. The first 1024 examples count, and
            those of the first batch for saturated and dead layers.
    """
    return _other_moments(model, batches) or _flat_activation(model, next(iter(batches)))


def _flat_activation(model, batch):
    """What says that a batch saturates a layer or leaves it dead, of the first such layer."""
    inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
    for path, activation, share in flat_layers(model, inputs):
        if activation == "relu":
            sign = f"leave the layer {path!r} dead: its relu is zero for"
        else:
            sign = f"saturate the layer {path!r}: its {activation} is flat at"
        return (
            f"calibration inputs {sign} {share:.1%} of all values, which is not so in training. "
            "Are they scaled like the training data?"
        )
    return None


def _other_moments(model, batches):
    """What says that a normalization sees other inputs, of the first such layer."""
    known = {}
    for site in walk(model, weightless=True):
        expected = _expected(site.layer)
        if expected is not None:
            known[site.path] = (site.layer, *expected)
    if not known:
        return None
    layers = {path: layer for path, (layer, *_) in known.items()}
    sums: dict[str, Any] = dict.fromkeys(layers, 0.0)
    for batch in track(enough(batches), "checking the calibration data"):
        inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        for path, calls in record(model, layers, inputs, _sums_along_axes).items():
            axis = known[path][1]
            sums[path] += sum(call[axis] for call in calls if call and axis in call)
    for path, (_, _, mean, variance, epsilon) in known.items():
        found = np.ndim(sums[path]) and _difference(path, sums[path], mean, variance, epsilon)
        if found:
            return found
    return None


def _expected(layer):
    """`(axis, mean, variance, epsilon)` of the inputs of a layer in training, if it knows them."""
    if isinstance(layer, keras.layers.BatchNormalization):
        axis, epsilon = layer.axis, layer.epsilon
        mean, variance = (
            getattr(layer, "moving_mean", None),
            getattr(layer, "moving_variance", None),
        )
    elif isinstance(layer, keras.layers.Normalization) and not layer.invert:
        axis, epsilon = layer.axis, keras.config.epsilon()
        mean, variance = getattr(layer, "mean", None), getattr(layer, "variance", None)
    else:
        return None
    if mean is None or variance is None:
        return None
    if not isinstance(axis, int):
        axes = () if axis is None else tuple(axis)
        if len(axes) > 1:
            return None
        axis = axes[0] if axes else None
    mean, variance = (
        np.asarray(ops.convert_to_numpy(values), "float64").reshape(-1)
        for values in (mean, variance)
    )
    if np.all(mean == 0) and np.all(variance == 1):  # as a layer begins
        return None
    return axis, mean, variance, epsilon


def _sums_along_axes(inputs, arguments, outputs) -> dict[int | None, np.ndarray]:
    """For each axis, counts, sums and sums of squares of its channels, `(3, channels)`.

    Axes are counted from both ends; `None` stands for all numbers together. There are none of a
    call that a backend traces.
    """
    del arguments, outputs
    try:
        step = max(1, inputs.shape[0] // _EXAMPLES)
        x = np.asarray(ops.convert_to_numpy(inputs[::step]), "float64")
    except Exception:  # each backend has its own error for tensors without values
        return {}
    sums: dict[int | None, np.ndarray] = {None: _sums(x.reshape(-1, 1))}
    for axis in range(1, x.ndim):
        channels = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
        sums[axis] = sums[axis - x.ndim] = _sums(channels)
    return sums


def _sums(x):
    count = np.full(x.shape[1], len(x), "float64")
    return np.stack([count, x.sum(0), np.square(x).sum(0)])


def _difference(path, sums, mean, variance, epsilon):
    """How channels differ from what they were in training; `None` if they do not."""
    count, total, squares = sums
    if not np.all(count) or not np.all(np.isfinite(sums)):
        return None
    found_mean = total / count
    found_variance = np.maximum(squares / count - found_mean**2, 0)
    off = np.abs(found_mean - mean) / np.sqrt(variance + epsilon)
    ratio = (found_variance + epsilon) / (variance + epsilon)
    differs = (off > MOST_DEVIATIONS) | (ratio > MOST_RATIO)
    differs |= (count >= _FEW) & (ratio < 1 / MOST_RATIO)
    if differs.mean() < SHARE:
        return None
    worst = int(np.argmax(np.where(differs, off + np.abs(np.log(ratio)), 0)))
    found, trained = (
        (values[worst], math.sqrt(squares[worst]))
        for values, squares in (
            (found_mean, found_variance),
            (np.broadcast_to(mean, off.shape), np.broadcast_to(variance, off.shape)),
        )
    )
    return (
        f"calibration inputs differ from what the layer {path!r} was trained on, in "
        f"{int(differs.sum())} of {len(differs)} channels: channel {worst} has mean "
        f"{found[0]:.3g} and deviation {found[1]:.3g} instead of {trained[0]:.3g} and "
        f"{trained[1]:.3g}. Are they scaled like the training data?"
    )


def warn_of_few_examples(calibrations: Mapping[str, Calibration], examples: int) -> None:
    """Warns, once for all layers, if calibration data are fewer than the inputs of kernels.

    Args:
        calibrations: what the layers of a model saw of the data, by their paths.
        examples: number of examples of the data.
    """
    few = {}
    for path, calibration in calibrations.items():
        blocks = [block for found in calibration.statistics.values() for block in found]
        lacking = [
            (math.ceil(examples * len(block.kernel) / block.count), block.count, len(block.kernel))
            for block in blocks
            if 0 < block.count < len(block.kernel)
        ]
        if lacking:
            few[path] = max(lacking)
    if not few:
        return
    path = max(few, key=few.__getitem__)
    needed, count, inputs = few[path]
    logging.warning(
        "%d calibration examples are few for %d of the %d layers: the layer %r sees %d rows for "
        "the %d inputs of its kernel, so its fit keeps near this kernel. Give at least %d "
        "examples.",
        examples,
        len(few),
        len(calibrations),
        path,
        count,
        inputs,
        needed,
    )
