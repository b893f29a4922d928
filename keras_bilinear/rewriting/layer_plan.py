"""A plan of what one layer becomes: its factors and its rank, and what these would cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_bilinear.kronecker.factorization import (
    Factorization,
    check_factors,
    check_positive_int,
    recurrent_input_factors,
)

# `(input_factors, output_factors)` of a kernel.
Factors = tuple[tuple[int, int], tuple[int, int]]
# Factors and a rank.
Choice = tuple[Factors, int]
# What each layer may become, by its path.
Candidates = dict[str, list[Choice]]

# The attributes of a `LayerPlan` with a number for each pair of factors and rank.
LOOKED_AT = "errors", "losses", "macs_of"
# Why a search leaves a layer full. Another search may choose otherwise.
KEPT_FULL, NO_RANK = "kept full: within the budget", "no rank that saves anything has an error"
REASONS_OF_SEARCH = KEPT_FULL, NO_RANK


@dataclasses.dataclass(repr=False)
class LayerPlan:
    """What one layer becomes.

    Attributes:
        path: names of the layers that hold the layer, and its own name, joined by `/`.
        type: class of the full layer.
        full_parameters: numbers that the full layer stores.
        factorizations: shapes of the layer's kernels, with rank 1; empty for a layer
            that cannot be rewritten.
        rank: number of Kronecker terms; `None` leaves the layer alone.
        reason: why the layer is left alone; empty where it is not.
        errors: the predicted error of each pair `(factors, rank)` that was looked at:
            root mean square, relative. It is the error of the kernels or, with
            calibration data, of the output.
        losses: by how much each of these pairs is predicted to raise the loss of the model, where
            calibration data tell. The loss is how far the outputs are from those of the full
            model, see `plan_rewrite`.
        scale: what both output factors are multiplied by; the layer has `scale**2` times
            the units.
        input_scale: what the input factors are multiplied by: the scale of the layer
            before this layer.
        pinned: whether the layer stays as it is when the plan is solved again, see
            `RewritePlan.with_budget`. It is pinned once its rank or its factors are set by
            hand, or it is skipped.
        full_macs: multiply-accumulate operations of the full layer for one example; `None`
            where no limit on them was given.
        macs_of: the same of the bilinear layer, for each pair that was looked at.
    """

    path: str
    type: str
    full_parameters: int
    factorizations: list[Factorization] = dataclasses.field(default_factory=list)
    rank: int | None = None
    reason: str = ""
    errors: dict[Choice, float] = dataclasses.field(default_factory=dict)
    losses: dict[Choice, float] = dataclasses.field(default_factory=dict)
    scale: int = 1
    input_scale: int = 1
    pinned: bool = False
    full_macs: int | None = None
    macs_of: dict[Choice, int] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        if self.rank is None:
            what = f"{self.full_parameters:,} parameters, left alone: {self.reason or 'no rank'}"
        else:
            error = "unknown" if self.error is None else f"{self.error:.3f}"
            what = (
                f"{self.full_parameters:,} -> {self.parameters:,} parameters, rank={self.rank}, "
                f"factors={self.factors}, error={error}"
            )
        return f"<LayerPlan of {self.type} {self.path!r}: {what}>"

    @property
    def factors(self) -> Factors | None:
        """`(input_factors, output_factors)` of the kernel; `None` if it cannot be rewritten.

        The factors can be set. A recurrent kernel has the output factors on both sides, see
        `keras_bilinear.kronecker.factorization.recurrent_input_factors`. In the reverse
        projection of an embedding, input and output factors change places.
        """
        if not self.factorizations:
            return None
        return self.factorizations[0].input_factors, self.factorizations[0].output_factors

    @factors.setter
    def factors(self, value: Factors | None) -> None:
        if self.scaled:
            raise ValueError(
                f"The scale of the layer {self.path!r} decides its factors: they cannot be set. "
                f"Received: factors={value!r}"
            )
        if value is None:
            raise ValueError(f"`factors` must be two pairs. Received: factors={value!r}")
        self.factorizations = self.with_factors(value)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a bilinear layer that the plan decides: its rank and its factors."""
        input_factors, output_factors = self.factors or (None, None)
        return {
            "rank": self.rank,
            "input_factors": input_factors,
            "output_factors": output_factors,
        }

    def with_factors(self, factors: Factors | None) -> list[Factorization]:
        """The layer's factorizations with other factors.

        Args:
            factors: `(input_factors, output_factors)`; `None` for the layer's own factors.

        Raises:
            ValueError: if the factors are not valid.
        """
        if factors is None or factors == self.factors:
            return self.factorizations
        if not self.factorizations:
            raise self._cannot_be_rewritten("factors", factors)
        if isinstance(factors, str) or not hasattr(factors, "__len__") or len(factors) != 2:
            raise ValueError(
                "`factors` must be a pair of pairs, of the inputs and of the outputs. "
                f"Received: factors={factors!r}"
            )
        kernel, *others = self.factorizations
        inputs = check_factors("input_factors", factors[0], kernel.input_dim)
        outputs = check_factors("output_factors", factors[1], kernel.output_dim)
        if inputs is None or outputs is None:
            raise ValueError(f"`factors` must be two pairs. Received: factors={factors!r}")
        return [
            dataclasses.replace(kernel, input_factors=inputs, output_factors=outputs),
            *(_alongside(other, kernel, inputs, outputs) for other in others),
        ]

    def _cannot_be_rewritten(self, name, value):
        return ValueError(
            f"The layer {self.path!r} cannot be rewritten: {self.reason}. "
            f"Received: {name}={value!r}"
        )

    def __setattr__(self, name, value):
        if name != "factors" and name not in self.__dataclass_fields__:
            raise AttributeError(f"A plan of a layer has no {name!r}")
        if name == "rank" and value is not None:
            value = check_positive_int("rank", value)
            if not self.factorizations:
                raise self._cannot_be_rewritten("rank", value)
        super().__setattr__(name, value)
        if name in ("rank", "factors") and "pinned" in self.__dict__:  # not while it is made
            self.pinned = True

    def parameters_at(self, rank: int | None, factors: Factors | None = None) -> int:
        """Numbers that the layer stores.

        Args:
            rank: number of Kronecker terms; `None` for the full layer.
            factors: `(input_factors, output_factors)`; `None` for the layer's own factors.
        """
        # Beside its kernels a layer may have a bias or, as a normalization, other numbers for
        # each output.
        kernels = sum(factorization.full_parameters for factorization in self.factorizations)
        vectors = self.full_parameters - kernels
        if rank is None:
            return self.full_parameters + (self.scale**2 - 1) * vectors
        factorizations = (
            dataclasses.replace(factorization, rank=rank)
            # The recurrent kernel of a layer gets its own outputs.
            .scaled(self.scale if index else self.input_scale, self.scale)
            for index, factorization in enumerate(self.with_factors(factors))
        )
        kernels = sum(factorization.parameters for factorization in factorizations)
        return self.scale**2 * vectors + kernels

    @property
    def scaled(self) -> bool:
        """Whether the layer's inputs or outputs have another width than in the full model."""
        return self.scale * self.input_scale > 1

    def saves(self, rank: int, factors: Factors | None = None) -> bool:
        """Whether the layer stores fewer numbers at a rank than in full."""
        return self.parameters_at(rank, factors) < self.full_parameters

    @property
    def parameters(self) -> int:
        """Numbers that the layer stores as planned."""
        return self.parameters_at(self.rank)

    @property
    def macs(self) -> int | None:
        """Multiply-accumulate operations for one example as planned; `None` if not known."""
        return self.size("macs", self.choice)

    def size(self, resource: str, choice: Choice | None) -> int | None:
        """What the layer takes of a resource.

        Args:
            resource: `"parameters"` or `"macs"`.
            choice: factors and rank; `None` for the full layer.

        Returns:
            A number; `None` if it is not known.
        """
        if resource == "macs":
            return self.full_macs if choice is None else self.macs_of.get(choice)
        factors, rank = (None, None) if choice is None else choice
        return self.parameters_at(rank, factors)

    @property
    def choice(self) -> Choice | None:
        """Factors and rank as planned; `None` if the layer is left alone."""
        if self.rank is None or self.factors is None:
            return None
        return self.factors, self.rank

    def choose(self, choice: Choice | None, reason: str = "") -> None:
        """Takes what a search chooses, which another search may choose anew.

        Args:
            choice: factors and rank; `None` leaves the layer full.
            reason: why the layer stays full.
        """
        factors, rank = (None, None) if choice is None else choice
        self.factorizations, self.reason = self.with_factors(factors), reason
        super().__setattr__("rank", rank)

    @property
    def error(self) -> float | None:
        """The predicted error as planned; `None` if factors and rank were not looked at."""
        return 0.0 if self.choice is None else self.errors.get(self.choice)

    @property
    def loss(self) -> float | None:
        """The predicted rise of the model's loss as planned; `None` if it is not known."""
        return 0.0 if self.choice is None else self.losses.get(self.choice)

    def copy(self) -> "LayerPlan":
        """A copy, whose edits do not change this plan."""
        own = {name: dict(getattr(self, name)) for name in LOOKED_AT}
        return dataclasses.replace(self, **own)

    def to_dict(self) -> dict[str, Any]:
        """What `read_layer_plan` reads, of the types that JSON knows."""
        own = {
            name: [
                [*factors, rank, value] for (factors, rank), value in getattr(self, name).items()
            ]
            for name in LOOKED_AT
        }
        return {**dataclasses.asdict(self), **own}

    def skip(self, reason: str = "on request") -> None:
        """Leaves the layer alone.

        Args:
            reason: why, as the plan shows it.
        """
        self.rank, self.reason = None, reason


