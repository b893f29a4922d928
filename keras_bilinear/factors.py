"""Integers first: the shapes of a bilinear projection, before any tensor exists."""

import dataclasses
import math
import operator

# A split that stores the size exactly needs no padding, so it is worth up to
# this much more than the smallest sum of two factors.
_EXACT_SPLIT_BONUS = 1.25


def check_positive_int(name, value):
    """Returns `value` as an `int`; refuses everything but integers above zero.

    Raises:
        ValueError: if `value` is a bool, no integer, zero or negative.
    """
    try:
        integer = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        integer = None
    if integer is None or integer < 1:
        raise ValueError(
            f"`{name}` must be a positive integer. "
            f"Received: {name}={value!r} (of type {type(value).__name__})"
        )
    return integer


def check_factors(name, value, size=None):
    """Returns `value` as a pair of integers that can factor `size`.

    Args:
        name: argument name for the error text.
        value: a sequence of two positive integers, or `None`.
        size: the number of elements to hold; `None` while it is unknown.

    Returns:
        A tuple `(first, second)`, or `None` if `value` is `None`.

    Raises:
        ValueError: if `value` is not a pair of positive integers, if their
            product is below `size`, or if one of them could be lowered by one
            and still hold `size` elements.
    """
    if value is None:
        return None
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
        raise ValueError(
            f"`{name}` must be a pair of positive integers. Received: {name}={value!r}"
        )
    first, second = (check_positive_int(f"{name}[{i}]", v) for i, v in enumerate(value))
    if size is not None:
        if first * second < size:
            raise ValueError(
                f"The product of `{name}` must be at least {size}, the size they factor. "
                f"Received: {name}={value!r} with product {first * second}"
            )
        if (first - 1) * second >= size or first * (second - 1) >= size:
            raise ValueError(
                f"`{name}` must fit the size {size} tightly: no factor may be larger than "
                f"the other one needs. Received: {name}={value!r}"
            )
    return first, second


def choose_factors(size):
    """Splits `size` into two near-square factors `a <= b` with `a * b >= size`.

    An exact split is taken where one is nearly as square as the best padded
    one; a prime is therefore padded and never becomes `1 x size`.

    >>> choose_factors(784), choose_factors(10), choose_factors(10007)
    ((28, 28), (2, 5), (91, 110))
    """
    size = check_positive_int("size", size)

    def cost(split):
        first, second = split
        padding = first * second - size
        bonus = 1.0 if padding == 0 else _EXACT_SPLIT_BONUS
        return (first + second) * bonus, padding, first

    root = math.isqrt(size)
    # The sum of the factors grows as they move away from the root, so none
    # below `root / 2` can win against the near-square split, exact or not.
    # Only 1 and 2 have no split but `1 x size`.
    smallest = max(1 if size <= 2 else 2, root // 2)
    candidates = ((a, -(-size // a)) for a in range(smallest, root + 2))
    return min((c for c in candidates if c[0] <= c[1]), key=cost)


@dataclasses.dataclass(frozen=True)
class Factorization:
    """The shapes of `Y = sum_r L_r^T X R_r`, and all that follows from them.

    Attributes:
        input_dim: true input width, `D_in`.
        output_dim: true output width, `D_out`.
        input_factors: `(d1, d2)` with `d1 * d2 >= D_in`.
        output_factors: `(u1, u2)` with `u1 * u2 >= D_out`.
        rank: number of Kronecker terms.
    """

    input_dim: int
    output_dim: int
    input_factors: tuple
    output_factors: tuple
    rank: int = 1

    @classmethod
    def create(cls, input_dim, output_dim, input_factors=None, output_factors=None, rank=1):
        """Checks the arguments and chooses the factors that are `None`.

        Raises:
            ValueError: if a size, a rank or a pair of factors is not valid.
        """
        input_dim = check_positive_int("input_dim", input_dim)
        output_dim = check_positive_int("output_dim", output_dim)
        return cls(
            input_dim=input_dim,
            output_dim=output_dim,
            input_factors=check_factors("input_factors", input_factors, input_dim)
            or choose_factors(input_dim),
            output_factors=check_factors("output_factors", output_factors, output_dim)
            or choose_factors(output_dim),
            rank=check_positive_int("rank", rank),
        )

    @property
    def left_shape(self):
        return (self.rank, self.input_factors[0], self.output_factors[0])

    @property
    def right_shape(self):
        return (self.rank, self.input_factors[1], self.output_factors[1])

    @property
    def padded_input_dim(self):
        return math.prod(self.input_factors)

    @property
    def padded_output_dim(self):
        return math.prod(self.output_factors)

    @property
    def parameters(self):
        """Numbers stored in both factors."""
        return math.prod(self.left_shape) + math.prod(self.right_shape)

    @property
    def full_parameters(self):
        """Numbers stored in the full kernel."""
        return self.input_dim * self.output_dim

    @property
    def attainable_rank(self):
        """The highest matrix rank that the materialized kernel can have."""
        (d1, d2), (u1, u2) = self.input_factors, self.output_factors
        return min(self.rank * min(d1, u1) * min(d2, u2), min(self.input_dim, self.output_dim))

    @property
    def sufficient_rank(self):
        """The rank at which every full kernel is stored exactly."""
        (d1, d2), (u1, u2) = self.input_factors, self.output_factors
        return min(d1 * u1, d2 * u2)

    def _macs(self, order):
        (d1, d2), (u1, u2) = self.input_factors, self.output_factors
        if order == "left":
            return self.rank * u1 * d2 * (d1 + u2)
        return self.rank * d1 * u2 * (d2 + u1)

    @property
    def order(self):
        """The side to contract first, `"left"` or `"right"`: the one with fewer MACs."""
        return "left" if self._macs("left") <= self._macs("right") else "right"

    @property
    def macs(self):
        """Multiply-accumulate operations to project one vector, factorized."""
        return self._macs(self.order)

    @property
    def full_macs(self):
        """Multiply-accumulate operations to project one vector with the full kernel."""
        return self.input_dim * self.output_dim

    @property
    def transposed(self):
        """The factorization of the transposed kernel."""
        return dataclasses.replace(
            self,
            input_dim=self.output_dim,
            output_dim=self.input_dim,
            input_factors=self.output_factors,
            output_factors=self.input_factors,
        )
