"""A plan of what each layer of a model becomes. It can be read, edited and kept."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import rich.table

from keras_bilinear.kronecker.factorization import (
    Factorization,
    check_factors,
    check_positive_int,
    recurrent_input_factors,
)
from keras_bilinear.tables import Tabular, right

# A plan's table marks layers whose predicted error is larger.
LARGE_ERROR = 0.5
# A plan whose predicted loss is above this is going to change what the model answers.
LARGE_LOSS = 0.02
_CAPTION = (
    "error: the predicted root mean square error of a layer's output on the calibration data (of "
    "its kernel without such data), relative: 0 is exact, at 1 nothing is kept. "
    f"! marks errors above {LARGE_ERROR}."
)
_LOSS_CAPTION = (
    " loss: by how much the layer is predicted to raise the loss, which is how far the outputs are "
    "from the full model's: in nats for probabilities and logits, else relative to the variance. "
    f"! marks a sum above {LARGE_LOSS}: expect worse answers, and train on."
)

# `(input_factors, output_factors)` of a kernel.
Factors = tuple[tuple[int, int], tuple[int, int]]
# Factors and a rank.
Choice = tuple[Factors, int]
# What each layer may become, by its path.
Candidates = dict[str, list[Choice]]


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
    def error(self) -> float | None:
        """The predicted error as planned; `None` if factors and rank were not looked at."""
        if self.rank is None or self.factors is None:
            return 0.0
        return self.errors.get((self.factors, self.rank))

    @property
    def loss(self) -> float | None:
        """The predicted rise of the model's loss as planned; `None` if it is not known."""
        if self.rank is None or self.factors is None:
            return 0.0
        return self.losses.get((self.factors, self.rank))

    def skip(self, reason: str = "on request") -> None:
        """Leaves the layer alone.

        Args:
            reason: why, as the plan shows it.
        """
        self.rank, self.reason = None, reason


class RewritePlan(Tabular, Mapping):
    """What each layer of a model becomes: a mapping from paths to plans of layers.

    A plan prints as a table. The plans of its layers can be edited.

    Args:
        layers: a `LayerPlan` for each layer with weights.
        other_parameters: numbers that the model stores outside of these layers.

    Example:

    >>> layers = [keras.layers.Dense(512, name="hidden"), keras.layers.Dense(512, name="last")]
    >>> plan = plan_rewrite(keras.Sequential([keras.Input((784,)), *layers]), budget=0.1)
    >>> plan["hidden"].factors = (28, 28), (16, 32)
    >>> plan["hidden"].rank = 4
    >>> plan["last"].skip()
    >>> plan.full_parameters, plan.parameters
    (664576, 268544)
    """

    def __init__(self, layers: Iterable[LayerPlan], other_parameters: int = 0):
        self._layers = {layer.path: layer for layer in layers}
        self.other_parameters = other_parameters

    def __getitem__(self, path: str) -> LayerPlan:
        if path not in self._layers:
            raise KeyError(f"no layer {path!r} in the plan, which has {', '.join(self._layers)}")
        return self._layers[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def full_parameters(self) -> int:
        """Numbers that the full model stores."""
        return self.other_parameters + sum(layer.full_parameters for layer in self.values())

    @property
    def parameters(self) -> int:
        """Numbers that the rewritten model stores."""
        return self.other_parameters + sum(layer.parameters for layer in self.values())

    @property
    def predicted_loss(self) -> float | None:
        """By how much the plan is predicted to raise the loss of the model, for each example.

        The loss is how far the outputs are from those of the full model: for probabilities and
        logits the Kullback-Leibler divergence in nats, for other outputs the squared error over
        the variance. It is a sum over the layers, to second order, so it is too small where
        errors are large. `None` without calibration data, or after edits that were not looked at.
        """
        losses = [layer.loss for layer in self.values()]
        known = [loss for loss in losses if loss is not None]
        return sum(known) if len(known) == len(losses) else None

    def to_json(self) -> str:
        """The plan as JSON."""
        layers = [
            {
                **dataclasses.asdict(layer),
                **{
                    name: [[*factors, rank, value] for (factors, rank), value in values.items()]
                    for name, values in (("errors", layer.errors), ("losses", layer.losses))
                },
            }
            for layer in self.values()
        ]
        return json.dumps({"other_parameters": self.other_parameters, "layers": layers}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "RewritePlan":
        """The plan that `to_json` wrote.

        Raises:
            ValueError: if the text is no plan.
        """
        try:
            content = json.loads(text)
            return cls(map(_layer_plan, content["layers"]), content["other_parameters"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"The text is no plan: {type(error).__name__}: {error}") from error

    def table(self) -> rich.table.Table:
        """The plan, a row for each layer."""
        scaled = any(layer.scale > 1 for layer in self.values())
        share = self.parameters / self.full_parameters if self.full_parameters else 1.0
        title = f"{self.full_parameters:,} -> {self.parameters:,} parameters ({share:.1%})"
        weighed = any(layer.losses for layer in self.values())
        if weighed and (loss := self.predicted_loss) is not None:
            title += f", predicted loss {loss:.2g}" + (" !" if loss > LARGE_LOSS else "")
        columns = ["full", "planned", "rank", "factors", "error"]
        columns[4:4] = ["scale"] if scaled else []
        table = rich.table.Table(
            "layer",
            "type",
            *right(*columns, *(["loss"] if weighed else [])),
            "left alone because",
            title=title,
            caption=_CAPTION + (_LOSS_CAPTION if weighed else ""),
        )
        for layer in self.values():
            error = "" if layer.rank is None or layer.error is None else f"{layer.error:.3f}"
            error += " !" if error and (layer.error or 0) > LARGE_ERROR else ""
            table.add_row(
                layer.path,
                layer.type,
                f"{layer.full_parameters:,}",
                f"{layer.parameters:,}",
                *(["", ""] if layer.rank is None else [str(layer.rank), _text(layer.factors)]),
                *([str(layer.scale)] if scaled else []),
                error,
                *([_loss_text(layer)] if weighed else []),
                layer.reason if layer.rank is None else "",
            )
        return table


def _loss_text(layer):
    return "" if layer.rank is None or layer.loss is None else f"{layer.loss:.2g}"


def _text(factors):
    return " -> ".join("x".join(map(str, pair)) for pair in factors)


def _layer_plan(content):
    factorizations = [_factorization(values) for values in content["factorizations"]]
    # A plan of an earlier version has no losses.
    predicted = {
        name: {
            ((tuple(inputs), tuple(outputs)), rank): value
            for inputs, outputs, rank, value in content.get(name, ())
        }
        for name in ("errors", "losses")
    }
    return LayerPlan(**{**content, "factorizations": factorizations, **predicted})


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
