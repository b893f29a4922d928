"""Which way to apply a Kronecker kernel is the fastest: a model fitted to measurements.

`choose_order` decides for a kernel; `pays_in_steps` decides where a recurrent layer projects its
inputs. `count_macs`, `count_between`, `work` and `seconds` say what a convolution costs.
"""

import dataclasses
import math
from collections.abc import Sequence

from keras_bilinear.kronecker.factorization import FACTORIZED, Factorization, Order
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
        chained: operations that wait for another operation.
    """

    macs: float
    patches: float
    outputs: float
    multiplied: float
    moved: float
    chained: float


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
# as SMALL_PRODUCT counts them: factors that save fewer are slower than the kernel. PyTorch
# calls its operations from Python, in each step. See benchmarks/results/step_ways_BACKEND.md.
STEP_LEAST_SAVED = {"tensorflow": 1e4, "jax": 1e4, "torch": 2.5e5}

# From so many multiplications of a time step's inputs on, or SMALL_PRODUCT times as many
# with factors, the loop projects them: `benchmarks/loop_ways.py` times both ways.
LOOP_LEAST_MACS = {"tensorflow": 2e6, "jax": 2e6, "torch": 1e7}

# On a GPU factors are faster than the kernel only where the kernel has at least so many
# multiplications for each position, and the factors at most a share of them: see
# benchmarks/results/speed_gpu_BACKEND.md. PyTorch launches each operation by itself, which
# takes longer than all but the largest operations.
GPU_LEAST_MACS = {"tensorflow": 4e5, "jax": 4e5, "torch": 4e6}
GPU_SHARE = 1 / 5

# The order of the factors in a transposed convolution, from the order in its adjoint.
_ADJOINT = {
    Order.LEFT_FIRST: Order.RIGHT_FIRST,
    Order.RIGHT_FIRST: Order.LEFT_FIRST,
    Order.MATERIALIZED: Order.MATERIALIZED,
}


@dataclasses.dataclass(frozen=True)
class _Step:
    """One operation of a way: a convolution or, in `multiplies`, a matrix product.

    It has `positions` output positions for each output position of the whole
    convolution. For each it reads `inputs` numbers at each place of its window, each of
    which meets `fan_out` numbers of the factor, and puts out `outputs` numbers.
    """

    positions: int
    strides: int
    window: int
    inputs: int
    fan_out: int
    outputs: int
    multiplies: bool = False

    @property
    def macs(self) -> int:
        return self.positions * self.window * self.inputs * self.fan_out


def _steps(
    factorization: Factorization, order: Order, strides: Sequence[int]
) -> tuple[_Step] | tuple[_Step, _Step]:
    whole = math.prod(strides)
    if order is Order.MATERIALIZED:
        out = factorization.output_dim
        return (
            _Step(1, whole, math.prod(factorization.window), factorization.input_dim, out, out),
        )
    (d1, d2), (u1, u2), rank = (
        factorization.input_factors,
        factorization.output_factors,
        factorization.rank,
    )
    windows = math.prod(factorization.left_window), math.prod(factorization.right_window)
    # Along an axis where the left factor has no window, the right factor strides.
    own = math.prod(
        s for s, size in zip(strides, factorization.left_window, strict=True) if size > 1
    )
    left, right = (own, windows[0]), (whole // own, windows[1])
    product, between = windows[0] == 1, factorization.between(order)
    if order is Order.LEFT_FIRST:
        return (
            _Step(right[0], *left, d1 * d2, u1 * rank, between, product),
            _Step(1, *right, between, u2, u1 * u2),
        )
    return (
        _Step(left[0], *right, d1 * d2, rank * u2, between),
        _Step(1, *left, between, u1, u1 * u2, product),
    )


def count_macs(factorization: Factorization, order: Order, strides: Sequence[int]) -> int:
    """Multiply-accumulate operations of a convolution for each output position.

    The count is exact for padding `"same"`. Without padding, the factor that is applied
    first has some more positions than the whole convolution, which are not counted.

    Args:
        factorization: the shapes of the kernel.
        order: an `Order`.
        strides: one number for each spatial axis.
    """
    if factorization.pointwise:
        return factorization.full_macs if order is Order.MATERIALIZED else factorization.macs
    return factorization.blocks * sum(step.macs for step in _steps(factorization, order, strides))


def count_between(factorization: Factorization, order: Order, strides: Sequence[int]) -> int:
    """Numbers between both factors of a convolution for each output position.

    The arguments are those of `count_macs`; `order` is not `MATERIALIZED`.
    """
    first = 1 if factorization.pointwise else _steps(factorization, order, strides)[0].positions
    return factorization.blocks * first * factorization.between(order)


def count_transposed_macs(
    factorization: Factorization, order: Order, strides: Sequence[int]
) -> int:
    """Multiply-accumulate operations of a transposed convolution for each input position.

    A transposed convolution is the adjoint of a convolution from its outputs to its inputs,
    which has as many. The factors come the other way round there.

    Args:
        factorization: the shapes of the kernel, with the inputs of the transposed convolution.
        order: an `Order`.
        strides: one number for each spatial axis.
    """
    return count_macs(factorization.transposed, _ADJOINT[order], strides)


def count_transposed_between(
    factorization: Factorization, order: Order, strides: Sequence[int]
) -> int:
    """Numbers between both factors of a transposed convolution for each input position.

    The arguments are those of `count_transposed_macs`; `order` is not `MATERIALIZED`.
    """
    return count_between(factorization.transposed, _ADJOINT[order], strides)


def choose_transposed_order(
    factorization: Factorization, implementation: str, strides: Sequence[int] = ()
) -> Order:
    """The `Order` in which a transposed convolution applies a kernel the fastest.

    A training step makes the same three passes through it and through its adjoint, so the
    model that is fitted to convolutions holds for it. The arguments are those of
    `choose_order`.
    """
    return _ADJOINT[choose_order(factorization.transposed, implementation, strides)]


def work(factorization: Factorization, order: Order, strides: Sequence[int]) -> Work:
    """The `Work` of a convolution; the arguments are those of `count_macs`."""
    steps = _steps(factorization, order, strides)
    macs = patches = outputs = multiplied = 0
    for step in steps:
        if step.multiplies:
            multiplied += step.positions * (step.inputs + step.outputs)
            continue
        # Of the three passes of a training step, the gradient of the inputs has no strides.
        passes = (2 + step.strides) / 3
        macs += passes * step.macs
        patches += passes * step.positions * step.window * step.inputs
        outputs += step.positions * step.outputs
    moved = 0
    # With factors of low rank, numbers lie in memory as both factors take them.
    if len(steps) == 2 and not factorization.is_low_rank:
        first, last = steps
        moved = math.prod(strides) * first.inputs + last.outputs
        # A matrix product of rank 1 takes its operand as the convolution leaves it.
        if factorization.rank > 1 or not (first.multiplies or last.multiplies):
            moved += first.positions * first.outputs
    numbers = macs, patches, outputs, multiplied, moved
    return Work(*(factorization.blocks * number for number in numbers), chained=len(steps) - 1)


def seconds(
    factorization: Factorization,
    order: Order,
    strides: Sequence[int],
    coefficients: tuple[Work, Work] | None = None,
) -> float:
    """Predicted time of a convolution for each output position.

    Args:
        factorization: the shapes of the kernel.
        order: an `Order`.
        strides: one number for each spatial axis.
        coefficients: the rates of the factorized and of the materialized ways; `None` for
            `NANOSECONDS` of the library that computes convolutions here.

    Returns:
        A time in arbitrary units, which only compare within one library.
    """
    factorized, materialized = coefficients or NANOSECONDS[convolution_library()]
    rates = materialized if order is Order.MATERIALIZED else factorized
    each = zip(
        dataclasses.astuple(work(factorization, order, strides)),
        dataclasses.astuple(rates),
        strict=True,
    )
    return sum(amount * rate for amount, rate in each)


def choose_order(
    factorization: Factorization, implementation: str, strides: Sequence[int] = ()
) -> Order:
    """The `Order` in which a kernel is applied to inputs the fastest.

    - A dense projection takes the way with the fewest multiplications.
    - So do the gates of a recurrent layer. There multiplications in small products count
      `SMALL_PRODUCT` times, except for factors of low rank, and factors have to save
      `STEP_LEAST_SAVED` of them.
    - A convolution takes the way that the fitted model predicts to be the fastest.
    - On a GPU only the largest kernels are factorized, and recurrent kernels never.
    - An exported file would hold a materialized kernel in its full size. So its layers apply
      the factors wherever they have fewer numbers than the kernel, in the order with fewer
      multiplications. If both orders have as many, the right factor comes first: as it
      does not sum over the terms, it makes more channels at once, which fill the machine's
      vectors.

    Args:
        factorization: the shapes of the kernel.
        implementation: `"auto"` chooses; `"factorized"` and `"materialized"` restrict the
            choice, except in an exported file.
        strides: strides of a convolution along each spatial axis.
    """
    if runtime() == EXPORTED:
        if factorization.parameters >= factorization.full_parameters:
            return Order.MATERIALIZED
        if factorization.pointwise:
            return factorization.order
        return min(
            reversed(FACTORIZED), key=lambda order: count_macs(factorization, order, strides)
        )
    if implementation == "materialized":
        return Order.MATERIALIZED
    if implementation == "auto" and on_gpu() and not _pays_on_gpu(factorization, strides):
        return Order.MATERIALIZED
    if factorization.pointwise:
        least = 0 if factorization.share_right else STEP_LEAST_SAVED[runtime()]
        pays = implementation == "factorized" or saved_macs(factorization) >= least
        return factorization.order if pays else Order.MATERIALIZED
    ways = FACTORIZED if implementation == "factorized" else Order
    return min(ways, key=lambda order: seconds(factorization, order, strides))


def saved_macs(factorization: Factorization) -> float:
    """Multiplications that factors save for each position, as `STEP_LEAST_SAVED` counts them."""
    return factorization.full_macs - factorization.macs * _weight_of_small_products(factorization)


def pays_in_steps(factorization: Factorization, order: Order, batch_size: int | None) -> bool:
    """Whether a recurrent layer projects its inputs faster in its loop than before the loop.

    It does on a CPU, if a time step has at least `LOOP_LEAST_MACS` multiplications. An
    exported file is for single examples, whose time steps have fewer.

    Args:
        factorization: the shapes of the input kernel.
        order: the `Order` in which the layer applies the kernel.
        batch_size: number of examples; `None` if unknown.
    """
    if runtime() == EXPORTED or on_gpu():
        return False
    return step_macs(factorization, order, batch_size) >= LOOP_LEAST_MACS[runtime()]


def step_macs(factorization: Factorization, order: Order, batch_size: int | None) -> float:
    """Multiplications of the inputs of one time step, as `LOOP_LEAST_MACS` counts them.

    The arguments are those of `pays_in_steps`.
    """
    macs = (
        factorization.full_macs
        if order is Order.MATERIALIZED
        else factorization.macs / _weight_of_small_products(factorization)
    )
    return (batch_size or 32) * macs


def _weight_of_small_products(factorization):
    return 1 if factorization.share_right or factorization.is_low_rank else SMALL_PRODUCT


def _pays_on_gpu(factorization, strides):
    """Whether a GPU is faster with the factors of this kernel than with the kernel."""
    if not factorization.share_right:  # the gates of a recurrent layer
        return False
    full = count_macs(factorization, Order.MATERIALIZED, strides)
    factorized = min(count_macs(factorization, order, strides) for order in FACTORIZED)
    return full >= GPU_LEAST_MACS[runtime()] and factorized <= GPU_SHARE * full
