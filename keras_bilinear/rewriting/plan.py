"""A plan of what each layer of a model becomes. It can be read, edited and kept."""

import json
from collections.abc import Iterable, Iterator, Mapping

import rich.table

from keras_bilinear.rewriting.layer_plan import KEPT_FULL, Candidates, LayerPlan, read_layer_plan
from keras_bilinear.rewriting.limits import Budget, Limits
from keras_bilinear.rewriting.search import check_reachable, least_parameters, search
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
    def full_macs(self) -> int | None:
        """Multiply-accumulate operations of the full model, exported, for one example.

        `None` if the plan was made without a share of them.
        """
        return _sum(layer.full_macs for layer in self.values())

    @property
    def macs(self) -> int | None:
        """Multiply-accumulate operations of the rewritten model, exported, for one example.

        `None` if the plan was made without a share of them, or after edits that were not looked at.
        """
        return _sum(layer.macs for layer in self.values())

    @property
    def predicted_loss(self) -> float | None:
        """By how much the plan is predicted to raise the loss of the model, for each example.

        The loss is how far the outputs are from those of the full model: for probabilities and
        logits the Kullback-Leibler divergence in nats, for other outputs the squared error over
        the variance. It is a sum over the layers, to second order, so it is too small where
        errors are large. `None` without calibration data, or after edits that were not looked at.
        """
        return _sum(layer.loss for layer in self.values())

    @property
    def least_parameters(self) -> int:
        """Numbers that the model stores if each layer that is not pinned has its least rank."""
        return self.other_parameters + least_parameters(self, self._candidates())

    def _candidates(self) -> Candidates:
        """What was looked at for each layer that a search may change."""
        return {
            path: [*layer.errors]
            for path, layer in self.items()
            if layer.errors and not layer.pinned
        }

    def with_budget(
        self,
        budget: Budget | None = None,
        max_params: int | None = None,
        max_error: float | None = None,
    ) -> "RewritePlan":
        """Plans anew for another limit, from what this plan looked at: no model, no data.

        For a smaller budget the plan is the one that `plan_rewrite` makes. For a larger budget it
        may be worse: with calibration data, near-square factors were looked at only as far as
        they fit into the first budget. Layers that were excluded, and those whose rank or factors
        were set by hand, stay as they are.

        Args:
            budget: the share of the full model's parameters to keep, above 0 and at most 1; or
                shares of `"parameters"` and `"macs"`, see `plan_rewrite`. The plan knows the MACs
                if it was made with a share of them. `None` means 0.1 if no other limit is given.
            max_params: the number of parameters to keep, instead of a `budget`; `None` for no
                such limit.
            max_error: the largest predicted error of a layer, instead of a `budget`; `None` for
                no such limit.

        Returns:
            A new `RewritePlan`.

        Raises:
            ValueError: if a limit is not valid, if no plan keeps to it, or if the plan was made
                with ranks that are given, so that there is nothing to choose from.

        Example:

        >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(256)])
        >>> plan = plan_rewrite(model, budget=0.5)
        >>> plan.with_budget(0.1).parameters <= 0.1 * model.count_params()
        True
        """
        limits = Limits(budget, max_params, max_error)
        plan = self._copy()
        candidates = plan._candidates()
        if not candidates:
            raise ValueError(
                "The plan has nothing to choose from: all of its ranks were given, or no layer "
                f"can be rewritten. Received: {limits}"
            )
        check_reachable(plan, candidates, limits, plan.other_parameters)
        search(plan, candidates, limits, plan.other_parameters)
        return plan

    def left_full(self) -> "RewritePlan":
        """The plan that leaves all layers full that are not pinned."""
        plan = self._copy()
        for path in plan._candidates():
            plan[path].choose(None, KEPT_FULL)
        return plan

    def _copy(self) -> "RewritePlan":
        return RewritePlan((layer.copy() for layer in self.values()), self.other_parameters)

    def to_json(self) -> str:
        """The plan as JSON."""
        layers = [layer.to_dict() for layer in self.values()]
        return json.dumps({"other_parameters": self.other_parameters, "layers": layers}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "RewritePlan":
        """The plan that `to_json` wrote.

        Raises:
            ValueError: if the text is no plan.
        """
        try:
            content = json.loads(text)
            return cls(map(read_layer_plan, content["layers"]), content["other_parameters"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"The text is no plan: {type(error).__name__}: {error}") from error

    def table(self) -> rich.table.Table:
        """The plan, a row for each layer."""
        scaled = any(layer.scale > 1 for layer in self.values())
        share = self.parameters / self.full_parameters if self.full_parameters else 1.0
        title = f"{self.full_parameters:,} -> {self.parameters:,} parameters ({share:.1%})"
        if self.full_macs and self.macs is not None:
            share = self.macs / self.full_macs
            title += f", {self.full_macs:,} -> {self.macs:,} MACs ({share:.1%})"
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


def _sum(values):
    """The sum of numbers; `None` if one of them is."""
    values = [*values]
    return None if any(value is None for value in values) else sum(values)


def _loss_text(layer):
    return "" if layer.rank is None or layer.loss is None else f"{layer.loss:.2g}"


def _text(factors):
    return " -> ".join("x".join(map(str, pair)) for pair in factors)
