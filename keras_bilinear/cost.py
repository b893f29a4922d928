"""Which way to apply a Kronecker kernel is the fastest: a model fitted to measurements."""

import dataclasses
import math

from keras import backend

FACTORIZED = ("left", "right")


@dataclasses.dataclass(frozen=True)
class Work:
    """What one way of a convolution does for each output position, in numbers.

    Attributes:
        convolution_macs: multiply-accumulate operations of convolutions.
        patches: numbers that the windows of the convolutions see; a library
            that turns a convolution into a matrix product copies them.
        matmul_macs: multiply-accumulate operations of matrix products.
        moved: numbers that are transposed.
    """

    convolution_macs: float
    patches: float
    matmul_macs: float
    moved: float


# Nanoseconds for each number of `Work`, of a forward pass and a training step
# together on one machine; only their ratios matter. Made by
# `python benchmarks/conv_ways.py`, see benchmarks/results/conv_ways.md.
NANOSECONDS = {
    "tensorflow": Work(0.08, 1.0, 0.1, 1.0),
    "jax": Work(0.08, 1.0, 0.1, 1.0),
    "torch": Work(0.08, 1.0, 0.1, 1.0),
}


def work(plan, order, strides):
    """The `Work` of a convolution.

    Args:
        plan: a `Factorization` with windows.
        order: the factor to apply first, `"left"` or `"right"`, or `None` for the
            materialized kernel.
        strides: one number for each axis.
    """
    if order is None:
        window = math.prod(plan.window)
        return Work(plan.full_macs, window * plan.groups * plan.input_dim, 0, 0)
    (d1, d2), (u1, u2) = plan.input_factors, plan.output_factors
    groups, rank = plan.groups, plan.rank
    left, right = math.prod(plan.left_window), math.prod(plan.right_window)
    # Both factors' strides are taken as those of the whole: they seldom differ.
    inputs = math.prod(strides)
    if order == "left":
        # A left factor without a window goes over the inputs, strides come after.
        positions = inputs if left == 1 else 1
        left_macs, left_patches = positions * u1 * rank * left * d1 * d2, left * d1 * d2
        right_macs, right_patches = u1 * rank * right * d2 * u2, u1 * rank * right * d2
        between = positions * u1 * rank * d2
    else:
        right_macs, right_patches = d1 * rank * right * d2 * u2, d1 * right * d2
        left_macs, left_patches = rank * left * d1 * u1 * u2, rank * left * d1 * u2
        between = d1 * rank * u2
    windowed = left > 1
    moves_between = windowed or rank > 1
    return Work(
        groups * (right_macs + windowed * left_macs),
        groups * (right_patches + windowed * left_patches),
        groups * (not windowed) * left_macs,
        groups * (inputs * d1 * d2 + moves_between * between + u1 * u2),
    )


def seconds(plan, order, strides, coefficients=None):
    """Predicted time for each output position, in arbitrary units of this backend."""
    coefficients = coefficients or NANOSECONDS[backend.backend()]
    each = zip(
        dataclasses.astuple(work(plan, order, strides)),
        dataclasses.astuple(coefficients),
        strict=True,
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
