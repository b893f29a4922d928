"""The graph of a model, the layers inside layers, and their variables.

Below Keras' public interface: `keras.src.backend.rnn`, `_analyze_einsum_string`, the classes
`Functional` and `Function`, `Sequential._functional`, `Function._nodes_by_depth`,
`KerasTensor._keras_history`, `Layer._flatten_layers`, `Layer._trainable_variables` and
`Layer._non_trainable_variables`. Keras 3.13 to 3.15.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras.src import backend
from keras.src.layers.core.einsum_dense import _analyze_einsum_string
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell
from keras.src.models.functional import Functional
from keras.src.ops.function import Function

# The loop over time steps in which `keras.layers.RNN` runs its cell.
rnn = backend.rnn
# The cell of `keras.layers.ConvLSTM2D` and its kin, which has no public name.
conv_lstm_cell = ConvLSTMCell

# Sizes along the axes of a tensor; `None` for a size that is not known.
Shape = tuple[Any, ...]


def analyze_einsum(
    equation: str,
    bias_axes: str | None,
    input_shape: Shape,
    output_shape: int | Shape,
) -> tuple[Shape, Shape | None, Shape]:
    """The shapes of a `keras.layers.EinsumDense`.

    Args:
        equation: the argument `equation` of the layer.
        bias_axes: the argument `bias_axes` of the layer.
        input_shape: shape of the inputs, with the batch axis.
        output_shape: the argument `output_shape` of the layer, without the batch axis.

    Returns:
        The shapes of the kernel, the bias (`None` without a bias) and the outputs.

    Raises:
        ValueError: if the equation and the shapes do not fit.
    """
    kernel, bias, outputs, *_ = _analyze_einsum_string(
        equation, bias_axes, input_shape, output_shape
    )
    return tuple(kernel), None if bias is None else tuple(bias), tuple(outputs)


def nodes(
    model: keras.Model,
) -> Iterator[tuple[keras.Operation, list[tuple[keras.Operation, Shape]]]]:
    """The calls in the graph of a model, each after the calls whose outputs it takes.

    Yields:
        `(operation, inputs)`. `inputs` is a list of `(source, shape)`, where `source` is the
        operation that makes the input. Masks are left out.

    Raises:
        ValueError: if the model has no graph, because it is subclassed or not built.
    """
    for _, level in sorted(_graph(model)._nodes_by_depth.items(), reverse=True):
        for node in level:
            if not node.is_input:
                tensors = [tensor for tensor in node.input_tensors if tensor.dtype != "bool"]
                yield (
                    node.operation,
                    [(tensor._keras_history.operation, tensor.shape) for tensor in tensors],
                )


def output_operations(model: keras.Model) -> list[keras.Operation]:
    """The operations that make the outputs of a model.

    Raises:
        ValueError: if the model has no graph, because it is subclassed or not built.
    """
    return [tensor._keras_history.operation for tensor in _graph(model).outputs]


def _graph(model):
    graph = getattr(model, "_functional", model)  # a Sequential model keeps its own graph
    if not isinstance(graph, Function):
        raise ValueError(
            "The model must be a built Sequential or a Functional one, whose graph is known. "
            f"Received: model={model!r}"
        )
    return graph


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that a layer holds directly, in the order in which they were attached."""
    return layer._flatten_layers(include_self=False, recursive=False)


def all_layers(model: keras.Layer) -> list[keras.Layer]:
    """A model and all layers in it, to any depth."""
    return list(model._flatten_layers())


def own_variables(layer: keras.Layer) -> Iterator[keras.Variable]:
    """The variables of a layer and of the layers in it.

    A variable that several layers share comes up once for each of them.
    """
    for holder in layer._flatten_layers():
        yield from (*holder._trainable_variables, *holder._non_trainable_variables)


def stateful_layers(model: keras.Layer) -> list[keras.layers.RNN]:
    """The recurrent layers that keep their states from call to call."""
    return [
        layer
        for layer in all_layers(model)
        if isinstance(layer, keras.layers.RNN) and layer.stateful
    ]


@contextlib.contextmanager
def states_kept(model: keras.Model) -> Iterator[None]:
    """A context after which non-trainable variables and recurrent states are what they were."""
    states = [state for layer in all_layers(model) for state in layer._non_trainable_variables]
    states += keras.tree.flatten([layer.states for layer in stateful_layers(model) if layer.built])
    values = [np.array(keras.ops.convert_to_numpy(state)) for state in states]
    try:
        yield
    finally:
        for state, value in zip(states, values, strict=True):
            if np.any(np.asarray(keras.ops.convert_to_numpy(state)) != value):
                state.assign(value)


def is_functional(layer: keras.Layer) -> bool:
    """Whether a layer is a Functional model, and not of a subclass."""
    return type(layer) is Functional
