"""Calibration data out of the training data, where the user gives none."""

import itertools
import operator
from collections.abc import Iterable, Iterator

import keras

# So many training examples are calibration data.
EXAMPLES = 1024
_BATCH = 128


def training_batches(x) -> Iterator:
    """Batches of training inputs: spread over arrays, or the first batches of a data set.

    Args:
        x: what `fit` was called with: an array, or any structure of arrays; a
            `keras.utils.PyDataset`; or an iterable of batches.

    Yields:
        Batches, of about `EXAMPLES` examples together.
    """
    leaves = keras.tree.flatten(x)
    if isinstance(x, keras.utils.PyDataset):
        count = x.num_batches
        indices = itertools.count() if count is None else range(count)
        yield from enough(x[index] for index in indices)
    elif all(hasattr(leaf, "shape") for leaf in leaves):
        step = max(1, len(leaves[0]) // EXAMPLES)
        for start in range(0, min(len(leaves[0]), EXAMPLES * step), _BATCH * step):
            part = slice(start, start + _BATCH * step, step)
            # In a tuple, as inputs may be a list themselves.
            yield (keras.tree.map_structure(operator.itemgetter(part), x),)
    else:
        yield from enough(x)


def enough(batches: Iterable) -> Iterator:
    """The first batches, until they have `EXAMPLES` examples together."""
    count = 0
    for batch in batches:
        yield batch
        inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        count += len(keras.tree.flatten(inputs)[0])
        if count >= EXAMPLES:
            break
