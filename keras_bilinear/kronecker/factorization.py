"""The shapes of a bilinear projection, in integers, before any tensor exists.

`Factorization` has the shapes of one kernel and what follows from them: numbers stored,
multiplications, ranks. `choose_factors` and `choose_aligned_factors` choose its factors, and
`check_factors` checks those that a user gives. `Order` names the ways to apply it.
"""

import dataclasses
import enum
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, Self


class Order(enum.Enum):
    """How a Kronecker sum is applied to inputs."""

    LEFT_FIRST = "left"
    """The left factor first, then the right factor."""
    RIGHT_FIRST = "right"
    """The right factor first, then the left factor."""
    MATERIALIZED = "materialized"
    """The kernel itself, which is formed first, in the operation of the full layer."""


FACTORIZED = (Order.LEFT_FIRST, Order.RIGHT_FIRST)


# A split that stores the size exactly needs no padding, so it is worth up to
# this much more than the smallest sum of two factors.
_EXACT_SPLIT_BONUS = 1.25


def check_positive_int(name: str, value: Any) -> int:
    """Returns `value` as an `int`; refuses everything but integers above zero.

    Args:
        name: argument name for the error text.
        value: an integer of any type.

    Raises:
        ValueError: if `value` is a bool, not an integer, zero or negative.
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


def check_factors(name: str, value: Any, size: int | None = None) -> tuple[int, int] | None:
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


def choose_factors(size: int) -> tuple[int, int]:
    """Splits `size` into two near-square factors `a <= b` with `a * b >= size`.

    An exact split is taken where it is nearly as square as the best padded split. So a
    prime is padded and never becomes `1 x size`.

    Raises:
        ValueError: if `size` is not a positive integer.

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
    # The sum of the factors grows as they move away from the root, so no factor
    # below `root / 2` can win against the near-square split, exact or not.
    # Only 1 and 2 have no split but `1 x size`.
    smallest = max(1 if size <= 2 else 2, root // 2)
    candidates = ((a, -(-size // a)) for a in range(smallest, root + 2))
    return min((c for c in candidates if c[0] <= c[1]), key=cost)


def choose_aligned_factors(
    input_dim: int, output_dim: int, left_window: tuple[int, ...], right_window: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Splits the channels of a convolution, both sides together.

    Which side the window belongs to decides how many distinct filters a term can hold, so
    the order of the factors matters. Where a kernel of rank 1 maps 3 channels `(1, 3)` to 32
    filters `(4, 8)` by 3x3 windows on the right, only 8 of the filters are linearly
    independent; from `(3, 1)` it is 24. Among the near-square splits, the function takes
    the pair whose kernel can have the highest matrix rank, then the most square pair,
    then the cheapest to compute.

    Args:
        input_dim: channels of one group.
        output_dim: filters of one group.
        left_window: window of the left factor along each spatial axis.
        right_window: window of the right factor, likewise.

    Returns:
        `(input_factors, output_factors)`.

    >>> choose_aligned_factors(3, 32, (1, 1), (3, 3))
    ((3, 1), (4, 8))
    >>> choose_aligned_factors(128, 128, (1, 1), (3, 3))
    ((16, 8), (8, 16))
    """

    def cost(pair):
        inputs, outputs = pair
        factorization = Factorization(
            input_dim,
            output_dim,
            inputs,
            outputs,
            left_window=left_window,
            right_window=right_window,
        )
        return -factorization.attainable_rank, sum(inputs) + sum(outputs), factorization.macs

    return min(itertools.product(_splits(input_dim), _splits(output_dim)), key=cost)


def recurrent_input_factors(
    size: int, output_factors: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The input factors of a recurrent kernel, whose inputs are the outputs of its layer.

    They are the output factors, reversed when one factor is 1 (low rank).

    Args:
        size: units of the layer.
        output_factors: `(u1, u2)`; `None` for factors that are chosen.

    >>> recurrent_input_factors(64, (8, 8)), recurrent_input_factors(64, (1, 64))
    ((8, 8), (64, 1))
    """
    if output_factors is None or output_factors == choose_factors(size):
        return output_factors
    first, second = output_factors
    return (second, first) if 1 in output_factors else (first, second)


def exact_factors(size: int) -> tuple[int, int] | None:
    """The most square split of `size` that needs no padding; `None` for a prime.

    >>> exact_factors(128), exact_factors(10), exact_factors(13)
    ((8, 16), (2, 5), None)
    """
    a = max(a for a in range(1, math.isqrt(size) + 1) if size % a == 0)
    return None if a == 1 else (a, size // a)


def _splits(size):
    """The splits of `size` that are about as square as the best split, each in both orders."""
    best = choose_factors(size)
    exact = [(a, size // a) for a in range(1, math.isqrt(size) + 1) if size % a == 0]
    square = [split for split in exact if sum(split) <= _EXACT_SPLIT_BONUS * sum(best)]
    return sorted({pair for a, b in [*square, best] for pair in ((a, b), (b, a))})


@dataclasses.dataclass(frozen=True)
class Factorization:
    """The shapes of `Y = sum_r L_r^T X R_r`, and all that follows from them.

    In a convolution each factor is a convolution too, with a window of its own;
    along each axis at least one of both windows has the size 1. Without windows, it
    is a dense projection.

    A kernel may hold several blocks, matrices that lie side by side. The groups of a
    convolution share the right factor, and their left factors lie side by side in one
    tensor. The gates of a recurrent cell have both factors of their own, stacked along a
    leading axis, which is there for a single gate too.

    Attributes:
        input_dim: true input width, `D_in`; the channels of one block.
        output_dim: true output width, `D_out`; the filters of one block.
        input_factors: `(d1, d2)` with `d1 * d2 >= D_in`.
        output_factors: `(u1, u2)` with `u1 * u2 >= D_out`.
        rank: number of Kronecker terms.
        left_window: window of the left factor along each spatial axis.
        right_window: window of the right factor, likewise.
        blocks: number of matrices side by side: groups of a convolution, gates of a cell.
        share_right: whether the blocks share the right factor, as groups do and gates do not.
    """

    input_dim: int
    output_dim: int
    input_factors: tuple[int, int]
    output_factors: tuple[int, int]
    rank: int = 1
    left_window: tuple[int, ...] = ()
    right_window: tuple[int, ...] = ()
    blocks: int = 1
    share_right: bool = True

    @classmethod
    def create(
        cls,
        *,
        input_dim: int,
        output_dim: int,
        input_factors: Sequence[int] | None = None,
        output_factors: Sequence[int] | None = None,
        rank: int = 1,
        left_window: tuple[int, ...] = (),
        right_window: tuple[int, ...] = (),
        blocks: int = 1,
        share_right: bool = True,
    ) -> Self:
        """Checks the arguments and chooses the factors that are `None`.

        The arguments are the attributes of the class.

        Raises:
            ValueError: if a size, a rank or a pair of factors is not valid.
        """
        input_dim = check_positive_int("input_dim", input_dim)
        output_dim = check_positive_int("output_dim", output_dim)
        if math.prod((*left_window, *right_window)) > 1:
            chosen = choose_aligned_factors(input_dim, output_dim, left_window, right_window)
        else:
            chosen = choose_factors(input_dim), choose_factors(output_dim)
        return cls(
            input_dim=input_dim,
            output_dim=output_dim,
            input_factors=check_factors("input_factors", input_factors, input_dim) or chosen[0],
            output_factors=check_factors("output_factors", output_factors, output_dim) or chosen[1],
            rank=check_positive_int("rank", rank),
            left_window=left_window,
            right_window=right_window,
            blocks=blocks,
            share_right=share_right,
        )

    @property
    def left_shape(self) -> tuple[int, ...]:
        """The shape of the left factors: `(rank, *left_window, d1, u1)` for one block."""
        d1, u1 = self.input_factors[0], self.output_factors[0]
        side_by_side = self.blocks if self.share_right else 1
        return (*self._stacked, self.rank, *self.left_window, d1, side_by_side * u1)

    @property
    def right_shape(self) -> tuple[int, ...]:
        """The shape of the right factors: `(rank, *right_window, d2, u2)` for one block."""
        d2, u2 = self.input_factors[1], self.output_factors[1]
        return (*self._stacked, self.rank, *self.right_window, d2, u2)

    @property
    def _stacked(self) -> tuple[int, ...]:
        """The leading axis of the factors where each block has both factors of its own."""
        return () if self.share_right else (self.blocks,)

    @property
    def block(self) -> Self:
        """The factorization of a single block."""
        return dataclasses.replace(self, blocks=1, share_right=True)

    @property
    def coupled(self) -> Self:
        """The factorization of the blocks that are solved for together.

        It is that of all blocks if they share the right factor, else that of a single block.
        """
        return self if self.share_right else self.block

    def couple(self, blocks: list) -> list[list]:
        """Splits a list with an item for each block into lists that are solved for together."""
        return [blocks] if self.share_right else [[block] for block in blocks]

    @property
    def window(self) -> tuple[int, ...]:
        """The window of the kernel along each spatial axis, `()` for a dense projection."""
        return tuple(map(math.prod, zip(self.left_window, self.right_window, strict=True)))

    @property
    def pointwise(self) -> bool:
        """Whether the kernel is a dense projection, of vectors or of each position."""
        return math.prod(self.window) == 1 and (self.blocks == 1 or not self.share_right)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape of the full kernel."""
        return (*self.window, self.input_dim, self.blocks * self.output_dim)

    @property
    def padded_input_dim(self) -> int:
        """Inputs of one block that the factors hold, `d1 * d2`."""
        return math.prod(self.input_factors)

    @property
    def padded_output_dim(self) -> int:
        """Outputs of one block that the factors hold, `u1 * u2`."""
        return math.prod(self.output_factors)

    @property
    def parameters(self) -> int:
        """Numbers stored in both factors."""
        return math.prod(self.left_shape) + math.prod(self.right_shape)

    @property
    def full_parameters(self) -> int:
        """Numbers stored in the full kernel."""
        return math.prod(self.full_shape)

    @property
    def low_rank_factors(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """`(input_factors, output_factors)` with which each term has the matrix rank 1.

        One factor then takes all inputs within their window to one number for each term,
        and the other factor takes these numbers to all outputs: two plain layers,
        one after the other. `None` for groups, and where both factors have a window.

        >>> Factorization.create(input_dim=784, output_dim=1024).low_rank_factors
        ((784, 1), (1, 1024))
        >>> windows = {"left_window": (1, 1), "right_window": (3, 3)}
        >>> Factorization.create(input_dim=64, output_dim=128, **windows).low_rank_factors
        ((1, 64), (128, 1))
        """
        grouped = self.share_right and self.blocks > 1
        if grouped or math.prod(self.left_window) > 1:
            return None
        if self.pointwise:
            return (self.input_dim, 1), (1, self.output_dim)
        return (1, self.input_dim), (self.output_dim, 1)

    @property
    def is_low_rank(self) -> bool:
        """Whether the factors are `low_rank_factors`; if pointwise, also with sides swapped."""
        factors = self.low_rank_factors
        own = self.input_factors, self.output_factors
        swapped = self.input_factors[::-1], self.output_factors[::-1]
        return factors is not None and (own == factors or (self.pointwise and swapped == factors))

    @property
    def attainable_rank(self) -> int:
        """The highest matrix rank of one block of the materialized kernel.

        Where sizes are padded, the true rank may be a little lower.
        """
        (d1, d2), (u1, u2) = self.input_factors, self.output_factors
        left = min(math.prod(self.left_window) * d1, u1)
        right = min(math.prod(self.right_window) * d2, u2)
        full = min(math.prod(self.window) * self.input_dim, self.output_dim)
        return min(self.rank * left * right, full)

    @property
    def sufficient_rank(self) -> int:
        """The rank at which every full kernel is stored exactly."""
        return min(
            math.prod(shape[1:]) for shape in (self.coupled.left_shape, self.coupled.right_shape)
        )

    def _macs(self, order: Order) -> int:
        (d1, d2), (u1, u2) = self.input_factors, self.output_factors
        left, right = math.prod(self.left_window) * d1, math.prod(self.right_window) * d2
        left_first, right_first = u1 * (d2 * left + u2 * right), u2 * (d1 * right + u1 * left)
        return self.blocks * self.rank * (left_first if order is Order.LEFT_FIRST else right_first)

    def between(self, order: Order) -> int:
        """Numbers between both factors, for one vector or position and one block.

        Args:
            order: an `Order`, not `MATERIALIZED`.
        """
        (d1, d2), (u1, u2) = self.input_factors, self.output_factors
        return self.rank * (u1 * d2 if order is Order.LEFT_FIRST else d1 * u2)

    @property
    def order(self) -> Order:
        """The order of the two factors that takes fewer MACs."""
        left_first, right_first = map(self._macs, FACTORIZED)
        return Order.LEFT_FIRST if left_first <= right_first else Order.RIGHT_FIRST

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for one vector, or one position, factorized."""
        return self._macs(self.order)

    @property
    def full_macs(self) -> int:
        """Multiply-accumulate operations for one vector, or position, with the full kernel."""
        return self.full_parameters

    def scaled(self, input_scale: int, output_scale: int) -> Self:
        """The factorization with wider inputs and outputs.

        Args:
            input_scale: number that multiplies both input factors.
            output_scale: number that multiplies both output factors.
        """
        (d1, d2), (u1, u2) = self.input_factors, self.output_factors
        return dataclasses.replace(
            self,
            input_dim=input_scale**2 * self.input_dim,
            output_dim=output_scale**2 * self.output_dim,
            input_factors=(input_scale * d1, input_scale * d2),
            output_factors=(output_scale * u1, output_scale * u2),
        )

    @property
    def transposed(self) -> Self:
        """The factorization of the transposed kernel, with the same windows.

        It is the kernel of the adjoint: a dense projection, or a convolution, from the outputs
        to the inputs.
        """
        return dataclasses.replace(
            self,
            input_dim=self.output_dim,
            output_dim=self.input_dim,
            input_factors=self.output_factors,
            output_factors=self.input_factors,
        )
