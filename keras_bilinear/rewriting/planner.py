"""From a budget to a plan: which layers become bilinear, with what factors and rank."""

import dataclasses
from collections.abc import Iterable, Mapping

import keras
import numpy as np
from scipy import optimize, sparse

from keras_bilinear.kronecker.factorization import (
    check_positive_int,
    exact_factors,
)
from keras_bilinear.kronecker.nearest import input_index
from keras_bilinear.layers.converter import converter_of
from keras_bilinear.rewriting.plan import LayerPlan, RewritePlan
from keras_bilinear.rewriting.prediction import predict_errors
from keras_bilinear.rewriting.sites import (
    Site,
    check_built,
    reason_to_leave,
    tied_variables,
    walk,
)
from keras_bilinear.rewriting.widen import hidden_layers

# How many ranks the search chooses from for each power of 2, as far as they save anything.
# Of kernels of low rank all errors come from one decomposition; of others each takes a fit
# of its own, whose time grows with a power of the rank. So those have at most `MOST_TERMS`
# terms or, where that is more, as many as make a linear system of `MOST_UNKNOWNS`.
LOW_RANKS_PER_OCTAVE, RANKS_PER_OCTAVE = 8, 2
MOST_TERMS, MOST_UNKNOWNS = 64, 2048


def plan_rewrite(
    model: keras.Model,
    budget: float | None = None,
    max_params: int | None = None,
    max_error: float | None = None,
    calibration_data=None,
    rank: int | str = "auto",
    layers: Iterable[str] | Mapping[str, int | None] | None = None,
    scale: int = 1,
    low_rank: bool = True,
) -> RewritePlan:
    """Plans which layers of a model become bilinear, with what factors and of what rank.

    Each layer gets either near-square factors or those with which its kernel is
    one of low rank: two plain layers, one after the other. These and the ranks are
    the ones with the smallest sum of squared predicted errors among all that keep
    the model within the budget: a knapsack, solved by HiGHS. Grouped convolutions
    and layers with a `scale` keep near-square factors.

    Args:
        model: a built model.
        budget: the share of the model's parameters to keep; 0.1 if none of the
            three limits is given.
        max_params: instead, the number of parameters to keep.
        max_error: instead, the largest predicted error of a layer; the plan is
            the smallest that keeps to it.
        calibration_data: inputs of the model, an array, a dictionary of arrays, a
            list with an array for each of several inputs, or an iterable of
            batches, such as a `tf.data.Dataset`; of a tuple of inputs and labels
            only the inputs count. With them, the errors are those of each layer's
            output on them; without, those of its kernels.
        rank: `"auto"`, or the rank of every layer, with near-square factors, where
            that saves anything.
        layers: paths of the layers that may be rewritten, `None` for all; or a
            mapping from the paths of some of them to their rank, with near-square
            factors, or to `None` for leaving them alone.
        scale: what both output factors of each hidden layer are multiplied by:
            the paper's way to win back freedom. The layer has `scale**2` times
            the units, and the network the same outputs at first. Hidden are the
            layers of a Sequential or Functional model whose outputs only layers
            that become bilinear get, by way of layers that do the same to each
            channel; others keep their width.
        low_rank: whether layers may get the factors of kernels of low rank. These
            are often nearest to a trained kernel, and fast to fit. Near-square ones
            can learn more where a network is trained on for long, but have few terms,
            so that alone they may not use up a large budget.

    Returns:
        A `RewritePlan`.

    Raises:
        ValueError: if an argument is not valid, if the model is not built, or if
            no plan keeps to the limit.

    Example:

    >>> hidden = keras.layers.Dense(256, activation="relu", name="hidden")
    >>> model = keras.Sequential([keras.Input((64,)), hidden, keras.layers.Dense(10)])
    >>> plan = plan_rewrite(model, budget=0.25)
    >>> plan.parameters <= 0.25 * model.count_params()
    True
    """
    limit = _limit(budget, max_params, max_error, rank)
    if rank != "auto":
        rank = check_positive_int("rank", rank)
    scale = check_positive_int("scale", scale)
    plan = survey(model)
    pinned = _choose_layers(plan, layers)
    if scale > 1:
        _scale(model, plan, scale, 1 if rank == "auto" else rank)
    free = [layer for layer in plan.values() if layer.factorizations and not layer.reason]
    if rank != "auto":
        for layer in free:
            if layer.path in pinned:
                continue
            if layer.saves(rank):
                layer.rank = rank
            else:
                layer.skip("too small to gain at this rank")
        planned = {p.path: [(p.factors, p.rank)] for p in free if p.rank}
        predict_errors(model, plan, planned, calibration_data)
        return plan
    candidates = _candidates(free, pinned, low_rank)
    _check_reachable(plan, candidates, limit)
    _leave_out_too_large(plan, candidates, limit)
    predict_errors(model, plan, candidates, calibration_data)
    for path, pairs in candidates.items():
        candidates[path] = [choice for choice in pairs if choice in plan[path].errors]
    _search(plan, candidates, pinned, limit)
    return plan


