"""Initial values of the factors, so that their product starts like the full kernel.

With `sigma` the deviation that the layer's `kernel_initializer` gives the full
kernel, each factor is stored with that same deviation, and the product of the
factors is multiplied by a constant, the `gain`, that makes up for it:

    W = gain * sum_r kron(L_r, R_r)        gain = 1 / (sigma * sqrt(rank))

So the stored numbers have the size of the full kernel's, and optimizers whose
steps do not depend on the size of the gradient (Adam and its kin) move the
kernel by as much as they would move the full one's.
"""

import math

import keras
from keras import ops

# Deviation of a unit normal distribution that is cut off at two deviations.
_TRUNCATED_DEVIATION = 0.87962566103423978

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
    - any other (`"orthogonal"`, your own): it is called once for each matrix
      `L_r` and `R_r`, and their product is divided by `sqrt(rank)`. A Kronecker
      product of orthogonal factors is orthogonal.

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
        self._first_term = None if zeros else initializer
        self._random = glorot if self._fixed else (initializer if known else None)
        self._initializer = initializer
        self._left_size, self._right_size = math.prod(left_shape), math.prod(right_shape)
        self._rank = left_shape[0]
        self.deviation = known or deviation(glorot, fan_in, fan_out)
        self.gain = 1.0 / (self.deviation * math.sqrt(self._rank))

    def left(self, shape, dtype=None):
        if self._random is None:
            return self._each_matrix(shape, dtype, first_seed=0)
        left = ops.reshape(self._draw(dtype)[: self._left_size], shape)
        return self._with_first_term(left, self._first_term) if self._fixed else left

    def right(self, shape, dtype=None):
        if self._fixed:
            first_term = _FIXED.get(type(self._first_term))
            return self._with_first_term(ops.zeros(shape, dtype), first_term and first_term())
        if self._random is None:
            return self._each_matrix(shape, dtype, first_seed=self._rank)
        return ops.reshape(self._draw(dtype)[self._left_size :], shape)

    def _draw(self, dtype):
        # One draw holds both factors: an initializer gives the same numbers
        # each time it is called, and equal factors would be no random kernel.
        size = self._left_size + self._right_size
        scale = self.deviation / deviation(self._random, size, size)
        return ops.multiply(self._random((size,), dtype=dtype), scale)

    def _with_first_term(self, factor, initializer):
        if initializer is None:
            return factor
        first = initializer(factor.shape[1:], dtype=factor.dtype)
        first = ops.expand_dims(ops.divide(first, math.sqrt(self.gain)), 0)
        return ops.concatenate([first, factor[1:]])

    def _each_matrix(self, shape, dtype, first_seed):
        rank, *matrix_shape = shape
        matrices = [
            _with_seed_offset(self._initializer, first_seed + term)(matrix_shape, dtype=dtype)
            for term in range(rank)
        ]
        # Both factors together make up for the gain, and for the sum of terms.
        return ops.divide(ops.stack(matrices), math.sqrt(self.gain * math.sqrt(rank)))


def _with_seed_offset(initializer, offset):
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        return initializer
    return type(initializer).from_config({**initializer.get_config(), "seed": seed + offset})
