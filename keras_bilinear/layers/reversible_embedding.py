from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

from keras_bilinear.layers.embedding import BilinearEmbedding


@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearReversibleEmbedding(BilinearEmbedding):
    """A `BilinearEmbedding` with the arguments of `keras.layers.ReversibleEmbedding`.

    Language models begin and end with it: `layer(tokens)` embeds, and
    `layer(hidden, reverse=True)` projects back to the vocabulary with the same
    weights.

    Args:
        input_dim: positive integer, size of the vocabulary.
        output_dim: positive integer, width of the embedding.
        tie_weights: must be `True`. For a reverse projection with weights of
            its own take a `BilinearDense`.
        embeddings_initializer: as of `BilinearEmbedding`.
        embeddings_regularizer: as of `BilinearEmbedding`.
        embeddings_constraint: as of `BilinearEmbedding`.
        mask_zero: as of `BilinearEmbedding`.
        reverse_dtype: dtype of the inputs of the reverse projection; `None`
            takes the compute dtype.
        logit_soft_cap: if given, the logits become
            `logit_soft_cap * tanh(logits / logit_soft_cap)`.
        rank: positive integer, number of Kronecker terms.
        input_factors: as of `BilinearEmbedding`.
        output_factors: as of `BilinearEmbedding`.
        implementation: as of `BilinearEmbedding`.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: as of `BilinearEmbedding`.
        reverse: as of `BilinearEmbedding`.

    Input shape:
        As of `BilinearEmbedding`.

    Output shape:
        As of `BilinearEmbedding`.

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

    full_class = keras.layers.ReversibleEmbedding

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
        if tie_weights is not True:
            raise ValueError(
                "`tie_weights` of `BilinearReversibleEmbedding` must be True; take a "
                "`BilinearDense` for a reverse projection with weights of its own. "
                f"Received: tie_weights={tie_weights!r}"
            )
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
        self.tie_weights = True
        self.reverse_dtype = reverse_dtype
        self.logit_soft_cap = logit_soft_cap

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

    @classmethod
    def _kernel_inputs(cls, layer, inputs, **options):
        # In reverse; how often says the way there. Of float indices as many as that are lost.
        if np.issubdtype(inputs.dtype, np.floating) and inputs.shape[-1] == layer.output_dim:
            inputs = np.empty(0, "int32")
        return super()._kernel_inputs(layer, inputs, **options)
