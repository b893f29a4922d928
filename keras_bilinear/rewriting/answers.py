"""Inputs with the outputs of a full model for them: examples to learn from, and some held out."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

# The inputs and outputs of a batch.
Batch = tuple[Any, list[np.ndarray]]
# What is kept in memory takes so many bytes at most.
KEPT_BYTES = 2**30
# So many examples that are held out are evaluated at once.
_HELD_OUT_BATCH = 128


def answers(model: keras.Model, inputs: Any) -> list[np.ndarray]:
    """The outputs of a model for a batch of inputs, in inference.

    Returns:
        An array for each output, in the order of `keras.tree.flatten`.

    Raises:
        ValueError: if outputs are not finite, or no floats.
    """
    outputs = [np.asarray(x) for x in keras.tree.flatten(model.predict_on_batch(inputs))]
    for values in outputs:
        if "float" not in values.dtype.name:
            raise ValueError(
                f"The outputs of the model {model.name!r} must be floats to be learned. "
                f"Received: outputs of type {values.dtype.name}"
            )
        if not np.all(np.isfinite(values.astype("float32"))):
            raise ValueError(
                f"The outputs of the model {model.name!r} must be finite for all `data`. "
                "Received: NaN or infinite values"
            )
    return outputs


def read_inputs(batch: Any) -> Any:
    """The inputs of a batch as arrays, with the types that `fit` gives them."""
    inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)

    def convert(values):
        values = np.asarray(keras.ops.convert_to_numpy(values))
        return values.astype(keras.config.floatx()) if values.dtype == "float64" else values

    return keras.tree.map_structure(convert, inputs)


class Examples:
    """Examples that are in memory, each with what the full model makes of it.

    Args:
        model: the full model.
        batches: batches of inputs.
        outputs: the outputs for each of the batches; `None` to let the model make them whenever
            they are needed.
        held_out: the share of the examples to hold out.
        batch_size: number of examples in a training batch.

    Attributes:
        steps: number of training batches in an epoch.
        held_out_count: number of examples that are held out.

    Raises:
        ValueError: if there are fewer than two examples.
    """

    def __init__(self, model, batches: list, outputs: list | None, held_out, batch_size: int):
        self._model, self._batches, self._outputs = model, batches, outputs
        self._structure = batches[0]
        self._inputs = [keras.tree.flatten(batch) for batch in batches]
        rows = [len(arrays[0]) for arrays in self._inputs]
        # Of each example the number of its batch and its row there.
        places = np.stack(
            [np.repeat(np.arange(len(rows)), rows), np.concatenate([*map(np.arange, rows)])], axis=1
        )
        if len(places) < 2:
            raise ValueError(
                "`data` must have at least two examples, one to train on and one to hold out. "
                f"Received: {len(places)}"
            )
        self._rng = np.random.default_rng(0)
        order = self._rng.permutation(len(places))
        count = min(max(1, round(held_out * len(places))), len(places) - 1)
        self.held_out_count = count
        self._held_out = self._by_shape(places[order[:count]])
        self._training = self._by_shape(places[order[count:]])
        self._batch_size = batch_size
        self.steps = sum(len(group) // self._size(group) for group in self._training)

    def epoch(self) -> Iterator[Batch]:
        """Training batches of equal size, in another order each time.

        The few examples that do not fill a batch are left out, other ones each time.
        """
        picked = []
        for group in self._training:
            size = self._size(group)
            order = self._rng.permutation(len(group))[: len(group) // size * size]
            picked += [*group[order.reshape(-1, size)]]
        for index in self._rng.permutation(len(picked)):
            yield self._batch(picked[index])

    def held_out(self) -> Iterator[Batch]:
        """Batches of the examples that are held out, always the same."""
        for group in self._held_out:
            for start in range(0, len(group), _HELD_OUT_BATCH):
                yield self._batch(group[start : start + _HELD_OUT_BATCH])

    def _size(self, group):
        return min(self._batch_size, len(group))

    def _by_shape(self, places: np.ndarray) -> list[np.ndarray]:
        """Places of examples in groups, whose examples have the same shapes each."""
        groups = defaultdict(list)
        for place in places:
            groups[tuple(values.shape[1:] for values in self._inputs[place[0]])].append(place)
        return [np.array(group) for group in groups.values()]

    def _batch(self, places) -> Batch:
        inputs = keras.tree.pack_sequence_as(self._structure, _gather(self._inputs, places))
        if self._outputs is None:
            return inputs, answers(self._model, inputs)
        return inputs, _gather(self._outputs, places)


class StreamedExamples:
    """Examples that are read anew in each epoch, as they do not fit in memory.

    Args:
        model: the full model.
        batches: batches of inputs, which can be read again and again.
        head: the first of the batches, as inputs and outputs. Some of them are held out.
        held_out: the share of `head` to hold out.

    Attributes:
        steps: number of training batches in an epoch.
        held_out_count: number of examples that are held out.

    Raises:
        ValueError: if there are fewer than two batches.
    """

    def __init__(self, model, batches: Iterable, head: list[Batch], held_out: float):
        self._model, self._batches = model, batches
        self._held_out = {
            index: head[index] for index in range(0, len(head), math.ceil(1 / held_out))
        }
        count = sum(1 for _ in batches)
        if count < 2:
            raise ValueError(
                "`data` must have at least two batches, as they are too large to be kept in "
                f"memory. Received: {count}"
            )
        self.steps = count - len(self._held_out)
        self.held_out_count = sum(len(outputs[0]) for _, outputs in self._held_out.values())

    def epoch(self) -> Iterator[Batch]:
        """Training batches, as they come."""
        for index, batch in enumerate(self._batches):
            if index not in self._held_out:
                inputs = read_inputs(batch)
                yield inputs, answers(self._model, inputs)

    def held_out(self) -> Iterator[Batch]:
        """The batches that are held out."""
        return iter(self._held_out.values())


def read_examples(
    model: keras.Model,
    batches: Iterable,
    held_out: float,
    batch_size: int,
    advance: Any = None,
) -> Examples | StreamedExamples:
    """Reads data, and lets a full model answer them, once if the answers can be kept.

    Args:
        model: the full model.
        batches: batches of inputs, see `model_batches`. Those of a list are in memory already.
        held_out: the share of the examples to hold out, above 0 and below 1.
        batch_size: number of examples in a training batch, if the inputs can be kept.
        advance: called after each batch that is read.

    Raises:
        ValueError: if an output is not finite or no float, or if there are too few examples.
    """
    in_memory = isinstance(batches, list)
    inputs, outputs, size = [], [], 0
    source = iter(batches)
    for batch in source:
        inputs.append(read_inputs(batch))
        outputs.append(answers(model, inputs[-1]))
        size += _bytes(outputs[-1]) + (0 if in_memory else _bytes(inputs[-1]))
        if size > KEPT_BYTES:
            if not in_memory:
                head = [*zip(inputs, outputs, strict=True)]
                return StreamedExamples(model, batches, head, held_out)
            inputs += map(read_inputs, source)
            return Examples(model, inputs, None, held_out, batch_size)
        if advance is not None:
            advance()
    return Examples(model, inputs, outputs, held_out, batch_size)


def _bytes(arrays: Any) -> int:
    return sum(values.nbytes for values in keras.tree.flatten(arrays))


def _gather(batches: list[list[np.ndarray]], places) -> list[np.ndarray]:
    """The arrays of a batch of the examples at some places."""
    return [
        np.stack([batches[batch][column][row] for batch, row in places])
        for column in range(len(batches[0]))
    ]