def check_budget(model: keras.Model, budget: float, layers=None, low_rank: bool = True) -> None:
    """Checks, without a look at the weights, that `plan_rewrite` finds a plan.

    Raises:
        ValueError: if not.
    """
    plan = survey(model)
    pinned = _choose_layers(plan, layers)
    free = [layer for layer in plan.values() if layer.factorizations and not layer.reason]
    _check_reachable(plan, _candidates(free, pinned, low_rank), ("budget", budget))


def _candidates(free, pinned, low_rank):
    """`{path: [(factors, rank), ...]}` that the search chooses from."""
    candidates = {}
    for layer in free:
        if layer.path in pinned:
            candidates[layer.path] = [(layer.factors, layer.rank)]
            continue
        candidates[layer.path] = [
            (factors, rank)
            for factors, ranks in _choices(layer, low_rank).items()
            for rank in ranks
            if layer.saves(rank, factors)
        ]
        if not candidates[layer.path]:
            layer.skip("too small to gain")
    return candidates


def _choices(layer, low_rank):
    """`{factors: ranks}` for a layer, whether these save anything or not."""
    first = layer.factorizations[0]
    most = max(MOST_TERMS, MOST_UNKNOWNS // max(input_index(first).shape))
    choices = {layer.factors: [rank for rank in rank_grid(RANKS_PER_OCTAVE) if rank <= most]}
    if low_rank and first.low_rank_factors and not layer.scaled:
        choices[first.low_rank_factors] = rank_grid(LOW_RANKS_PER_OCTAVE)
    return choices


def rank_grid(steps: int) -> list[int]:
    """Ranks in a geometric progression.

    Args:
        steps: how many for each power of 2, as far as they are different integers.
    """
    return sorted({round(2 ** (i / steps)) for i in range(14 * steps)})


def _limit(budget, max_params, max_error, rank):
    """`(name, value)` of the one limit that is given."""
    given = {"budget": budget, "max_params": max_params, "max_error": max_error}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1 or (given and rank != "auto"):
        raise ValueError(
            "At most one of `budget`, `max_params`, `max_error` and a `rank` can be given. "
            f"Received: {', '.join(f'{name}={value!r}' for name, value in given.items())}, "
            f"rank={rank!r}"
        )
    ((name, value),) = given.items() or [("budget", 0.1)]
    try:
        valid = not isinstance(value, bool) and 0 < value < float("inf")
        valid = valid and (name != "budget" or value <= 1)
    except TypeError:
        valid = False
    if not valid:
        rule = "above 0 and at most 1" if name == "budget" else "a positive number"
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}")
    return name, value


def survey(model: keras.Model) -> RewritePlan:
    """The layers of a model, none of them planned to be rewritten yet.

    Raises:
        ValueError: if the model is not built.
    """
    check_built(model)
    tied = tied_variables(model)
    plans = [plan_layer(site, reason_to_leave(site, tied)) for site in walk(model)]
    return RewritePlan(plans, model.count_params() - sum(plan.full_parameters for plan in plans))


def plan_layer(site: Site, reason: str = "") -> LayerPlan:
    """The plan of one layer, not yet to be rewritten.

    Args:
        site: the layer.
        reason: why it cannot be rewritten; empty if it can.
    """
    layer, factorizations = site.layer, []
    if not reason:
        factorizations = [*converter_of(layer).factorizations(layer).values()]
    return LayerPlan(
        path=site.path,
        type=type(layer).__name__,
        full_parameters=layer.count_params() if layer.built else 0,
        factorizations=factorizations,
        reason=reason,
    )


def _choose_layers(plan, layers):
    """Leaves alone what `layers` does not allow; returns the paths whose rank it gives."""
    if layers is None:
        return set()
    if isinstance(layers, str):
        raise ValueError(f"`layers` must be paths or a mapping of them. Received: {layers!r}")
    for path in layers:
        if path not in plan:
            raise ValueError(
                f"`layers` must be among the paths of the model's layers: {', '.join(plan)}. "
                f"Received: {path!r}"
            )
    if not isinstance(layers, Mapping):
        for path, layer in plan.items():
            if path not in set(layers) and not layer.reason:
                layer.skip()
        return set()
    for path, rank in layers.items():
        if rank is None:
            plan[path].skip()
        else:
            plan[path].rank = rank
    return {path for path, rank in layers.items() if rank is not None}


