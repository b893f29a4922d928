"""Initial values of the factors, so that their product starts like the full kernel.

With `sigma` the deviation that the layer's `kernel_initializer` gives the full
kernel, each factor is stored with a deviation `s` near it, and the product of
the factors is multiplied by a constant, the `gain`, that makes up for it:

    W = gain * sum_r kron(L_r, R_r)        gain = sigma / (s^2 * sqrt(rank))

So the stored numbers have the size of the full kernel's, and optimizers whose
steps do not depend on the size of the gradient (Adam and its kin) move the
kernel by as much as they would move the full one's. Where that would be too
much, as deep networks do not begin to train then, `s` is larger than `sigma`:

- in wide layers, whose kernels have small numbers: `s` is at least 1/40, of
  which a step at Adam's default rate is 4%;
- at a rank above 8, as terms that move in step move their sum by as many times
  as there are terms: `s` grows with the root of the rank, such that they move
  it no more than 8 terms do. In a wide layer that is more for its size, so there
  fewer terms do: `s` grows as `sigma` falls from 1/40 to 1/80.
"""

import math

import keras
from keras import ops

# Deviation of a unit normal distribution that is cut off at two deviations.
_TRUNCATED_DEVIATION = 0.87962566103423978

# What the stored deviation goes by, see above.
_LEAST_STORED = 1 / 40
_MOST_IN_STEP = 8
_WIDEST = 2

# Fixed initializers, and what the right factor has where the left one has their
# values, so that the product has them too.
_FIXED = {
    keras.initializers.Constant: keras.initializers.Ones,
    keras.initializers.Identity: keras.initializers.Identity,
    keras.initializers.Ones: keras.initializers.Ones,
}


def deviation(initializer, fan_in, fan_out):
    """The deviation of what a zero-mean random initializer draws.

    Returns:
        A float, or `None` if the initializer is none of Keras' zero-mean random
        ones, so that its deviation is not known from its arguments.
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

    - Keras' zero-mean random ones (`"glorot_uniform"`, `"uniform"`, ...): its
      own distribution, scaled so that the materialized kernel has the variance
      that the full kernel would have, for any factors and rank.
    - the fixed ones (`"zeros"`, `"ones"`, `Constant`, `"identity"`): the kernel
      has just these values; an identity, where both sides have the same
      factors. They stand in the first term. The other terms, and the only one of
      `"zeros"`, have a random left and a zero right factor: their product is
      zero, but unlike two zero factors, or terms that are all alike, they train.
    - `"orthogonal"`: a kernel with orthonormal rows or columns, as the Kronecker
      product of such factors has them. The terms of a sum share the columns of
      an orthogonal matrix among themselves, which makes the sum orthogonal too,
      up to a rank of `min(d1, u1)`.
    - any other (your own): it is called once for each matrix `L_r` and `R_r`,
      and their product is divided by `sqrt(rank)`.

    Args:
        initializer: the layer's initializer, an instance or a callable.
        left_shape: `(rank, d1, u1)`.
        right_shape: `(rank, d2, u2)`.
        fan_in: fan-in of the full kernel.
        fan_out: fan-out of the full kernel.
    """

    def __init__(self, initializer, left_shape, right_shape, fan_in, fan_out):
        glorot = keras.initializers.GlorotUniform()
        known = deviation(initializer, fan_in, fan_out)
        zeros = isinstance(initializer, keras.initializers.Zeros) or known == 0
        self._fixed = zeros or type(initializer) in _FIXED
        self._orthogonal = isinstance(initializer, keras.initializers.Orthogonal) and not zeros
        self._first_term = None if zeros else initializer
        drawn = known and not self._orthogonal
        self._random = glorot if self._fixed else (initializer if drawn else None)
        self._initializer = initializer
        self._left_size, self._right_size = math.prod(left_shape), math.prod(right_shape)
        self._rank = left_shape[0]
        full = known or deviation(glorot, fan_in, fan_out)
        width = min(max(1, _LEAST_STORED / full), _WIDEST)
        in_step = width * math.sqrt(self._rank / _MOST_IN_STEP)
        self._stored = max(full, _LEAST_STORED) * max(1, in_step)
        self.gain = full / (self._stored**2 * math.sqrt(self._rank))
        # What each product of two matrices is multiplied by.
        self._scale = 1 / math.sqrt(self._rank)
        if self._orthogonal:
            self._initializer = keras.initializers.Orthogonal(seed=initializer.seed)
            self._shares = self._rank <= min(left_shape[-2:])
            # The product of matrices with orthonormal rows has a deviation of its own.
            own = math.prod(max(shape[-2:]) for shape in (left_shape, right_shape)) ** -0.5
            self._scale = full / own / (1 if self._shares else math.sqrt(self._rank))

    def left(self, shape, dtype=None):
        if self._random is None:
            matrices = self._shares_of_one if self._orthogonal and self._shares else self._matrices
            return self._scaled(matrices(shape, dtype, first_seed=0))
        left = ops.reshape(self._draw(dtype)[: self._left_size], shape)
        return self._with_first_term(left, self._first_term) if self._fixed else left

    def right(self, shape, dtype=None):
        if self._fixed:
            first_term = _FIXED.get(type(self._first_term))
            return self._with_first_term(ops.zeros(shape, dtype), first_term and first_term())
        if self._random is None:
            return self._scaled(self._matrices(shape, dtype, first_seed=max(2, self._rank)))
        return ops.reshape(self._draw(dtype)[self._left_size :], shape)

    def _draw(self, dtype):
        # One draw holds both factors: an initializer gives the same numbers
        # each time it is called, and equal factors would be no random kernel.
        size = self._left_size + self._right_size
        scale = self._stored / deviation(self._random, size, size)
        return ops.multiply(self._random((size,), dtype=dtype), scale)

    def _with_first_term(self, factor, initializer):
        if initializer is None:
            return factor
        first = initializer(factor.shape[1:], dtype=factor.dtype)
        first = ops.expand_dims(ops.divide(first, math.sqrt(self.gain)), 0)
        return ops.concatenate([first, factor[1:]])

    def _matrices(self, shape, dtype, first_seed):
        rank, *matrix_shape = shape
        return ops.stack(
            [
                _with_seed_offset(self._initializer, first_seed + term)(matrix_shape, dtype=dtype)
                for term in range(rank)
            ]
        )

    def _shares_of_one(self, shape, dtype, first_seed):
        """Splits an orthogonal matrix `A B` into terms: each has some columns of `A`."""
        rank, rows, columns = shape
        inner = min(rows, columns)
        a = _with_seed_offset(self._initializer, first_seed)((rows, inner), dtype=dtype)
        b = _with_seed_offset(self._initializer, first_seed + 1)((inner, columns), dtype=dtype)
        owner = ops.arange(inner) * rank // inner
        mine = ops.cast(ops.equal(owner, ops.arange(rank)[:, None]), a.dtype)
        return ops.matmul(ops.multiply(a, mine[:, None]), b)

    def _scaled(self, matrices):
        """Both factors together make up for the scale and for the gain."""
        return ops.multiply(matrices, math.sqrt(self._scale / self.gain))


def _with_seed_offset(initializer, offset):
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        return initializer
    return type(initializer).from_config({**initializer.get_config(), "seed": seed + offset})


def split_into_blocks(initializer, blocks):
    """The initializer of each block of a kernel; an identity stands in the first block."""
    if isinstance(initializer, keras.initializers.Identity):
        return [initializer, *[keras.initializers.Zeros()] * (blocks - 1)]
    return [_with_seed_offset(initializer, 100 * block) for block in range(blocks)]
