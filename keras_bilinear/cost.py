"""Which way to apply a Kronecker kernel is the fastest: a model fitted to measurements."""

import dataclasses
import itertools
import math

from keras import backend

FACTORIZED = ("left", "right")


@dataclasses.dataclass(frozen=True)
class Work:
    """What one way of a convolution does for each output position, in numbers.

    Attributes:
        macs: multiply-accumulate operations of convolutions.
        patches: numbers that the windows of convolutions see; a library that
            turns a convolution into a matrix product copies them.
        outputs: numbers that convolutions put out.
        multiplied: numbers that enter and leave matrix products.
        moved: numbers that are transposed.
        chained: one where two operations follow on each other, else zero.
    """

    macs: float
    patches: float
    outputs: float
    multiplied: float
    moved: float
    chained: float


# Nanoseconds for each number of `Work`, forward pass and training step
# together, on one machine: only their ratios matter. Made by
# `python benchmarks/conv_ways.py`; see benchmarks/results/conv_ways_BACKEND.md.
# The one large convolution of the materialized way has rates of its own.
NANOSECONDS = {
    "tensorflow": (
        Work(0.0307, 2.13, 7.31, 0.001, 2.24, 662.0),
        Work(0.0604, 0.677, 7.62, 0.0, 0.0, 0.0),
    ),
    "jax": (
        Work(0.109, 0.655, 9.35, 1.55, 0.00101, 462.0),
        Work(0.0563, 5.54, 0.001, 0.0, 0.0, 0.0),
    ),
    "torch": (
        Work(0.03, 0.639, 2.62, 3.22, 12.3, 68.5),
        Work(0.0729, 0.186, 16.5, 0.0, 0.0, 0.0),
    ),
}


def work(plan, order, strides):
    """The `Work` of a convolution.

    Args:
        plan: a `Factorization` with windows.
        order: the factor to apply first, `"left"` or `"right"`, or `None` for the
            materialized kernel.
        strides: one number for each axis.
    """
    inputs = math.prod(strides)
    if order is None:
        macs, patches = plan.full_macs, math.prod(plan.window) * plan.groups * plan.input_dim
        return Work(*_strided(macs, patches, inputs), plan.groups * plan.output_dim, 0, 0, 0)
    (d1, d2), (u1, u2), rank = plan.input_factors, plan.output_factors, plan.rank
    left_window, right_window = math.prod(plan.left_window), math.prod(plan.right_window)
    # The axes of the left factor's window; without one, its strides are the right one's.
    windowed = left_window > 1
    own = [size > 1 for size in plan.left_window]
    left_strides = math.prod(itertools.compress(strides, own))
    right_strides = inputs // left_strides
    # What each factor reads for, and puts out at, one position; and at how many.
    if order == "left":
        left_in, left_out, left_macs = d1 * d2, u1 * rank * d2, d1 * d2 * u1 * rank
        right_in, right_out, right_macs = u1 * rank * d2, u1 * u2, u1 * rank * d2 * u2
        at_left, at_right = right_strides, 1
    else:
        right_in, right_out, right_macs = d1 * d2, d1 * rank * u2, d1 * d2 * rank * u2
        left_in, left_out, left_macs = d1 * rank * u2, u1 * u2, d1 * rank * u1 * u2
        at_left, at_right = 1, left_strides
    between = at_left * left_out if order == "left" else at_right * right_out
    macs, patches = _strided(
        at_right * right_macs * right_window, at_right * right_in * right_window, right_strides
    )
    outputs, multiplied = at_right * right_out, at_left * (left_in + left_out)
    if windowed:
        left = _strided(
            at_left * left_macs * left_window, at_left * left_in * left_window, left_strides
        )
        macs, patches = macs + left[0], patches + left[1]
        outputs, multiplied = outputs + at_left * left_out, 0
    # Matrix products of rank 1 take their operands as the convolution leaves them.
    moved = inputs * d1 * d2 + u1 * u2 + (between if windowed or rank > 1 else 0)
    numbers = macs, patches, outputs, multiplied, moved
    return Work(*(plan.groups * number for number in numbers), 1)


def _strided(macs, patches, strides):
    """Numbers of a forward pass and a step: the gradient of the input knows no strides."""
    share = (2 + strides) / 3
    return share * macs, share * patches


def seconds(plan, order, strides, coefficients=None):
    """Predicted time for each output position, in arbitrary units of this backend."""
    factorized, materialized = coefficients or NANOSECONDS[backend.backend()]
    rates = materialized if order is None else factorized
    each = zip(
        dataclasses.astuple(work(plan, order, strides)), dataclasses.astuple(rates), strict=True
    )
    return sum(amount * rate for amount, rate in each)


def choose_order(plan, implementation, strides=()):
    """The order of the factors, or `None` where the kernel is to be materialized.

    A dense projection goes by its MACs, a convolution by the fitted model.

    Args:
        plan: a `Factorization`.
        implementation: `"auto"`, `"factorized"` or `"materialized"`.
        strides: those of a convolution.
    """
    if implementation == "materialized":
        return None
    if math.prod(plan.window) == plan.groups == 1:
        cheaper = implementation == "factorized" or plan.macs <= plan.full_macs
        return plan.order if cheaper else None
    ways = FACTORIZED if implementation == "factorized" else (*FACTORIZED, None)
    return min(ways, key=lambda order: seconds(plan, order, strides))