def read_layer_plan(content: Mapping[str, Any]) -> LayerPlan:
    """The plan of a layer that `LayerPlan.to_dict` made, also of an earlier version.

    Raises:
        KeyError, TypeError, ValueError: if it is none.
    """
    factorizations = [_factorization(values) for values in content["factorizations"]]
    looked_at = {
        name: {
            ((tuple(inputs), tuple(outputs)), rank): value
            for inputs, outputs, rank, value in content.get(name, ())
        }
        for name in LOOKED_AT
    }
    layer = LayerPlan(**{**content, "factorizations": factorizations, **looked_at})
    if "pinned" not in content:
        layer.pinned = bool(layer.reason) and not layer.reason.startswith(REASONS_OF_SEARCH)
    return layer


def _factorization(content: Mapping[str, Any]) -> Factorization:
    shapes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
    }
    if "gates" in shapes:  # a plan that was saved before there were `blocks`
        groups, gates = shapes.pop("groups"), shapes.pop("gates")
        shapes |= {"blocks": gates or groups, "share_right": not gates}
    return Factorization(**shapes)


def _alongside(other, first, inputs, outputs):
    """The factorization of a further kernel of a layer whose first kernel has these factors."""
    sizes, first_sizes = ((kernel.input_dim, kernel.output_dim) for kernel in (other, first))
    if not other.share_right and sizes == (first.output_dim, first.output_dim):
        # A recurrent kernel gets the layer's own outputs.
        inputs = recurrent_input_factors(first.output_dim, outputs)
    elif sizes == first_sizes[::-1] and other == first.transposed != first:
        # The projection back to the vocabulary goes from outputs to inputs.
        inputs, outputs = outputs, inputs
    elif sizes != first_sizes:
        return other
    return dataclasses.replace(other, input_factors=inputs, output_factors=outputs)
