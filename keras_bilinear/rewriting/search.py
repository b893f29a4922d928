"""What each layer of a plan becomes: the search through factors and ranks.

The candidates are `{path: [(factors, rank), ...]}`. A layer may also stay full, unless its width is
another than in the full model. A layer without candidates stays as it is planned.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy import optimize, sparse

from keras_bilinear.rewriting.layer_plan import (
    KEPT_FULL,
    NO_RANK,
    Candidates,
    Choice,
    LayerPlan,
)
from keras_bilinear.rewriting.limits import Limits

# The sum of squared errors of a plan is at most this share above the smallest. To prove which
# of many equally good plans is the best takes half an hour for many layers of one shape, as
# Xception has them; to come this near takes a fifth of a second.
_GAP = 1e-3
# A smaller sum of costs is scaled up before the search.
_SMALL = 0.1

Layers = Mapping[str, LayerPlan]


def check_reachable(
    layers: Layers, candidates: Candidates, limits: Limits, other_parameters: int
) -> None:
    """Checks that some plan keeps to all limits.

    Args:
        layers: the plans of the layers, which need no errors yet.
        candidates: what each layer may become.
        limits: the limits.
        other_parameters: numbers that the model stores outside of the layers.

    Raises:
        ValueError: if no plan does.
    """
    full = _full(layers, limits, other_parameters)
    for resource, most in limits.most(full).items():
        least = sum(_least(layers, candidates, resource).values())
        least += other_parameters if resource == "parameters" else 0
        if least > most:
            what = {"parameters": "parameters", "macs": "MACs"}[resource]
            raise ValueError(
                "No plan keeps to the limit: with every rank at its least, the model still has "
                f"{least:,} {what} ({least / full[resource]:.2%}). Received: {limits}"
            )
    rooms = _rooms(layers, limits, other_parameters)
    if len(rooms) > 1:
        items = _items(layers, candidates)
        if items and _solve(items, np.zeros(len(items)), _left(layers, candidates, rooms)) is None:
            raise _none_keeps_to(limits)


def least_parameters(layers: Layers, candidates: Candidates) -> int:
    """Numbers that the layers store together, with every rank at its least."""
    return sum(_least(layers, candidates, "parameters").values())


def without_too_large(
    layers: Layers, candidates: Candidates, limits: Limits, other_parameters: int
) -> Candidates:
    """The candidates that keep to all limits where all other layers are at their least."""
    for resource, room in _rooms(layers, limits, other_parameters).items():
        least = _least(layers, candidates, resource)
        spare = room - sum(least.values())
        candidates = {
            path: [
                choice
                for choice in choices
                if _size(layers[path], resource, choice) <= least[path] + spare
            ]
            for path, choices in candidates.items()
        }
    return candidates


def search(layers: Layers, candidates: Candidates, limits: Limits, other_parameters: int) -> None:
    """Sets the factors and the rank of each layer that has candidates.

    Args:
        layers: the plans of the layers, which are changed. They have the predicted error of each
            candidate.
        candidates: what each layer may become.
        limits: the limits that the plan keeps to.
        other_parameters: numbers that the model stores outside of the layers.

    Raises:
        ValueError: if no plan keeps to all limits.
    """
    if limits.max_error is not None:
        _smallest_below(limits.max_error, layers, candidates)
        return
    candidates = without_too_large(layers, candidates, limits, other_parameters)
    candidates = {path: choices for path, choices in candidates.items() if choices}
    items = _items(layers, candidates)
    if not items:
        return
    rooms = _left(layers, candidates, _rooms(layers, limits, other_parameters))
    full = sum(layer.full_parameters for layer in layers.values())
    rate = _loss_of_errors(items)
    # Among equal errors the smaller plan.
    costs = np.array([item.cost(rate) + 1e-9 * item.size("parameters") / full for item in items])
    found = _solve(items, costs, rooms)
    if found is None:
        raise _none_keeps_to(limits)
    for item in found:
        item.layer.choose(item.choice, KEPT_FULL if item.choice is None else "")


def _none_keeps_to(limits):
    return ValueError(f"No plan keeps to all limits at once. Received: {limits}")


def _size(layer: LayerPlan, resource: str, choice: Choice | None) -> int:
    size = layer.size(resource, choice)
    if size is None:
        raise ValueError(
            f"The plan does not know the MACs of the layer {layer.path!r}. Make the plan with a "
            'share of them: plan_rewrite(model, budget={"macs": 1.0})'
        )
    return size


def _full(layers, limits, other_parameters) -> dict[str, int]:
    """What the full model takes of each resource that is limited."""
    full = {
        resource: sum(_full_size(layer, resource) for layer in layers.values())
        for resource in limits.resources
    }
    if "parameters" in full:
        full["parameters"] += other_parameters
    return full


def _full_size(layer, resource):
    return layer.full_parameters if resource == "parameters" else _size(layer, resource, None)


def _rooms(layers, limits, other_parameters) -> dict[str, float]:
    """How much of each resource all layers together may take."""
    most = limits.most(_full(layers, limits, other_parameters))
    return {
        resource: size - (other_parameters if resource == "parameters" else 0)
        for resource, size in most.items()
    }


def _left(layers, candidates, rooms) -> dict[str, float]:
    """How much the layers that have candidates may take."""
    fixed = [layer for path, layer in layers.items() if not candidates.get(path)]
    return {
        resource: room - sum(_size(layer, resource, layer.choice) for layer in fixed)
        for resource, room in rooms.items()
    }


def _least(layers, candidates, resource) -> dict[str, int]:
    """`{path: size}` with every layer at its least."""
    return {
        path: min(
            (_size(layer, resource, choice) for choice in _choices(layer, candidates.get(path))),
            default=0,
        )
        for path, layer in layers.items()
    }


def _choices(layer: LayerPlan, choices: list[Choice] | None) -> list[Choice | None]:
    """What a layer may become; `None` stands for the full layer."""
    if not choices:
        return [layer.choice]
    return [*choices, *([] if layer.scaled else [None])]


def _smallest_below(max_error, layers, candidates):
    """Gives each layer the smallest candidate whose error is at most `max_error`."""
    for path, choices in candidates.items():
        layer = layers[path]
        sizes = {(factors, rank): layer.parameters_at(rank, factors) for factors, rank in choices}
        good = [choice for choice in choices if layer.errors[choice] <= max_error]
        if good:
            layer.choose(min(good, key=sizes.__getitem__))
        elif layer.scaled:
            layer.choose(max(choices, key=sizes.__getitem__))
        else:
            layer.choose(None, f"{NO_RANK} below {max_error}")


@dataclasses.dataclass(frozen=True)
class _Item:
    """An item of the knapsack: a layer, and what it may become.

    Attributes:
        layer: the plan of the layer.
        choice: factors and rank; `None` for the full layer.
    """

    layer: LayerPlan
    choice: Choice | None

    def cost(self, rate: float) -> float:
        """The predicted rise of the loss; where it is not known, `rate` times the squared error."""
        if self.choice is None:
            return 0.0
        loss = self.layer.losses.get(self.choice)
        return rate * self.layer.errors[self.choice] ** 2 if loss is None else loss

    def size(self, resource: str) -> int:
        return _size(self.layer, resource, self.choice)


def _items(layers: Layers, candidates: Candidates) -> list[_Item]:
    """The items of the knapsack, layer by layer."""
    return [
        _Item(layers[path], choice)
        for path, choices in candidates.items()
        if choices
        for choice in _choices(layers[path], choices)
    ]


def _loss_of_errors(items: list[_Item]) -> float:
    """What a squared error raises the loss by, in a typical layer; 1 if no losses are known.

    Layers that are too wide to be fitted to data, and those that no example reaches, have errors
    of their kernels alone.
    """
    ratios = [
        loss / error**2
        for item in items
        if item.choice is not None
        and (loss := item.layer.losses.get(item.choice))
        and (error := item.layer.errors[item.choice])
    ]
    return float(np.median(ratios)) if ratios else 1.0


def _solve(items: list[_Item], costs: np.ndarray, rooms: Mapping[str, float]) -> list[_Item] | None:
    """The items, one for each layer, that cost the least and keep to all limits.

    An integer program with one variable for each item: 1 where the item is taken.

    Args:
        items: the items.
        costs: the cost of each item.
        rooms: how much of each resource the items may take together.

    Returns:
        The best items; `None` if none keep to the limits.
    """
    constraints = [optimize.LinearConstraint(_items_of_layers(items), 1, 1)]
    for resource, most in rooms.items():
        sizes = np.array([item.size(resource) for item in items], "float64")
        constraints.append(optimize.LinearConstraint(sizes, ub=most))

    def solve(costs):
        return optimize.milp(
            costs,
            integrality=np.ones(len(items)),
            bounds=(0, 1),
            options={
                "presolve": False,  # with it, HiGHS prints where it has nothing to say
                "mip_rel_gap": _GAP,
            },
            constraints=constraints,
        )

    solution = solve(costs)
    if solution.x is None:
        return None
    if 0 < solution.fun < _SMALL:  # HiGHS takes sums that differ by 1e-6 for the same
        solution = solve(costs / solution.fun)
    return [item for item, taken in zip(items, solution.x, strict=True) if taken > 0.5]


def _items_of_layers(items):
    """A matrix with a row for each layer and a column for each item, 1 where they belong."""
    paths = dict.fromkeys(item.layer.path for item in items)
    rows = {path: row for row, path in enumerate(paths)}
    columns = range(len(items))
    entries = [rows[item.layer.path] for item in items], columns
    return sparse.csr_array((np.ones(len(items)), entries))
