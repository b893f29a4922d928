"""The one place that reaches below the public interface of Keras; tested on Keras 3.13 and 3.15."""

import contextlib
from collections.abc import Iterator

import keras
from keras.src import backend
from keras.src.layers.core.einsum_dense import _analyze_einsum_string
from keras.src.models.functional import Functional
from keras.src.ops.function import Function

# The loop over time that `keras.layers.RNN` runs its cell in.
rnn = backend.rnn


def analyze_einsum(equation, bias_axes, input_shape, output_shape) -> tuple:
    """The shapes of kernel, bias (or `None`) and outputs of a `keras.layers.EinsumDense`.

    Raises:
        ValueError: if they do not fit.
    """
    shapes = _analyze_einsum_string(equation, bias_axes, input_shape, output_shape)
    return tuple(shape if shape is None else tuple(shape) for shape in shapes[:3])


def nodes(model: keras.Model) -> Iterator[tuple[keras.Operation, list]]:
    """The calls in the graph of a model, in an order in which they can be done.

    Yields:
        `(operation, inputs)`, the inputs but for masks as `(operation that made
        it, shape)`.

    Raises:
        ValueError: if the model is subclassed or not built, so that it has no graph.
    """
    for _, level in sorted(_graph(model)._nodes_by_depth.items(), reverse=True):
        for node in level:
            if not node.is_input:
                tensors = [one for one in node.input_tensors if one.dtype != "bool"]
                yield (
                    node.operation,
                    [(one._keras_history.operation, one.shape) for one in tensors],
                )


def output_operations(model: keras.Model) -> list[keras.Operation]:
    """The operations that make the outputs of a model with a graph."""
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
    """The layers that a layer holds itself, in the order in which they were attached."""
    return layer._flatten_layers(include_self=False, recursive=False)


def all_layers(model: keras.Model) -> list[keras.Layer]:
    """A model and all layers in it, to any depth."""
    return list(model._flatten_layers())


def own_variables(layer: keras.Layer) -> Iterator[keras.Variable]:
    """The variables of a layer and of those in it; one that several have comes up again."""
    for one in layer._flatten_layers():
        yield from (*one._trainable_variables, *one._non_trainable_variables)


def stateful_layers(model: keras.Model) -> list[keras.layers.RNN]:
    """The recurrent layers that remember their states from call to call."""
    return [one for one in all_layers(model) if isinstance(one, keras.layers.RNN) and one.stateful]


@contextlib.contextmanager
def states_kept(model: keras.Model) -> Iterator[None]:
    """Keeps what layers remember from call to call, as stateful recurrent ones do."""
    layers = all_layers(model)
    states = [one for layer in layers for one in layer._non_trainable_variables]
    states += keras.tree.flatten([one.states for one in stateful_layers(model) if one.built])
    values = [keras.ops.convert_to_numpy(state).copy() for state in states]
    try:
        yield
    finally:
        for state, value in zip(states, values, strict=True):
            if (keras.ops.convert_to_numpy(state) != value).any():
                state.assign(value)


def is_functional(layer: keras.Layer) -> bool:
    """Whether a layer is a model that is its graph, and not of a subclass."""
    return type(layer) is Functional
