"""Initial values of the factors, with which their product starts like the full kernel.

With `sigma` the deviation that the layer's `kernel_initializer` gives the full
kernel, each factor is stored with a deviation `s` near it, and the product of
the factors is multiplied by a constant, the `gain`, that makes up for it:

    W = gain * sum_r kron(L_r, R_r)        gain = sigma / (s^2 * sqrt(rank))

So the stored numbers are as large as the numbers of the full kernel. Optimizers whose steps do
not depend on the size of the gradient (Adam and its kin) then move the kernel by as much as they
would move the full kernel. Where deep networks would not begin to train with such large steps,
`s` is larger than `sigma`:

- in wide layers, whose kernels have small numbers: `s` is at least 1/40. A step at Adam's
  default rate is 4% of that.
- at a rank above 8: terms that move in step move their sum by as many times as there are
  terms. So `s` grows with the root of the rank, such that the terms move their sum no more
  than 8 terms do. In a wide layer such a move is larger for the size of the kernel, so there
  `s` also grows as `sigma` falls from 1/40 to 1/80.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bilinear.kronecker import Tensor
from keras_bilinear.kronecker.factorization import Factorization

# Deviation of a unit normal distribution that is cut off at two deviations.
_TRUNCATED_DEVIATION = 0.87962566103423978

# The limits of the stored deviation: see the module's docstring.
_LEAST_STORED = 1 / 40
_MOST_IN_STEP = 8
_WIDEST = 2

# A term that is so much smaller than the largest term comes from the rounding of a decomposition.
_ROUNDING = 1e-13

# Fixed initializers of the left factor, and the initializer of the right factor with which the
# product has the fixed values too.
_FIXED = {
    keras.initializers.Constant: keras.initializers.Ones,
    keras.initializers.Identity: keras.initializers.Identity,
    keras.initializers.Ones: keras.initializers.Ones,
}


def deviation(initializer: Callable, fan_in: int, fan_out: int) -> float | None:
    """The deviation of what a zero-mean random initializer draws.

    Args:
        initializer: a Keras initializer, or another callable.
        fan_in: fan-in of the variable.
        fan_out: fan-out of the variable.

    Returns:
        A float, or `None` if the initializer is not one of Keras' zero-mean random
        initializers, so that its arguments do not tell its deviation.
    """
    if isinstance(initializer, keras.initializers.Orthogonal):
        return abs(initializer.gain) / math.sqrt(max(fan_in, fan_out))
    if isinstance(initializer, keras.initializers.VarianceScaling):
        fan = {"fan_in": fan_in, "fan_out": fan_out}.get(initializer.mode, (fan_in + fan_out) / 2)
        return math.sqrt(initializer.scale / max(1.0, fan))
    if isinstance(initializer, keras.initializers.TruncatedNormal):
        return None if initializer.mean else initializer.stddev * _TRUNCATED_DEVIATION
    if isinstance(initializer, keras.initializers.RandomNormal):
        return None if initializer.mean else initializer.stddev
    if isinstance(initializer, keras.initializers.RandomUniform):
        symmetric = initializer.minval == -initializer.maxval
        return abs(initializer.maxval) / math.sqrt(3) if symmetric else None
    return None


class FactorInitializers:
    """The initializers of both factors, and the gain that goes with them.

    Which values the factors start with depends on the layer's initializer:

    - A zero-mean random initializer of Keras (`"glorot_uniform"`, `"uniform"`, ...): its own
      distribution, scaled so that the materialized kernel has the variance that the full
      kernel would have, for any factors and rank.
    - A fixed initializer (`"zeros"`, `"ones"`, `Constant`, `"identity"`): the kernel has just
      these values; an identity only if both sides have the same factors. The first term has
      the values. Each other term, and the first term of `"zeros"`, has a random left and a
      zero right factor. The product is zero, but unlike two zero factors, or terms that are
      all alike, such terms train.
    - `"orthogonal"`: a kernel with orthonormal rows or columns, as the Kronecker product of
      orthogonal factors has them. The terms of a sum share the columns of an orthogonal
      matrix among themselves, which makes the sum orthogonal too, up to a rank of
      `min(d1, u1)`.
    - Any other initializer (your own): it is called once for each matrix `L_r` and `R_r`,
      and their product is divided by `sqrt(rank)`. If it gives only the shape of the full
      kernel, see `KernelInitializers`.

    Args:
        initializer: the layer's initializer, an instance or a callable.
        left_shape: `(rank, *left_window, d1, u1)`.
        right_shape: `(rank, *right_window, d2, u2)`.
        fan_in: fan-in of the full kernel.
        fan_out: fan-out of the full kernel.

    Attributes:
        gain: the constant that multiplies the product of the factors.
        stored: the deviation of the numbers that a random factor stores.
    """

    def __init__(
        self,
        initializer: Callable,
        left_shape: Sequence[int],
        right_shape: Sequence[int],
        fan_in: int,
        fan_out: int,
    ):
        glorot = keras.initializers.GlorotUniform()
        known = deviation(initializer, fan_in, fan_out)
        if known and isinstance(initializer, keras.initializers.Orthogonal):
            # As a matrix, the kernel of a convolution has the window on the side of the inputs.
            window = math.prod((*left_shape[1:-2], *right_shape[1:-2]))
            known = deviation(initializer, fan_in, fan_out // window)
        zeros = isinstance(initializer, keras.initializers.Zeros) or known == 0
        self._fixed = zeros or type(initializer) in _FIXED
        self._orthogonal = isinstance(initializer, keras.initializers.Orthogonal) and not zeros
        self._first_term = None if zeros else initializer
        drawn = known and not self._orthogonal
        self._random = glorot if self._fixed else (initializer if drawn else None)
        self._initializer = initializer
        self._left_size, self._right_size = math.prod(left_shape), math.prod(right_shape)
        self._rank = left_shape[0]
        full = known or _deviation(glorot, fan_in, fan_out)
        width = min(max(1, _LEAST_STORED / full), _WIDEST)
        in_step = width * math.sqrt(self._rank / _MOST_IN_STEP)
        self.stored = max(full, _LEAST_STORED) * max(1, in_step)
        self.gain = full / (self.stored**2 * math.sqrt(self._rank))
        # What multiplies each product of two matrices.
        self._scale = 1 / math.sqrt(self._rank)
        if self._orthogonal:
            self._initializer = keras.initializers.Orthogonal(seed=initializer.seed)
            left_sides, right_sides = _matrix_sides(left_shape), _matrix_sides(right_shape)
            self._shares = self._rank <= min(left_sides)
            # The product of matrices with orthonormal rows has a deviation of its own.
            own = (max(left_sides) * max(right_sides)) ** -0.5
            self._scale = full / own / (1 if self._shares else math.sqrt(self._rank))

    def left(self, shape: Sequence[int], dtype: str | None = None) -> Tensor:
        """Initial values of the left factor, of `left_shape`."""
        if self._random is None:
            matrices = self._shares_of_one if self._orthogonal and self._shares else self._matrices
            return self._scaled(matrices(shape, dtype, first_seed=0))
        left = ops.reshape(self._draw(dtype)[: self._left_size], shape)
        return self._with_first_term(left, self._first_term) if self._fixed else left

    def right(self, shape: Sequence[int], dtype: str | None = None) -> Tensor:
        """Initial values of the right factor, of `right_shape`."""
        if self._fixed:
            first_term = _FIXED.get(type(self._first_term))
            return self._with_first_term(ops.zeros(shape, dtype), first_term and first_term())
        if self._random is None:
            return self._scaled(self._matrices(shape, dtype, first_seed=max(2, self._rank)))
        return ops.reshape(self._draw(dtype)[self._left_size :], shape)

    def _draw(self, dtype):
        # One draw holds both factors: an initializer gives the same numbers
        # each time it is called, and equal factors would be no random kernel.
        assert self._random is not None
        size = self._left_size + self._right_size
        scale = self.stored / _deviation(self._random, size, size)
        return ops.multiply(self._random((size,), dtype=dtype), scale)

    def _with_first_term(self, factor, initializer):
        if initializer is None:
            return factor
        first = initializer(factor.shape[1:], dtype=factor.dtype)
        first = ops.expand_dims(ops.divide(first, math.sqrt(self.gain)), 0)
        return ops.concatenate([first, factor[1:]])

    def _matrices(self, shape, dtype, first_seed):
        rank, *matrix_shape = shape
        matrices = [
            _with_seed_offset(self._initializer, first_seed + term)(matrix_shape, dtype=dtype)
            for term in range(rank)
        ]
        _check_shape(matrices[0], matrix_shape)
        return ops.stack(matrices)

    def _shares_of_one(self, shape, dtype, first_seed):
        """Splits an orthogonal matrix `A B` into terms, each with some columns of `A`."""
        rank = shape[0]
        rows, columns = _matrix_sides(shape)
        inner = min(rows, columns)
        a = _with_seed_offset(self._initializer, first_seed)((rows, inner), dtype=dtype)
        b = _with_seed_offset(self._initializer, first_seed + 1)((inner, columns), dtype=dtype)
        owner = ops.arange(inner) * rank // inner
        owned = ops.cast(ops.equal(owner, ops.arange(rank)[:, None]), a.dtype)
        return ops.reshape(ops.matmul(ops.multiply(a, owned[:, None]), b), shape)

    def _scaled(self, matrices):
        """One factor's share of the scale and of the gain: the root of both."""
        return ops.multiply(matrices, math.sqrt(self._scale / self.gain))


