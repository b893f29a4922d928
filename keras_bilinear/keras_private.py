"""The one place that reaches below the public interface of Keras; tested on Keras 3.13 and 3.15."""

from collections.abc import Iterator

import keras
from keras.src import backend
from keras.src.ops.function import Function

# The loop over time that `keras.layers.RNN` runs its cell in.
rnn = backend.rnn


def calls(model: keras.Model) -> Iterator[tuple[keras.Layer, list[tuple]]]:
    """Each call in the graph of a model: `(layer, input shapes)`; a shared layer comes up again.

    Raises:
        ValueError: if the model is subclassed or not built, so that it has no graph.
    """
    graph = getattr(model, "_functional", model)  # a Sequential model keeps its own graph
    if not isinstance(graph, Function):
        raise ValueError(
            "The model must be a built Sequential or a Functional one, whose graph is known. "
            f"Received: model={model!r}"
        )
    for _, nodes in sorted(graph._nodes_by_depth.items(), reverse=True):
        for node in nodes:
            if isinstance(node.operation, keras.Layer) and not node.is_input:
                yield node.operation, [tensor.shape for tensor in node.input_tensors]
