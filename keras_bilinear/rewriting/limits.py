"""What a plan is asked for: how small the model must get, and what the search may choose."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from keras_bilinear.data import describe
from keras_bilinear.kronecker.factorization import check_positive_int
from keras_bilinear.rewriting.choice import Choices, check_choices

# The budget of a plan for which no limit is given.
DEFAULT_BUDGET = 0.1
# What a budget may have shares of.
RESOURCES = "parameters", "macs"

# A share of the parameters, or shares of several resources by their names.
Budget = float | Mapping[str, float]

# Layers, or a mapping from their paths to ranks; see `plan_rewrite`.
LayerChoice = Choices | Mapping[str, int | None] | None


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limit that a plan keeps to: at most one of three. Without any, the budget is 0.1.

    Attributes:
        budget: the share of the full model's parameters to keep, above 0 and at most 1, or a
            mapping from `RESOURCES` to shares of what the full model takes of them.
        max_params: the number of parameters to keep.
        max_error: the largest predicted error of a layer.

    Raises:
        ValueError: if several limits are given, or a limit is not valid.
    """

    budget: Budget | None = None
    max_params: int | None = None
    max_error: float | None = None

    def __post_init__(self):
        if len(self.given) > 1:
            raise _several(self.given)
        if _is_shares(self.budget):
            object.__setattr__(self, "budget", _checked_shares(self.budget))
            return
        for name, value in self.given.items():
            if not _is_valid(name, value):
                raise _not_valid(name, value)

    @property
    def given(self) -> dict[str, Any]:
        """The limits that are not `None`, by their names."""
        limits = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in limits.items() if value is not None}

    @property
    def shares(self) -> dict[str, float]:
        """The share of each resource to keep; none where the limit is no budget."""
        if self.max_error is not None or self.max_params is not None:
            return {}
        if isinstance(self.budget, Mapping):
            return dict(self.budget)
        return {"parameters": DEFAULT_BUDGET if self.budget is None else self.budget}

    @property
    def resources(self) -> tuple[str, ...]:
        """The resources that are limited; none where the limit is `max_error`."""
        return ("parameters",) if self.max_params is not None else tuple(self.shares)

    def most(self, full: Mapping[str, int]) -> dict[str, float]:
        """How much a plan may take of each resource that is limited, not rounded.

        Args:
            full: what the full model takes of these resources.
        """
        if self.max_params is not None:
            return {"parameters": self.max_params}
        return {resource: share * full[resource] for resource, share in self.shares.items()}

    def __str__(self):
        """The limit as an argument, such as `budget=0.1`."""
        if not self.given:
            return f"budget={DEFAULT_BUDGET} (none was given)"
        ((name, value),) = self.given.items()
        return f"{name}={value}"


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """All that a plan is asked for; `plan_rewrite` explains each value.

    Attributes:
        limits: the limit that the plan keeps to. A fixed `rank` excludes every limit.
        rank: `"auto"`, or the rank of every layer.
        layers: layers that may be rewritten, or their ranks; `None` for all layers.
        scale: what both output factors of each hidden layer are multiplied by.
        low_rank: whether layers may get the factors of kernels of low rank.
        exclude: layers that are left alone; `None` for no such layers.

    Raises:
        ValueError: if a value is not valid, or if a limit and a rank are given.
    """

    limits: Limits = dataclasses.field(default_factory=Limits)
    rank: int | str = "auto"
    layers: LayerChoice = None
    scale: int = 1
    low_rank: bool = True
    exclude: Choices | None = None

    def __post_init__(self):
        if self.rank != "auto":
            if self.limits.given:
                raise _several({**self.limits.given, "rank": self.rank})
            object.__setattr__(self, "rank", check_positive_int("rank", self.rank))
        object.__setattr__(self, "scale", check_positive_int("scale", self.scale))
        if self.scale > 1 and "macs" in self.limits.resources:
            raise ValueError(
                "A `scale` and a share of the MACs exclude each other. "
                f"Received: scale={self.scale}, {self.limits}"
            )
        if self.layers is not None and not isinstance(self.layers, Mapping):
            object.__setattr__(self, "layers", check_choices("layers", self.layers))
        if self.exclude is not None:
            object.__setattr__(self, "exclude", check_choices("exclude", self.exclude))

    @property
    def fixed_rank(self) -> int | None:
        """The rank of every layer; `None` where the search chooses the ranks."""
        return None if isinstance(self.rank, str) else self.rank

    @property
    def chosen_ranks_only(self) -> bool:
        """Whether only the layers that `layers` gives a rank are rewritten, without a limit."""
        if self.limits.given or self.fixed_rank or not isinstance(self.layers, Mapping):
            return False
        return any(rank is not None for rank in self.layers.values())


def _several(given):
    received = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return ValueError(
        "At most one of `budget`, `max_params`, `max_error` and a `rank` can be given. "
        f"Received: {received}"
    )


def _is_shares(budget: Any) -> bool:
    """Whether a budget is a mapping of shares, and not one of inputs of the model."""
    return isinstance(budget, Mapping) and not any(hasattr(x, "shape") for x in budget.values())


def _checked_shares(budget) -> dict[str, float]:
    """A mapping of shares as a dictionary.

    Raises:
        ValueError: if it is not valid.
    """
    unknown = [key for key in budget if key not in RESOURCES]
    if unknown or not budget:
        raise ValueError(
            f"`budget` must have shares of {' and '.join(map(repr, RESOURCES))}. "
            f"Received: budget={dict(budget)!r}"
        )
    for key, share in budget.items():
        if not _is_valid("budget", share):
            raise ValueError(
                f"The share of {key!r} in `budget` must be above 0 and at most 1. "
                f"Received: budget={dict(budget)!r}"
            )
    return dict(budget)


def _is_valid(name, value):
    if not _is_number(value):
        return False
    return 0 < value < math.inf and (name != "budget" or value <= 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _not_valid(name, value):
    rule = "above 0 and at most 1" if name == "budget" else "a positive number"
    if isinstance(value, numbers.Real):
        is_count = name == "budget" and _is_number(value) and 1 < float(value) < math.inf
        hint = ". A number of parameters is given as max_params=" if is_count else ""
        return ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}{hint}")
    hint = ""
    if name == "budget" and not isinstance(value, str):
        hint = " Inputs of the model are given as calibration_data=."
    return ValueError(f"`{name}` must be {rule}.{hint} Received: {describe(value)}")
