"""Calls layers on symbolic inputs, which have shapes and no numbers.

Below Keras' public interface: `keras.src.backend.compute_output_spec`, `Layer._inbound_nodes` and
`Node.arguments`, `_functional` of a Sequential model, and that `Layer.__call__` looks up `call` on
the layer object at each call. Keras 3.13 to 3.15.
"""

import functools
from collections.abc import Iterator
from typing import Any

import keras
from keras.src import backend

from keras_bilinear.keras_private.graph import all_layers
from keras_bilinear.keras_private.surgery import restore, snapshot

# A batch of one is special: its products are those of a single row.
_EXAMPLES = 2


def known_inputs(layer: keras.Layer, batch: Any = None) -> Iterator[Any]:
    """Symbolic inputs that a built layer or model may take, the most likely ones first.

    Args:
        layer: the layer.
        batch: inputs of the layer, as nested arrays; `None` if there are none.
    """
    graph = getattr(layer, "_functional", layer)  # a Sequential model keeps its own graph
    if isinstance(graph, keras.Model) and getattr(graph, "inputs", None):
        yield keras.tree.map_structure(_symbol, graph.input)
    elif batch is not None:
        yield keras.tree.map_structure(_symbol, batch)
    elif layer._inbound_nodes:
        arguments = layer._inbound_nodes[0].arguments
        inputs, *_ = arguments.args or arguments.kwargs.values()
        yield keras.tree.map_structure(_symbol, inputs)
    elif shapes := (layer.get_build_config() or {}).get("input_shape"):
        for dtype in (keras.config.floatx(), "int32"):
            yield keras.tree.map_shape_structure(
                lambda shape, dtype=dtype: _symbol(keras.KerasTensor(shape, dtype)), shapes
            )


def _symbol(value):
    """A tensor without numbers like an array or a tensor; other values stay what they are."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return value
    shape = tuple(value.shape)
    if shape and shape[0] is None:
        shape = (_EXAMPLES, *shape[1:])
    dtype = keras.backend.standardize_dtype(value.dtype)
    return keras.KerasTensor(shape, dtype, sparse=getattr(value, "sparse", False) is True)


def find_failure(layer: keras.Layer, inputs: Any) -> tuple[list[keras.Layer], Exception] | None:
    """Calls a layer on symbolic inputs, and says which layer in it cannot be called.

    The layer, and all layers in it, stay what they are.

    Args:
        layer: a built layer, or a model.
        inputs: its symbolic inputs, see `known_inputs`.

    Returns:
        The layers that could not be called, from the innermost to the outermost, and the error;
        `None` if the call went well.
    """
    failed: list[keras.Layer] = []
    states = snapshot(all_layers(layer))
    try:
        for inner, *_ in states:
            inner.__dict__["call"] = _noting_failure(inner, failed)
        backend.compute_output_spec(functools.partial(layer, training=True), inputs)
    except Exception as error:  # whatever a layer raises
        return failed or [layer], error
    finally:
        restore(states)
    return None


def _noting_failure(layer, failed):
    """The `call` of a layer, which also notes that it raised an error."""
    call = layer.call

    @functools.wraps(call)
    def noting(*args, **kwargs):
        try:
            return call(*args, **kwargs)
        except Exception:
            if layer not in failed:
                failed.append(layer)
            raise

    return noting