def _check_shape(values: Any, shape: Sequence[int]) -> None:
    if tuple(values.shape) != tuple(shape):
        raise ValueError(
            f"The initializer must give the shape that it is asked for, {tuple(shape)}. "
            f"Received: values of shape {tuple(values.shape)}"
        )


# Whether new kernels are about to be overwritten, so that nothing has to be decomposed for them.
_OVERWRITTEN = contextvars.ContextVar("overwritten", default=False)


@contextlib.contextmanager
def to_be_overwritten() -> Iterator[None]:
    """A context in which kernels that would start near a given matrix start at zero."""
    token = _OVERWRITTEN.set(True)
    try:
        yield
    finally:
        _OVERWRITTEN.reset(token)


def as_float(values: np.ndarray, dtype: str | None) -> np.ndarray:
    """Values in a precision from which every backend rounds to a dtype.

    NumPy has no bfloat16, and not every backend rounds float64 to it.
    """
    return values.astype("float64" if dtype == "float64" else "float32")


def is_matrix(initializer: Callable) -> bool:
    """Whether an initializer is a `Constant` of more than a single number."""
    if not isinstance(initializer, keras.initializers.Constant):
        return False
    value = initializer.value
    return math.prod(getattr(value, "shape", np.shape(value))) > 1


def draw_full(initializer: Callable, shape: Sequence[int]) -> np.ndarray:
    """What an initializer gives for a full kernel.

    Raises:
        ValueError: if it gives another shape.
    """
    if isinstance(initializer, keras.initializers.Constant):
        # Not through the backend, which may be tracing.
        value = ops.convert_to_numpy(initializer.value)
        try:
            return np.broadcast_to(value, shape)
        except ValueError:
            _check_shape(value, shape)
    dtype = "float64" if keras.config.floatx() == "float64" else "float32"
    values = ops.convert_to_numpy(initializer(tuple(shape), dtype=dtype))
    _check_shape(values, shape)
    return values


