import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import constraints, initializers, ops, regularizers

from keras_bilinear.kronecker.factorization import Factorization, check_positive_int
from keras_bilinear.kronecker.statistics import IndexCounts, InputStatistics
from keras_bilinear.layers.base import BilinearLayer
from keras_bilinear.layers.converter import Converter, is_bilinear, register

# float32 holds all integers up to this one.
_EXACT = 2**24


class EmbeddingConverter(Converter):
    """Between `keras.layers.Embedding` and `BilinearEmbedding`."""

    kernel_names = ("embeddings",)
    constraint_names = ("embeddings_constraint",)
    width = "output_dim"

    def rows(self, full: keras.Layer, inputs: np.ndarray, **call: Any) -> dict[str, list]:
        indices = inputs.astype("int64").ravel()
        if np.any((indices != inputs.ravel()) | (indices < 0) | (indices >= full.input_dim)):
            raise ValueError(
                f"`calibration_data` must be inputs of the layer {full.name!r}, integers from 0 "
                f"to {full.input_dim - 1}. Received: {inputs!r}"
            )
        return {"embeddings": [indices]}

    def statistics(self, name: str, block: np.ndarray) -> InputStatistics | IndexCounts:
        return IndexCounts(block)

    def has_bias(self, full: keras.Layer) -> bool:
        return False

    def can_calibrate(self, full: keras.Layer) -> bool:
        return True  # The Gram matrix of indices is diagonal.

    def macs(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        reverse = len(inputs) == len(outputs)
        if not is_bilinear(layer):
            return math.prod(inputs) * layer.input_dim if reverse else 0
        factorization = layer.factorization
        if reverse:
            rows = math.prod(inputs) // factorization.output_dim
            return rows * factorization.transposed.macs
        return math.prod(inputs) * factorization.rank * factorization.padded_output_dim

    def workspace(self, layer: keras.Layer, inputs: tuple, outputs: tuple) -> int:
        return 0


@register(keras.layers.Embedding, converter=EmbeddingConverter)
@keras.saving.register_keras_serializable(package="keras_bilinear")
class BilinearEmbedding(BilinearLayer):
    """An embedding whose table is a sum of Kronecker products.

    Row `i` of the table is `sum_r kron(L_r[i // v2], R_r[i % v2])`: two gathers
    from small tables and an outer product. The table itself is never formed, in
    training neither; one of 10^9 rows of 256 numbers takes 4 million parameters
    at rank 4.

    Args:
        input_dim: positive integer, size of the vocabulary.
        output_dim: positive integer, width of the embedding.
        embeddings_initializer: initializer of the full table. The factors start
            such that the table has the variance that it gives.
        embeddings_regularizer: regularizer of each stored factor.
        embeddings_constraint: constraint of each stored factor.
        mask_zero: whether index 0 is padding that later layers must mask.
        weights: full table of shape `(input_dim, output_dim)` to start from;
            the nearest sum of Kronecker products is stored.
        rank: positive integer, number of Kronecker terms.
        input_factors: `(v1, v2)` with a product of at least `input_dim`. `None`
            chooses near-square factors.
        output_factors: `(u1, u2)` with a product of at least `output_dim`. `None`
            chooses near-square factors.
        implementation: `"auto"` and `"factorized"` form no table;
            `"materialized"` forms it at each call and gathers from it.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: integers of any dtype, `0 <= inputs < input_dim`; a negative
            index counts from the end, as in Keras. What an index outside the
            vocabulary gives depends on the backend. Floats are taken as
            integers, as in Keras, where float32 holds all of them. With
            `reverse=True`, floats.
        reverse: whether to project from the embedding to the vocabulary
            instead, `inputs @ table^T`, with the same weights: the tied output
            logits of a language model, computed factorized.

    Input shape:
        Any shape of integers; `(..., output_dim)` with `reverse=True`.

    Output shape:
        `(*input_shape, output_dim)`; `(..., input_dim)` with `reverse=True`.

    Raises:
        ValueError: if an argument is not valid, or if the inputs are no
            integers, or floats and `input_dim` is above 2^24. Begin a model with
            `keras.Input(shape, dtype="int32")`: the default dtype of
            `keras.Input` is float32, which holds no integers above that.

    Example:

    >>> layer = BilinearEmbedding(20_000, 128, rank=2)
    >>> layer(np.array([[1, 2, 3]])).shape == (1, 3, 128)
    True
    >>> layer.count_params()  # an Embedding layer has 2,560,000
    7120

    Reference:
        Yu, Gao, Zhou, Zhang, "Parameter Efficient Deep Neural Networks with
        Bilinear Projections", section III, arXiv:2011.01391.
    """

    reverse_dtype = None
    # Whether the last call was one in reverse: Keras asks for its mask without saying so.
    _reversed = False

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        embeddings_initializer: str | dict | Callable = "uniform",
        embeddings_regularizer: str | dict | Callable | None = None,
        embeddings_constraint: str | dict | Callable | None = None,
        mask_zero: bool = False,
        weights: np.ndarray | list[np.ndarray] | None = None,
        rank: int = 1,
        input_factors: Sequence[int] | None = None,
        output_factors: Sequence[int] | None = None,
        implementation: str = "auto",
        **kwargs,
    ):
        super().__init__(
            rank=rank,
            input_factors=input_factors,
            output_factors=output_factors,
            implementation=implementation,
            **kwargs,
        )
        self._factorization = self.factorization_of(
            check_positive_int("input_dim", input_dim), check_positive_int("output_dim", output_dim)
        )
        self.input_dim = self._factorization.input_dim
        self.output_dim = self._factorization.output_dim
        self.embeddings_initializer = initializers.get(embeddings_initializer)
        self.embeddings_regularizer = regularizers.get(embeddings_regularizer)
        self.embeddings_constraint = constraints.get(embeddings_constraint)
        self.mask_zero = mask_zero
        self.supports_masking = mask_zero
        if weights is not None:
            wrapped = isinstance(weights, list) and len(weights) == 1
            table = np.asarray(weights[0] if wrapped else weights)
            if table.shape != (self.input_dim, self.output_dim):
                raise ValueError(
                    "`weights` must be a table of shape `(input_dim, output_dim)`. Received: "
                    f"weights of shape {table.shape}, input_dim={input_dim}, "
                    f"output_dim={output_dim}"
                )
            if not np.isfinite(table).all():
                raise ValueError(
                    "`weights` must be finite. Received: weights with NaN or infinite values"
                )
            self.build()
            self._kernel.assign(table)

    def build(self, input_shape: tuple | None = None):
        if self.built:
            return
        self._kernel = self.add_kernel(
            "embeddings",
            self._factorization,
            self.embeddings_initializer,
            regularizer=self.embeddings_regularizer,
            constraint=self.embeddings_constraint,
            implementation=self._kernel_implementation,
            variables="kernel",
        )
        self.built = True

    def factorize(self, input_shape: tuple | None = None) -> dict[str, Factorization]:
        return {"embeddings": self._factorization}

    @property
    def _kernel_implementation(self):
        # A row needs a fraction of the work of the table at any rank.
        return "factorized" if self.implementation == "auto" else self.implementation

    @property
    def embeddings(self):
        """The table that the factors stand for, a new tensor of full size."""
        return self.kernel

    @property
    def input_dtype(self) -> str:
        """The dtype that Keras casts float inputs to: in half precision few indices are exact."""
        return self.variable_dtype

    def call(self, inputs, reverse: bool = False, training: bool | None = None):
        del training  # changes nothing
        dtype = self._check_inputs(inputs, reverse)
        if reverse:
            inputs = ops.cast(inputs, self.reverse_dtype or self.compute_dtype)
            return self._project_back(inputs)
        # Narrow integers do not hold the divisor, and few ops take unsigned ones.
        inputs = ops.cast(inputs, "int64" if dtype in ("int64", "uint64", "uint32") else "int32")
        if self._factorization.padded_input_dim != self.input_dim:
            # Without padding, a negative index counts from the end by itself.
            inputs = ops.where(inputs < 0, inputs + self.input_dim, inputs)
        return self._kernel.rows(inputs)

    def _project_back(self, hidden):
        return self._kernel.project(hidden, transposed=True)

    def _check_inputs(self, inputs, reverse):
        self._reversed = reverse
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        if reverse and inputs.shape[-1] != self.output_dim:
            raise ValueError(
                "With `reverse=True` the last dimension of the inputs must be "
                f"output_dim={self.output_dim}. Received: inputs.shape={inputs.shape}"
            )
        is_exact = "int" in dtype or ("float" in dtype and self.input_dim <= _EXACT)
        if not reverse and not is_exact:
            raise ValueError(
                "`BilinearEmbedding` takes integer indices; floats as well, up to "
                f"input_dim={_EXACT}. Received: inputs.dtype={dtype}, input_dim={self.input_dim}. "
                "If this comes from a model's input, begin the model with "
                '`keras.Input(shape, dtype="int32")`.'
            )
        return dtype

    def compute_mask(self, inputs, mask=None):
        if self._reversed:
            return mask
        return ops.not_equal(inputs, 0) if self.mask_zero else None

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return (*input_shape, self.output_dim)

    def compute_output_spec(
        self, inputs, reverse: bool = False, training: bool | None = None
    ) -> keras.KerasTensor:
        del training
        self._check_inputs(inputs, reverse)
        if reverse:
            shape = (*inputs.shape[:-1], self.input_dim)
        else:
            shape = self.compute_output_shape(inputs.shape)
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "embeddings_initializer": initializers.serialize(self.embeddings_initializer),
            "embeddings_regularizer": regularizers.serialize(self.embeddings_regularizer),
            "activity_regularizer": regularizers.serialize(self.activity_regularizer),
            "embeddings_constraint": constraints.serialize(self.embeddings_constraint),
            "mask_zero": self.mask_zero,
        }
