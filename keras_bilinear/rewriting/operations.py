"""The calls of the layers of a model, and how many operations they take."""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import keras

from keras_bilinear.data import first_example, zeros
from keras_bilinear.keras_private.capture import record
from keras_bilinear.kronecker.target import exporting
from keras_bilinear.layers.converter import converter_of
from keras_bilinear.layers.macs import count_call
from keras_bilinear.progress import track
from keras_bilinear.rewriting.layer_plan import Candidates, LayerPlan
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.sites import walk


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a layer.

    Attributes:
        inputs: shape of the first input.
        outputs: shape of the first output.
        bytes: bytes of all inputs and outputs.
        item_bytes: bytes of a number of the output.
        times: how often the layer is called so: more than once as the cell of a loop.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bytes: int
    item_bytes: int
    times: int = 1


def record_calls(model: keras.Model, example: Any) -> dict[str, list[Call]]:
    """Runs a model for inference and notes the calls of its layers.

    Args:
        model: a built model. Its states stay unchanged.
        example: one batch of inputs.

    Returns:
        The calls of each layer, those without weights included, by the path of the layer.
    """
    sites = {site.path: site for site in walk(model, weightless=True)}
    loops = {
        path: owner
        for path, site in sites.items()
        for owner, _ in site.owners
        if isinstance(owner, keras.layers.RNN)
    }
    layers: dict[Any, keras.Layer] = {path: site.layer for path, site in sites.items()}
    layers |= {owner: owner for owner in loops.values()}
    calls = record(model, layers, example, _call)
    found = {}
    for path in sites:
        found[path] = calls[path]
        if path in loops:
            # A backend may trace the cell of a loop instead of running each of its steps.
            steps = sum(loop.inputs[1] for loop in calls[loops[path]])
            found[path] = [dataclasses.replace(call, times=steps) for call in calls[path][:1]]
    return found


def _call(inputs, arguments, outputs) -> Call:
    del arguments
    inputs, outputs = keras.tree.flatten(inputs), keras.tree.flatten(outputs)
    return Call(
        inputs=tuple(inputs[0].shape) if inputs else (),
        outputs=tuple(outputs[0].shape) if outputs else (),
        bytes=count_bytes([*inputs, *outputs]),
        item_bytes=_item_bytes(outputs[0]) if outputs else 0,
    )


def count_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of tensors or variables. A tensor without a known shape does not count."""
    return sum(map(_tensor_bytes, tensors))


def _tensor_bytes(tensor):
    shape: Any = getattr(tensor, "shape", (None,))
    return 0 if None in shape else math.prod(shape) * _item_bytes(tensor)


def _item_bytes(tensor):
    """Bytes of an element of a tensor, by the digits in the name of its dtype."""
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


def count_calls(layer: keras.Layer, calls: Iterable[Call]) -> int | None:
    """Multiply-accumulate operations of calls of a layer; `None` if they are unknown."""
    total = 0
    for call in calls:
        count = count_call(layer, call.inputs, call.outputs)
        if count is None:
            return None
        total += call.times * count
    return total


def plan_macs(
    model: keras.Model, plan: RewritePlan, candidates: Candidates, calibration_data: Any
) -> None:
    """Fills in the operations of each layer of a plan, in full and for each candidate.

    They are those of an exported file. On a GPU, and for small kernels elsewhere, a bilinear layer
    forms its kernel, which takes as many operations as the full layer.

    Args:
        model: the full model.
        plan: its plan.
        candidates: what each layer may become.
        calibration_data: batches of inputs of the model, of which the first example counts;
            `None` takes the shape that the model tells.

    Raises:
        ValueError: if the shape of an example or the operations of a layer are unknown.
    """
    example = zeros(model) if calibration_data is None else first_example(model, calibration_data)
    if example is None:
        raise ValueError(
            "A share of the MACs needs the shape of an example, which the model does not tell: "
            f"give calibration data. Received: model={model.name!r}"
        )
    examples = len(keras.tree.flatten(example)[0])
    calls, unknown = record_calls(model, example), []
    for site in track(walk(model), "counting operations of", lambda site: site.path):
        of_layer, layer = calls[site.path], plan[site.path]
        with exporting():
            macs = count_calls(site.layer, of_layer)
            found = _macs_of(site.layer, layer, candidates.get(site.path), of_layer)
        if macs is None:
            unknown.append(site.path)
            continue
        layer.full_macs = macs // examples
        layer.macs_of = {choice: macs // examples for choice, macs in found.items()}
    if unknown:
        raise ValueError(
            "The operations of these layers cannot be counted, so that no share of them can be "
            f"kept. Received: {', '.join(unknown)}"
        )


def _macs_of(full: keras.Layer, plan: LayerPlan, choices, calls) -> dict:
    """The operations of the bilinear layer for each choice of factors and rank."""
    if not choices:
        return {}
    bilinear: Any = converter_of(full).built_like(full)
    found = {}
    for factors, rank in choices:
        kernels = zip(bilinear.kernels.values(), plan.with_factors(factors), strict=True)
        for kernel, factorization in kernels:
            kernel.count_as(dataclasses.replace(factorization, rank=rank))
        found[factors, rank] = count_calls(bilinear, calls)
    return found
