"""What each layer of a plan becomes: the search through factors and ranks.

The candidates are `{path: [(factors, rank), ...]}`. A layer may also stay full, unless its
rank is given (the layer is *pinned*) or its width is another than in the full model.
"""

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np
from scipy import optimize, sparse

from keras_bilinear.rewriting.limits import Limits
from keras_bilinear.rewriting.plan import Candidates, Choice, LayerPlan, RewritePlan

# The sum of squared errors of a plan is at most this share above the smallest. To prove which
# of many equally good plans is the best takes half an hour for many layers of one shape, as
# Xception has them; to come this near takes a fifth of a second.
_GAP = 1e-3


def check_reachable(plan: RewritePlan, candidates: Candidates, limits: Limits) -> None:
    """Checks that some plan keeps to a limit.

    Raises:
        ValueError: if no plan does.
    """
    least = plan.other_parameters + sum(_least_parameters(plan, candidates).values())
    if least > limits.most_parameters(plan.full_parameters):
        raise ValueError(
            f"No plan keeps to the limit: with every rank at its least, the model still has "
            f"{least:,} parameters ({least / plan.full_parameters:.2%}). Received: {limits}"
        )


def without_too_large(plan: RewritePlan, candidates: Candidates, limits: Limits) -> Candidates:
    """The candidates that keep to a limit where all other layers have their least parameters."""
    least = _least_parameters(plan, candidates)
    most = limits.most_parameters(plan.full_parameters)
    spare = most - plan.other_parameters - sum(least.values())
    return {
        path: [
            (factors, rank)
            for factors, rank in choices
            if plan[path].parameters_at(rank, factors) <= least[path] + spare
        ]
        for path, choices in candidates.items()
    }


def _least_parameters(plan, candidates):
    """`{path: parameters}` with every layer at its least."""
    return {
        path: min(
            (layer.parameters_at(rank, factors) for factors, rank in candidates.get(path, ())),
            default=layer.parameters,
        )
        for path, layer in plan.items()
    }


def search(
    plan: RewritePlan, candidates: Candidates, pinned: Collection[str], limits: Limits
) -> None:
    """Sets the factors and the rank of each layer that has candidates.

    Args:
        plan: the plan, which is changed. Its layers have the predicted error of each candidate.
        candidates: what each layer may become.
        pinned: paths of the layers whose rank is given.
        limits: the limit that the plan keeps to.
    """
    candidates = {path: choices for path, choices in candidates.items() if choices}
    if limits.max_error is not None:
        _smallest_below(limits.max_error, plan, candidates, pinned)
    else:
        most = limits.most_parameters(plan.full_parameters)
        _best_within(most, plan, candidates, pinned)


def _smallest_below(max_error, plan, candidates, pinned):
    """Gives each layer the smallest candidate whose error is at most `max_error`."""
    for path, choices in candidates.items():
        if path in pinned:
            continue
        layer = plan[path]
        sizes = {(factors, rank): layer.parameters_at(rank, factors) for factors, rank in choices}
        good = [choice for choice in choices if layer.errors[choice] <= max_error]
        if good:
            _choose(layer, min(good, key=sizes.__getitem__))
        elif layer.scaled:
            _choose(layer, max(choices, key=sizes.__getitem__))
        else:
            layer.skip(f"no rank that saves anything has an error below {max_error}")


def _choose(layer, choice):
    factors, layer.rank = choice
    if factors != layer.factors:  # the factors of a scaled layer cannot be set
        layer.factors = factors


@dataclasses.dataclass(frozen=True)
class _Item:
    """An item of the knapsack: a layer, and what it may become.

    Attributes:
        layer: the plan of the layer.
        choice: factors and rank; `None` for the full layer.
    """

    layer: LayerPlan
    choice: Choice | None

    @property
    def cost(self):
        """The predicted rise of the loss or, where it is not known, the squared error."""
        if self.choice is None:
            return 0.0
        if self.layer.losses:
            return self.layer.losses[self.choice]
        return self.layer.errors[self.choice] ** 2

    @property
    def size(self):
        factors, rank = (None, None) if self.choice is None else self.choice
        return self.layer.parameters_at(rank, factors)


def _best_within(most, plan, candidates, pinned):
    """Gives each layer what makes the sum of squared errors smallest: a knapsack.

    Args:
        most: the number of parameters that the plan may have.
        plan, candidates, pinned: see `search`.
    """
    items = _items(plan, candidates, pinned)
    if not items:
        return
    fixed = plan.parameters - sum(plan[path].parameters for path in candidates)
    for item in _solve(items, most - fixed, plan.full_parameters):
        if item.choice is None:
            item.layer.skip("kept full: within the budget")
        else:
            _choose(item.layer, item.choice)


def _items(plan: RewritePlan, candidates: Mapping, pinned: Collection[str]) -> list[_Item]:
    """The items of the knapsack, layer by layer."""
    items = []
    for path, choices in candidates.items():
        layer = plan[path]
        items += [_Item(layer, choice) for choice in choices]
        if path not in pinned and not layer.scaled:
            items.append(_Item(layer, None))
    return items


def _solve(items: list[_Item], most: float, full_parameters: int) -> list[_Item]:
    """The best items, one for each layer, whose sizes add up to at most `most`.

    An integer program with one variable for each item: 1 where the item is taken.
    """
    costs = np.array([item.cost for item in items])
    sizes = np.array([item.size for item in items], "float64")
    solution = optimize.milp(
        # Among equal errors the smaller plan.
        costs + 1e-9 * sizes / full_parameters,
        integrality=np.ones(len(items)),
        bounds=(0, 1),
        options={
            "presolve": False,  # with it, HiGHS prints where it has nothing to say
            "mip_rel_gap": _GAP,
        },
        constraints=[
            optimize.LinearConstraint(_items_of_layers(items), 1, 1),
            optimize.LinearConstraint(sizes, ub=most),
        ],
    )
    return [item for item, taken in zip(items, solution.x, strict=True) if taken > 0.5]


def _items_of_layers(items):
    """A matrix with a row for each layer and a column for each item, 1 where they belong."""
    paths = dict.fromkeys(item.layer.path for item in items)
    rows = {path: row for row, path in enumerate(paths)}
    columns = range(len(items))
    entries = [rows[item.layer.path] for item in items], columns
    return sparse.csr_array((np.ones(len(items)), entries))
