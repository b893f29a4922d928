from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bilinear.kronecker.factorization import Factorization
from keras_bilinear.kronecker.statistics import IndexCounts, InputStatistics
from keras_bilinear.layers.converter import register
from keras_bilinear.layers.embedding import BilinearEmbedding, EmbeddingConverter


class ReversibleEmbeddingConverter(EmbeddingConverter):
    """Between `keras.layers.ReversibleEmbedding` and `BilinearReversibleEmbedding`."""

    kernel_names = ("embeddings", "reverse_embeddings")
    width = None

    def rows(
        self, full: keras.Layer, inputs: np.ndarray, reverse: bool | None = None, **call: Any
    ) -> dict[str, list]:
        if reverse is None:  # inputs without a call
            floats = np.issubdtype(inputs.dtype, np.floating)
            reverse = floats and inputs.shape[-1] == full.output_dim
        indices, hidden = np.empty(0, "int32"), np.empty((0, full.output_dim), "float32")
        if reverse:
            hidden = inputs.reshape(-1, full.output_dim)
        else:
            indices = inputs
        if full.tie_weights and reverse:
            return {"embeddings": [hidden]}
        rows = super().rows(full, indices, **call)
        return rows if full.tie_weights else {**rows, "reverse_embeddings": [hidden]}

    def gradients(
        self,
        full: keras.Layer,
        inputs: np.ndarray,
        rows: dict[str, list],
        gradients: Any,
        reverse: bool | None = None,
        **call: Any,
    ) -> dict[str, list]:
        gradients = gradients.reshape(-1, gradients.shape[-1])
        no_rows, no_hidden = (
            np.empty((0, size), "float32") for size in (full.output_dim, full.input_dim)
        )
        if not reverse:
            return {"embeddings": [gradients], "reverse_embeddings": [no_hidden]}
        if full.logit_soft_cap is not None:
            weights = self.weights(full)
            kernel = weights["embeddings"].T if full.tie_weights else weights["reverse_embeddings"]
            logits = inputs.reshape(-1, full.output_dim) @ kernel
            capped = np.tanh(logits / full.logit_soft_cap)
            gradients = gradients * (1 - capped**2)
        if full.tie_weights:
            return {"embeddings": [gradients]}
        return {"embeddings": [no_rows], "reverse_embeddings": [gradients]}

    def statistics(self, name: str, block: np.ndarray) -> InputStatistics | IndexCounts:
        return InputStatistics(block) if name == "reverse_embeddings" else IndexCounts(block)


@register(keras.layers.ReversibleEmbedding, converter=ReversibleEmbeddingConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearReversibleEmbedding(BilinearEmbedding):
    """A `BilinearEmbedding` with the arguments of `keras.layers.ReversibleEmbedding`.

    Language models begin and end with it: `layer(tokens)` embeds, and
    `layer(hidden, reverse=True)` projects back to the vocabulary, with the same
    weights or with others. With others, `from_full` takes calibration data for
    both: arrays of tokens and arrays of hidden states.

    Args:
        input_dim: positive integer, size of the vocabulary.
        output_dim: positive integer, width of the embedding.
        tie_weights: whether the reverse projection has the weights of the
            embedding. If not, it has factors of its own, of the same rank and
            with the input and output factors the other way round.
        embeddings_initializer: initializer of the full table. The factors start
            such that the table has the variance that it gives.
        embeddings_regularizer: regularizer of each stored factor.
        embeddings_constraint: constraint of each stored factor.
        mask_zero: whether index 0 is padding that later layers must mask.
        reverse_dtype: dtype of the inputs of the reverse projection; `None`
            takes the compute dtype.
        logit_soft_cap: if given, the logits become
            `logit_soft_cap * tanh(logits / logit_soft_cap)`.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(v1, v2)` with a product of at least `input_dim`. `None`
            chooses near-square factors.
        output_factors: `(u1, u2)` with a product of at least `output_dim`. `None`
            chooses near-square factors.
        implementation: `"auto"` and `"factorized"` form no table;
            `"materialized"` forms it at each call.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: integers of any dtype, `0 <= inputs < input_dim`; with
            `reverse=True` floats.
        reverse: whether to project from the embedding to the vocabulary.

    Input shape:
        Any shape of integers; `(..., output_dim)` with `reverse=True`.

    Output shape:
        `(*input_shape, output_dim)`; `(..., input_dim)` with `reverse=True`.

    Raises:
        ValueError: if an argument is not valid, or if the inputs are no
            integers.

    Example:

    >>> layer = BilinearReversibleEmbedding(20_000, 128, rank=2)
    >>> hidden = layer(np.array([[1, 2, 3]]))
    >>> layer(hidden, reverse=True).shape == (1, 3, 20_000)
    True

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        tie_weights: bool = True,
        embeddings_initializer: str | dict | Callable = "uniform",
        embeddings_regularizer: str | dict | Callable | None = None,
        embeddings_constraint: str | dict | Callable | None = None,
        mask_zero: bool = False,
        reverse_dtype: str | None = None,
        logit_soft_cap: float | None = None,
        rank: int = 1,
        input_factors: Sequence[int] | None = None,
        output_factors: Sequence[int] | None = None,
        implementation: str = "auto",
        **kwargs,
    ):
        super().__init__(
            input_dim,
            output_dim,
            embeddings_initializer=embeddings_initializer,
            embeddings_regularizer=embeddings_regularizer,
            embeddings_constraint=embeddings_constraint,
            mask_zero=mask_zero,
            rank=rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
            **kwargs,
        )
        self.tie_weights = tie_weights
        self.reverse_dtype = reverse_dtype
        self.logit_soft_cap = logit_soft_cap

    def build(self, input_shape: tuple | None = None):
        if self.built:
            return
        super().build(input_shape)
        if not self.tie_weights:
            # Neither regularized nor constrained, as in Keras.
            self.add_kernel(
                "reverse_embeddings",
                self._factorization.transposed,
                self.embeddings_initializer,
                implementation=self._kernel_implementation,
            )

    def factorize(self, input_shape: tuple | None = None) -> dict[str, Factorization]:
        kernels = super().factorize(input_shape)
        if self.tie_weights:
            return kernels
        return {**kernels, "reverse_embeddings": self._factorization.transposed}

    @property
    def reverse_embeddings(self):
        """The kernel of the reverse projection, `(output_dim, input_dim)`, a new tensor."""
        table = self._built_kernel().materialize()
        if self.tie_weights:
            return ops.transpose(table)
        return self.kernels["reverse_embeddings"].materialize()

    def call(self, inputs, reverse: bool = False, training: bool | None = None):
        outputs = super().call(inputs, reverse=reverse, training=training)
        if not reverse or self.logit_soft_cap is None:
            return outputs
        capped = ops.tanh(ops.divide(outputs, self.logit_soft_cap))
        return ops.multiply(capped, self.logit_soft_cap)

    def compute_mask(self, inputs, mask=None):
        return None if self._reversed else super().compute_mask(inputs, mask)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "tie_weights": self.tie_weights,
            "reverse_dtype": self.reverse_dtype,
            "logit_soft_cap": self.logit_soft_cap,
        }

    def _project_back(self, hidden):
        if self.tie_weights:
            return super()._project_back(hidden)
        return self.kernels["reverse_embeddings"].project(hidden)
