"""The smallest plan whose rewritten model still does well enough, as measured."""

import math
import numbers
from typing import Any

import keras

from keras_bilinear.data import describe, model_batches
from keras_bilinear.messages import check_choice
from keras_bilinear.progress import shown, track
from keras_bilinear.rewriting.choice import Choices
from keras_bilinear.rewriting.data_checks import warn_of_other_inputs
from keras_bilinear.rewriting.limits import LayerChoice, Limits, PlanOptions
from keras_bilinear.rewriting.measured import Measure
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.planner import make_plan
from keras_bilinear.rewriting.rewrite import rewrite_by_plan
from keras_bilinear.rewriting.sites import check_built

# The budgets that are tried last differ by this factor at most.
_NEAR = 1.05


def smallest_plan(
    model: keras.Model,
    validation_data: Any,
    max_drop: float = 0.01,
    metric: Any = None,
    mode: str = "auto",
    calibration_data=None,
    layers: LayerChoice = None,
    low_rank: bool = True,
    exclude: Choices | None = None,
    verbose: int | str = "auto",
) -> RewritePlan:
    """Finds the smallest plan whose rewritten model does almost as well as the full model.

    It plans once, and bisects over budgets: for each it rewrites the model as
    `rewrite_model` does, and measures. About 7 rewritten models are tried, until the budgets
    differ by 5% at most. The metric may go up and down between budgets, so a smaller plan that
    was not tried may do as well.

    Args:
        model: a built model. It is left untouched.
        validation_data: what the metric is measured on: `(inputs, labels)`, with inputs as
            `calibration_data` takes them; inputs without labels; or an iterable of batches of
            either, such as a `tf.data.Dataset`. It should be other data than the calibration
            data.
        max_drop: by how much the metric may be worse than that of the full model, 0 or more, in
            the unit of the metric: 0.01 is a percentage point of an accuracy.
        metric: the name of a metric that the model is compiled with, or `"loss"`; a Keras metric
            or the name of one; or a function of `(labels, outputs)`, both arrays of all
            examples, that returns a number. Without labels, the outputs of the full model stand
            for them. `None` takes the first metric that the model is compiled with or, without
            such a metric or without labels, the agreement: how often the largest number along
            the last axis of an output is where it is in the full model, or a probability is on
            the same side of 0.5.
        mode: `"max"` if a larger metric is better, `"min"` if a smaller one is. `"auto"` knows
            Keras' metrics, and takes a function's larger numbers for better.
        calibration_data: inputs of the model to plan with and to fit the layers to, see
            `plan_rewrite`.
        layers: the layers that may be rewritten, see `plan_rewrite`.
        low_rank: whether layers may get the factors of kernels of low rank.
        exclude: layers that are left alone, see `plan_rewrite`.
        verbose: 1 shows on stderr, or in a notebook, how far the work is; 0 shows nothing.
            `"auto"` is 1 in a terminal and in a notebook, 0 elsewhere.

    Returns:
        A `RewritePlan`, for `rewrite_model` with the same calibration data. It leaves all layers
        alone if no smaller model does well enough. Its `with_budget` makes plans for other
        budgets.

    Raises:
        ValueError: if an argument is not valid, if the model is not built, if the metric cannot
            be measured or is not finite for the full model, or if no layer can be rewritten.
        TypeError: if the data are neither arrays nor an iterable of batches.

    Example:

    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(64, "relu"),
    ...                           keras.layers.Dense(4, "softmax")])
    >>> x = np.random.rand(300, 16)
    >>> plan = smallest_plan(model, x[:100], max_drop=0.1, calibration_data=x[100:])
    >>> plan.parameters < model.count_params()
    True
    """
    if not isinstance(max_drop, numbers.Real) or not 0 <= float(max_drop) < math.inf:
        raise ValueError(f"`max_drop` must be 0 or more. Received: max_drop={max_drop!r}")
    check_choice("mode", mode, ("auto", "min", "max"))
    options = PlanOptions(Limits(budget=1.0), "auto", layers, 1, low_rank, exclude)
    with shown(verbose):
        check_built(model)
        if validation_data is None:
            raise ValueError(
                f"`validation_data` must be given. Received: {describe(validation_data)}"
            )
        batches = model_batches(calibration_data, model)
        if batches is not None:
            warn_of_other_inputs(model, batches)
        copy = rewrite_by_plan(model, RewritePlan([]), None, warn=False)
        measure = Measure(copy, validation_data, metric, mode)
        plan = make_plan(model, options, batches)
        return _bisect(model, plan, measure, float(max_drop), batches)


def _bisect(model, plan, measure, max_drop, batches) -> RewritePlan:
    """The smallest plan that was tried and does well enough; else the plan of the full model."""
    best = plan.left_full()
    low, high = plan.least_parameters / plan.full_parameters, 1.0
    steps = max(1, math.ceil(math.log2(max(1.0, math.log(high / low) / math.log(_NEAR)))))
    for _ in track(range(steps), "looking for the smallest plan"):
        budget = math.sqrt(low * high)
        tried = plan.with_budget(budget)
        small = rewrite_by_plan(model, tried, batches, warn=False)
        if measure.drop(small) <= max_drop:  # NaN has dropped
            best, high = tried, budget
        else:
            low = budget
    return best
