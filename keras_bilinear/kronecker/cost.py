"""Which way to apply a Kronecker kernel is the fastest: a model fitted to measurements."""

import dataclasses
import math

from keras_bilinear.kronecker.factorization import FACTORIZED, Order
from keras_bilinear.kronecker.target import EXPORTED, convolution_library, on_gpu, runtime


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
        chained: operations that follow on another one.
    """

    macs: float
    patches: float
    outputs: float
    multiplied: float
    moved: float
    chained: int


# Nanoseconds for each number of `Work`, forward pass and training step
# together, on one machine: only their ratios matter. Made by
# `python benchmarks/conv_ways.py`; see benchmarks/results/conv_ways_LIBRARY.md.
# The one large convolution of the materialized way has rates of its own.
NANOSECONDS = {
    "tensorflow": (
        Work(0.03, 1.56, 4.49, 1.42, 1.59, 436.0),
        Work(0.0471, 0.652, 3.8, 0.0, 0.0, 0.0),
    ),
    "onednn": (
        Work(0.03, 0.399, 0.83, 0.136, 2.31, 74.8),
        Work(0.0324, 0.001, 6.45, 0.0, 0.0, 0.0),
    ),
    "jax": (
        Work(0.0513, 0.902, 7.01, 1.39, 0.001, 112.0),
        Work(0.0341, 2.18, 0.001, 0.0, 0.0, 0.0),
    ),
    "torch": (
        Work(0.03, 0.393, 0.83, 2.16, 6.37, 0.001),
        Work(0.043, 0.001, 7.61, 0.0, 0.0, 0.0),
    ),
}


# So many multiplications of a large matrix product take as long as one of the
# small products of a recurrent step: benchmarks/results/speed_recurrent.md.
SMALL_PRODUCT = 2.5

# The operations that factors add to a recurrent step cost as much as so many multiplications,
# as SMALL_PRODUCT counts them: factors that save fewer are slower than the kernel. PyTorch's
# are called from Python, in each step. See benchmarks/results/step_ways_BACKEND.md.
STEP_LEAST_SAVED = {"tensorflow": 1e4, "jax": 1e4, "torch": 2.5e5}

# From so many multiplications of a time step's inputs on, or SMALL_PRODUCT times as many
# with factors, they are in the loop: `benchmarks/loop_ways.py` times both ways.
LOOP_LEAST_MACS = {"tensorflow": 2e6, "jax": 2e6, "torch": 1e7}

# On a GPU factors are faster than the kernel only where that has so many
# multiplications for each position, and they a fraction of them: see
# benchmarks/results/speed_gpu_BACKEND.md. PyTorch launches each operation by
# itself, which takes longer than all but the largest of them.
GPU_LEAST_MACS = {"tensorflow": 4e5, "jax": 4e5, "torch": 4e6}
GPU_SHARE = 1 / 5


@dataclasses.dataclass(frozen=True)
class _Step:
    """One operation of a way: a convolution or, in `multiplies`, a matrix product.

    It has `positions` output positions for each one of the whole convolution;
    for each it reads `inputs` numbers at each place of its window, each of which
    meets `fan_out` others, and puts out `outputs` numbers.
    """

    positions: int
    strides: int
    window: int
    inputs: int
    fan_out: int
    outputs: int
    multiplies: bool = False

    @property
    def macs(self):
        return self.positions * self.window * self.inputs * self.fan_out


def _steps(plan, order, strides):
    whole = math.prod(strides)
    if order is Order.MATERIALIZED:
        out = plan.output_dim
        return (_Step(1, whole, math.prod(plan.window), plan.input_dim, out, out),)
    (d1, d2), (u1, u2), rank = plan.input_factors, plan.output_factors, plan.rank
    windows = math.prod(plan.left_window), math.prod(plan.right_window)
    # Along an axis where the left factor has no window, the right one strides.
    own = math.prod(s for s, size in zip(strides, plan.left_window, strict=True) if size > 1)
    left, right = (own, windows[0]), (whole // own, windows[1])
    product, between = windows[0] == 1, plan.between(order)
    if order is Order.LEFT_FIRST:
        return (
            _Step(right[0], *left, d1 * d2, u1 * rank, between, product),
            _Step(1, *right, between, u2, u1 * u2),
        )
    return (
        _Step(left[0], *right, d1 * d2, rank * u2, between),
        _Step(1, *left, between, u1, u1 * u2, product),
    )


def count_macs(plan, order, strides):
    """Multiply-accumulate operations of a convolution for each output position.

    Exact for padding `"same"`. Without padding, the factor that is applied first
    has some more positions than the whole, which are not counted.

    Args:
        plan: a `Factorization` with windows.
        order: an `Order`.
        strides: one number for each axis.
    """
    if plan.pointwise:
        return plan.full_macs if order is Order.MATERIALIZED else plan.macs
    return plan.blocks * sum(step.macs for step in _steps(plan, order, strides))


def count_between(plan, order, strides):
    """Numbers between both factors of a convolution for each output position.

    Arguments as of `count_macs`, but for a materialized kernel, which has none.
    """
    first = 1 if plan.pointwise else _steps(plan, order, strides)[0].positions
    return plan.blocks * first * plan.between(order)


def work(plan, order, strides):
    """The `Work` of a convolution; arguments as of `count_macs`."""
    steps = _steps(plan, order, strides)
    macs = patches = outputs = multiplied = 0
    for step in steps:
        if step.multiplies:
            multiplied += step.positions * (step.inputs + step.outputs)
            continue
        # Of the three passes of a step the gradient of the inputs knows no strides.
        passes = (2 + step.strides) / 3
        macs += passes * step.macs
        patches += passes * step.positions * step.window * step.inputs
        outputs += step.positions * step.outputs
    moved = 0
    # Those of a kernel of low rank lie in memory as both factors take them.
    if order is not Order.MATERIALIZED and not plan.is_low_rank:
        first, last = steps
        moved = math.prod(strides) * first.inputs + last.outputs
        # A matrix product of rank 1 takes its operand as the convolution leaves it.
        if plan.rank > 1 or not (first.multiplies or last.multiplies):
            moved += first.positions * first.outputs
    numbers = macs, patches, outputs, multiplied, moved
    return Work(*(plan.blocks * number for number in numbers), chained=len(steps) - 1)


def seconds(plan, order, strides, coefficients=None):
    """Predicted time for each output position, in arbitrary units of this library."""
    factorized, materialized = coefficients or NANOSECONDS[convolution_library()]
    rates = materialized if order is Order.MATERIALIZED else factorized
    each = zip(
        dataclasses.astuple(work(plan, order, strides)), dataclasses.astuple(rates), strict=True
    )
    return sum(amount * rate for amount, rate in each)


def choose_order(plan, implementation, strides=()):
    """The `Order` in which a kernel is applied to inputs the fastest.

    A dense projection goes by its MACs, and so do the gates of a recurrent layer,
    whose small products, but for those of low rank, count `SMALL_PRODUCT` times, and
    which have to save `STEP_LEAST_SAVED`; a convolution goes by the fitted model. On
    a GPU all kernels are materialized but the largest ones, and those of recurrent
    layers always.

    An exported file would hold a formed kernel in its full size, so there the
    factors are taken wherever they are the smaller, in the order with fewer MACs.
    Of two with as many the right one comes first: as it does not sum over the
    terms, it makes more channels at once, which fill the machine's vectors.

    Args:
        plan: a `Factorization`.
        implementation: `"auto"`, `"factorized"` or `"materialized"`.
        strides: those of a convolution.
    """
    if runtime() == EXPORTED:
        if plan.parameters >= plan.full_parameters:
            return Order.MATERIALIZED
        if plan.pointwise:
            return plan.order
        return min(reversed(FACTORIZED), key=lambda order: count_macs(plan, order, strides))
    if implementation == "materialized":
        return Order.MATERIALIZED
    if implementation == "auto" and on_gpu() and not _pays_on_gpu(plan, strides):
        return Order.MATERIALIZED
    if plan.pointwise:
        least = 0 if plan.share_right else STEP_LEAST_SAVED[runtime()]
        pays = implementation == "factorized" or saved_macs(plan) >= least
        return plan.order if pays else Order.MATERIALIZED
    ways = FACTORIZED if implementation == "factorized" else Order
    return min(ways, key=lambda order: seconds(plan, order, strides))


def saved_macs(plan):
    """Multiplications that factors save for each position, as `STEP_LEAST_SAVED` counts them."""
    return plan.full_macs - plan.macs * _weight_of_small_products(plan)


def pays_in_steps(plan, order, batch_size):
    """Whether the inputs of a recurrent layer are projected faster in its loop than before it.

    They are where a time step has many, on a CPU. A file is for single examples.

    Args:
        plan: the `Factorization` of its input kernel.
        order: an `Order`.
        batch_size: `None` where it is not known.
    """
    if runtime() == EXPORTED or on_gpu():
        return False
    return step_macs(plan, order, batch_size) >= LOOP_LEAST_MACS[runtime()]


def step_macs(plan, order, batch_size):
    """Multiplications of the inputs of one time step, as `LOOP_LEAST_MACS` counts them."""
    macs = (
        plan.full_macs
        if order is Order.MATERIALIZED
        else plan.macs / _weight_of_small_products(plan)
    )
    return (batch_size or 32) * macs


def _weight_of_small_products(plan):
    return 1 if plan.share_right or plan.is_low_rank else SMALL_PRODUCT


def _pays_on_gpu(plan, strides):
    """Whether a GPU is faster with the factors of this kernel than with the kernel."""
    if not plan.share_right:  # the gates of a recurrent layer
        return False
    full = count_macs(plan, Order.MATERIALIZED, strides)
    factorized = min(count_macs(plan, order, strides) for order in FACTORIZED)
    return full >= GPU_LEAST_MACS[runtime()] and factorized <= GPU_SHARE * full