class KernelInitializers:
    """The initializers of both factors of a kernel with all its blocks.

    Where the initializer is a matrix, `Constant` or of your own, that has the shape of the full
    kernel and no other shape, the factors start at the Kronecker sum that is nearest to it.

    Args:
        initializer: initializer of the full kernel.
        factorization: the shapes.
        fan_in: fan-in of the full kernel.
        fan_out: fan-out of the full kernel.
        nearest: makes both factors that are nearest to what the initializer gives for the
            full kernel.

    Attributes:
        gain: the constant that multiplies the product of the factors.
    """

    def __init__(
        self,
        initializer: Callable,
        factorization: Factorization,
        fan_in: int,
        fan_out: int,
        nearest: Callable[[], tuple[np.ndarray, np.ndarray]],
    ):
        coupled, self._stacked = factorization.coupled, not factorization.share_right
        self._shapes = factorization.left_shape, factorization.right_shape
        self._nearest = nearest
        self._is_matrix = is_matrix(initializer)
        self._factors = None
        scalar = keras.initializers.Zeros() if self._is_matrix else initializer
        self._blocks = [
            FactorInitializers(of_block, coupled.left_shape, coupled.right_shape, fan_in, fan_out)
            for of_block in (
                split_into_blocks(scalar, factorization.blocks) if self._stacked else [scalar]
            )
        ]
        self.gain = self._blocks[0].gain

    def left(self, shape: Sequence[int], dtype: str | None = None) -> Tensor:
        """Initial values of the left factor."""
        if not self._is_matrix:
            try:
                return self._of_blocks("left", shape, dtype)
            except Exception as error:  # whatever an initializer says of shapes it does not know
                try:
                    return self._of_matrix(0, dtype)
                except Exception:
                    raise error from None
        return self._of_matrix(0, dtype)

    def right(self, shape: Sequence[int], dtype: str | None = None) -> Tensor:
        """Initial values of the right factor."""
        if self._is_matrix:
            return self._of_matrix(1, dtype)
        return self._of_blocks("right", shape, dtype)

    def _of_blocks(self, side, shape, dtype):
        if not self._stacked:
            return getattr(self._blocks[0], side)(shape, dtype)
        return ops.stack([getattr(block, side)(shape[1:], dtype) for block in self._blocks])

    def _of_matrix(self, side, dtype):
        if _OVERWRITTEN.get():
            factors = tuple(map(np.zeros, self._shapes))
        else:
            factors = self._factors or self.store(*self._nearest())
        self._is_matrix = True
        # Both factors are decomposed at once, and kept until they are both asked for.
        self._factors = None if side else factors
        return ops.cast(as_float(factors[side], dtype), dtype or keras.config.floatx())

    def store(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the variables hold where the factors are given.

        That is the factors without the gain. A term whose factors are both zero would never
        train, as each of them multiplies the gradient of the other. So it gets a random left
        factor, as the kernel of `"zeros"` has it.

        Args:
            left: an array of `factorization.left_shape`.
            right: an array of `factorization.right_shape`.
        """
        left, right = left / math.sqrt(self.gain), right / math.sqrt(self.gain)
        terms = left.shape[: 2 if self._stacked else 1]
        norms = [np.linalg.norm(factor.reshape(*terms, -1), axis=-1) for factor in (left, right)]
        largest = np.max(norms[0] * norms[1], axis=-1, keepdims=True)
        dead = np.maximum(*norms) ** 2 <= _ROUNDING * largest
        if np.any(dead):
            limit = math.sqrt(3) * self._blocks[0].stored
            values = np.random.default_rng(0).uniform(-limit, limit, left.shape)
            left[dead], right[dead] = values[dead], 0.0
        return left, right


def _matrix_sides(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of each term of a factor as a matrix, the window among the rows."""
    return math.prod(shape[1:-1]), shape[-1]


def _deviation(initializer, fan_in, fan_out) -> float:
    """The deviation of an initializer whose deviation is known."""
    known = deviation(initializer, fan_in, fan_out)
    assert known is not None
    return known


def _with_seed_offset(initializer, offset):
    """The initializer with another seed, so that it draws other numbers."""
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        return initializer
    return type(initializer).from_config({**initializer.get_config(), "seed": seed + offset})


def split_into_blocks(initializer: Callable, blocks: int) -> list[Callable]:
    """The initializer of each block of a kernel.

    Args:
        initializer: initializer of the kernel. An identity is in the first block alone.
        blocks: number of blocks.
    """
    if isinstance(initializer, keras.initializers.Identity):
        return [initializer, *[keras.initializers.Zeros()] * (blocks - 1)]
    return [_with_seed_offset(initializer, 100 * block) for block in range(blocks)]
