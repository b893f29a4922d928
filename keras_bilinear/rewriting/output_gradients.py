"""Gradients at the outputs of a model that tell what errors of the outputs cost, without labels.

The loss of a rewritten model is how far its outputs are from those of the full model, as
`output_losses` measures it. Where both models agree, that loss has no gradient. But it has a
curvature, a matrix `H` for the outputs of an example: a small error `e` costs half of `e^T H e`.
Random gradients `v` whose mean `v v^T` is `H` stand for it. For probabilities, `v` is the gradient
of the log-likelihood of a label that is drawn from the model's own distribution, as in the Fisher
information.
"""

import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_bilinear.data import count_examples
from keras_bilinear.keras_private.graph import states_kept
from keras_bilinear.rewriting.output_losses import output_losses

# So many examples tell what the outputs are, and how large.
_ENOUGH = 256
# A probability below this counts as this large.
_LEAST = 1e-4


def output_gradients(model: keras.Model, batches: Iterable) -> "OutputGradients | None":
    """What draws gradients at the outputs of a model.

    Args:
        model: the full model.
        batches: batches of its inputs.

    Returns:
        An `OutputGradients`; `None` if outputs are not floating-point numbers.
    """
    found, examples = [], 0
    for batch in batches:
        inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        inputs = tree.map_structure(ops.convert_to_tensor, inputs)
        with states_kept(model):
            outputs = model(inputs, training=False)
        found.append(tree.map_structure(ops.convert_to_numpy, outputs))
        examples += count_examples(batch)
        if examples >= _ENOUGH:
            break
    outputs = tree.map_structure(lambda *parts: np.concatenate(parts), *found)
    if not all("float" in values.dtype.name for values in tree.flatten(outputs)):
        return None
    return OutputGradients(model, outputs)


class OutputGradients:
    """Draws gradients at the outputs of a model.

    Args:
        model: the full model.
        outputs: its outputs for some examples, as arrays.

    Raises:
        ValueError: if no output is of floating-point numbers.
    """

    def __init__(self, model: keras.Model, outputs: Any):
        # Each output has random numbers of its own. So the size of the batches does not matter.
        self._draws = [
            (_DRAWS[loss.name], loss.scale, np.random.default_rng(index))
            for index, loss in enumerate(output_losses("auto", model, model, outputs))
        ]

    def __call__(self, outputs: list[np.ndarray]) -> list[np.ndarray]:
        """A gradient for each number of the outputs, in float32.

        Args:
            outputs: the outputs for a batch, an array for each output of the model.
        """
        gradients = []
        for (draw, scale, rng), values in zip(self._draws, outputs, strict=True):
            values = np.asarray(values, "float32")
            # A loss is the mean over the positions of an example.
            positions = math.prod(values.shape[1:-1])
            gradients.append(draw(values, rng) * np.float32(math.sqrt(scale / positions)))
        return gradients


def _of_probabilities(values, rng):
    drawn = _draw(values / values.sum(-1, keepdims=True), rng)
    return -drawn / np.maximum(values, _LEAST)


def _of_logits(values, rng):
    probabilities = np.exp(values - values.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    return probabilities - _draw(probabilities, rng)


def _draw(probabilities, rng):
    """A 1 on the last axis, drawn from its distribution."""
    below = probabilities.cumsum(-1) < rng.random((*probabilities.shape[:-1], 1))
    index = np.minimum(below.sum(-1), probabilities.shape[-1] - 1)
    drawn = np.zeros_like(probabilities)
    np.put_along_axis(drawn, index[..., None], 1.0, -1)
    return drawn


def _of_binary_probabilities(values, rng):
    drawn = rng.random(values.shape) < values
    # The loss is the mean over the last axis.
    gradient = np.where(drawn, -1 / np.maximum(values, _LEAST), 1 / np.maximum(1 - values, _LEAST))
    return gradient / math.sqrt(values.shape[-1])


def _of_binary_logits(values, rng):
    probabilities = 1 / (1 + np.exp(-values))
    drawn = rng.random(values.shape) < probabilities
    return (probabilities - drawn) / math.sqrt(values.shape[-1])


def _of_numbers(values, rng):
    signs = np.where(rng.random(values.shape) < 0.5, -1.0, 1.0)
    return signs * math.sqrt(2 / values.shape[-1])


_DRAWS = {
    "divergence": _of_probabilities,
    "divergence_of_logits": _of_logits,
    "binary_divergence": _of_binary_probabilities,
    "binary_divergence_of_logits": _of_binary_logits,
    "relative_squared_error": _of_numbers,
}
