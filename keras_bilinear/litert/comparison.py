"""Compares the outputs of a LiteRT file with the outputs of its model."""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from keras_bilinear.litert.converter import named_outputs
from keras_bilinear.litert.run import run_litert
from keras_bilinear.reports.timing import compile_call

# An output of a smaller norm counts as one of this norm. Half a step of a probability in eight
# bits, 1/512, is then a difference of 0.2.
LEAST_NORM = 0.01
# The most bytes of inputs and outputs that are compared at once.
_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class FileComparison:
    """How near a file is to its model. Made by `compare_with_model`.

    Attributes:
        difference: root mean square, over all runs, of the norm of an output's difference,
            relative to the root mean square of its norm. The largest of all outputs.
        agreement: share of the answers, from 0 to 1, in which the largest number of an output is
            at the same place in the file and in the model. The least of all outputs. `None` if
            each output has a single number.
        latency_us: median microseconds of the first run.
        memory_bytes: the most bytes of resident memory of a process in the first run. `None` where
            the system does not tell.
    """

    difference: float
    agreement: float | None
    latency_us: float
    memory_bytes: int | None


def compare_with_model(
    file: pathlib.Path, model: keras.Model, arguments: list, examples: dict[str, np.ndarray]
) -> FileComparison:
    """Runs a file and its model on examples and compares what comes out.

    Args:
        file: the file.
        model: the model that the file was made from.
        arguments: the nested specs of the model's arguments, as `input_specs` gives them.
        examples: for each input, by name, the values of some runs, as `read_examples` gives them.

    Raises:
        RuntimeError: if LiteRT cannot run the file.
    """
    answer = answering(model, arguments)

    def expect(run):
        return named_outputs(answer([values[run] for values in examples.values()]))

    first = [*(values[0] for values in examples.values()), *expect(0).values()]
    tallies: collections.defaultdict[str, _Tally] = collections.defaultdict(_Tally)
    dones, run = [], 0
    for part in parts(examples, sum(array.nbytes for array in first)):
        done = run_litert(file, part)
        for index in range(min(map(len, part.values()))):
            for name, target in expect(run).items():
                tallies[name].add(done.outputs[name][index], target)
            run += 1
        dones.append(dataclasses.replace(done, outputs={}))
    agreements = [tally.same / tally.answers for tally in tallies.values() if tally.answers]
    return FileComparison(
        difference=float(np.max([tally.difference for tally in tallies.values()])),
        agreement=min(agreements, default=None),
        latency_us=dones[0].latency_us,
        memory_bytes=dones[0].memory_bytes,
    )


def answering(model: keras.Model, arguments: list) -> Callable[[Iterable[np.ndarray]], Any]:
    """A function that makes the outputs of a model for the inputs of a run of its file.

    Args:
        model: the model.
        arguments: the nested specs of the model's arguments, as `input_specs` gives them.

    Returns:
        A function from the arrays of all inputs, in the order of the specs, to the outputs, which
        are arrays nested as the model nests them.
    """
    call = compile_call(model)

    def answer(arrays):
        tensors = [keras.ops.convert_to_tensor(array) for array in arrays]
        outputs = call(*keras.tree.pack_sequence_as(arguments, tensors))
        return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)

    return answer


def parts(examples: dict[str, np.ndarray], run_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """Cuts the runs of a file into parts that a process can hold.

    Args:
        examples: for each input, by name, its values in all runs.
        run_bytes: bytes of the inputs and outputs of a run.
    """
    at_once = max(1, _BYTES // run_bytes)
    for start in range(0, min(map(len, examples.values())), at_once):
        yield {name: values[start : start + at_once] for name, values in examples.items()}


class _Tally:
    """Adds up how far an output of a file is from the output of the model, run by run."""

    def __init__(self):
        self.runs = self.same = self.answers = 0
        self.distance = self.size = 0.0  # squares, of all runs

    def add(self, actual: np.ndarray, target: np.ndarray) -> None:
        """Adds a run."""
        self.runs += 1
        self.distance += np.square(actual.astype("float64") - target.astype("float64")).sum()
        self.size += np.square(target.astype("float64")).sum()
        if target.ndim and target.shape[-1] > 1:
            same = actual.argmax(-1) == target.argmax(-1)
            self.same += int(same.sum())
            self.answers += same.size

    @property
    def difference(self) -> float:
        """The relative root mean square of all runs."""
        return math.sqrt(self.distance / max(self.size, self.runs * LEAST_NORM**2))
