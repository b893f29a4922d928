"""The mathematics of Kronecker sums: shapes, products, fits, cost. No layer, no model."""

from typing import Any, TypeAlias

# A tensor of any backend, or a `keras.Variable`. The backends' tensors have no base class in
# common, and Keras has no types for its operations.
Tensor: TypeAlias = Any