def _scale(model, plan, scale, rank):
    """Scales the hidden layers where that leaves each of them, and those behind, something to save.

    Args:
        model: the model.
        plan: its plan, which is changed.
        scale: what the output factors are multiplied by.
        rank: at which the layers are to save something.
    """
    for name, hidden in hidden_layers(model).items():
        layers = [plan[one] for one in (name, *hidden.consumers) if one in plan]
        if len(layers) <= len(hidden.consumers) or not all(
            one.factorizations and not one.reason for one in layers
        ):
            continue
        factors = exact_factors(layers[0].factorizations[0].output_dim)
        if factors is None:
            continue
        before = [(one, one.factorizations, one.scale, one.input_scale) for one in layers]
        first, *others = layers
        first.scale = scale
        first.factorizations = [
            dataclasses.replace(
                kernel,
                output_factors=factors,
                input_factors=factors if index else kernel.input_factors,
            )
            for index, kernel in enumerate(first.factorizations)
        ]
        for one in others:
            one.input_scale = scale
            kernel, *more = one.factorizations
            kernel = dataclasses.replace(
                kernel, input_factors=(hidden.consumers[one.path] * factors[0], factors[1])
            )
            one.factorizations = [kernel, *more]
        if all(one.saves(rank) for one in layers):
            for follower in hidden.normalizations:
                plan[follower].scale = scale
        else:
            for one, *values in before:
                one.factorizations, one.scale, one.input_scale = values


def _most_parameters(plan, limit):
    name, value = limit
    return {"max_params": value, "budget": value * plan.full_parameters}.get(name, np.inf)


def _least_parameters(plan, candidates):
    """`{path: parameters}` with every layer at its least."""
    return {
        path: min(
            (layer.parameters_at(rank, factors) for factors, rank in candidates.get(path, ())),
            default=layer.parameters,
        )
        for path, layer in plan.items()
    }


def _check_reachable(plan, candidates, limit):
    """Checks that some plan keeps to a limit.

    Raises:
        ValueError: if none does.
    """
    least = plan.other_parameters + sum(_least_parameters(plan, candidates).values())
    if least > _most_parameters(plan, limit):
        raise ValueError(
            f"No plan keeps to the limit: with every rank at its least, the model still has "
            f"{least:,} parameters ({least / plan.full_parameters:.2%}). "
            f"Received: {limit[0]}={limit[1]}"
        )


def _leave_out_too_large(plan, candidates, limit):
    """Leaves out what no plan that keeps to a limit has, whatever becomes of other layers."""
    least = _least_parameters(plan, candidates)
    spare = _most_parameters(plan, limit) - plan.other_parameters - sum(least.values())
    for path, pairs in candidates.items():
        most = least[path] + spare
        candidates[path] = [
            (factors, rank)
            for factors, rank in pairs
            if plan[path].parameters_at(rank, factors) <= most
        ]


def _search(plan, candidates, pinned, limit):
    """Sets factors and ranks: an integer program with one variable for each layer and choice."""
    name, value = limit
    if name == "max_error":
        for path, pairs in candidates.items():
            layer = plan[path]
            if path in pinned or not pairs:
                continue

            def size(choice, layer=layer):
                factors, rank = choice
                return layer.parameters_at(rank, factors)

            good = [choice for choice in pairs if layer.errors[choice] <= value]
            if good:
                _choose(layer, min(good, key=size))
            elif layer.scaled:
                _choose(layer, max(pairs, key=size))
            else:
                layer.skip(f"no rank that saves anything has an error below {value}")
        return
    most = _most_parameters(plan, limit)
    choices = [
        (layer, choice)
        for layer in (plan[path] for path, pairs in candidates.items() if pairs)
        for choice in [
            *candidates[layer.path],
            *([] if layer.path in pinned or layer.scaled else [None]),
        ]
    ]
    if not choices:
        return
    errors = [0.0 if choice is None else layer.errors[choice] ** 2 for layer, choice in choices]
    sizes = [
        layer.parameters_at(None) if choice is None else layer.parameters_at(choice[1], choice[0])
        for layer, choice in choices
    ]
    fixed = plan.parameters - sum({layer.path: layer.parameters for layer, _ in choices}.values())
    order = {
        path: row for row, path in enumerate(dict.fromkeys(layer.path for layer, _ in choices))
    }
    one_each = sparse.csr_array(
        (
            np.ones(len(choices)),
            ([order[layer.path] for layer, _ in choices], range(len(choices))),
        )
    )
    solution = optimize.milp(
        # Among equal errors the smaller plan.
        np.array(errors) + 1e-9 * np.array(sizes) / plan.full_parameters,
        integrality=np.ones(len(choices)),
        bounds=(0, 1),
        options={"presolve": False},  # with it, HiGHS prints where it has nothing to say
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(np.array(sizes, "float64"), ub=most - fixed),
        ],
    )
    for (layer, choice), chosen in zip(choices, solution.x, strict=True):
        if chosen > 0.5 and choice is None:
            layer.skip("kept full: within the budget")
        elif chosen > 0.5:
            _choose(layer, choice)


def _choose(layer, choice):
    factors, layer.rank = choice
    if factors != layer.factors:  # those of a scale cannot be set
        layer.factors = factors
