"""From limits to a plan: which layers become bilinear, with what factors and rank."""

from collections.abc import Mapping
from typing import Any

import keras

from keras_bilinear.data import model_batches
from keras_bilinear.kronecker.nearest import input_index
from keras_bilinear.layers.converter import converter_of
from keras_bilinear.progress import shown
from keras_bilinear.rewriting.choice import Choices, check_choices, choose, choose_ranks
from keras_bilinear.rewriting.data_checks import warn_of_other_inputs
from keras_bilinear.rewriting.layer_plan import Candidates, Factors, LayerPlan
from keras_bilinear.rewriting.limits import Budget, LayerChoice, Limits, PlanOptions
from keras_bilinear.rewriting.operations import plan_macs
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.prediction import predict_errors
from keras_bilinear.rewriting.scaling import scale_hidden_layers
from keras_bilinear.rewriting.search import check_reachable, search, without_too_large
from keras_bilinear.rewriting.sites import (
    Site,
    check_built,
    reason_to_leave,
    tied_variables,
    walk,
)

# How many ranks the search chooses from for each power of 2, as far as they save anything.
# All errors of kernels of low rank come from one decomposition. For near-square factors each
# rank takes a fit of its own, whose time grows with a power of the rank. So these have at most
# `MOST_TERMS` terms or, where this is more, as many as make a linear system of `MOST_UNKNOWNS`.
LOW_RANKS_PER_OCTAVE, RANKS_PER_OCTAVE = 8, 2
MOST_TERMS, MOST_UNKNOWNS = 64, 2048


def plan_rewrite(
    model: keras.Model,
    budget: Budget | None = None,
    max_params: int | None = None,
    max_error: float | None = None,
    calibration_data=None,
    rank: int | str = "auto",
    layers: LayerChoice = None,
    scale: int = 1,
    low_rank: bool = True,
    exclude: Choices | None = None,
    verbose: int | str = "auto",
) -> RewritePlan:
    """Plans which layers of a model become bilinear, with what factors and of what rank.

    Each layer gets either near-square factors or the factors of a kernel of low rank: two
    plain layers, one after the other. Grouped convolutions and layers with a `scale` keep
    near-square factors.

    Among all plans within the limit, this one has the smallest predicted loss, to within a
    thousandth: a knapsack, solved by HiGHS. The loss is how far the outputs of the model are
    from those of the full model: the Kullback-Leibler divergence, in nats, where they are
    probabilities, or logits by the loss that the model is compiled with; elsewhere the
    squared error over the variance. Gradients of the model at the calibration data, which need
    no labels, tell how much it feels the errors of each layer. Without calibration data, or
    if outputs are integers, the sum of the layers' squared relative errors takes its place.

    Args:
        model: a built model. It is left untouched.
        budget: the share of the model's parameters to keep, above 0 and at most 1. Or a
            mapping with shares of `"parameters"` and `"macs"`, all of which are kept:
            `{"parameters": 0.25, "macs": 0.5}`. MACs are multiply-accumulate operations for one
            example in an exported file, as `summarize` counts them within `exporting()`. The
            shape of an example is that which the model tells or, with calibration data, that of
            the first of them. A share of the MACs excludes a `scale`.
            `None` means 0.1 if neither `max_params` nor `max_error` nor a `rank` nor the ranks
            of some `layers` are given.
        max_params: the number of parameters to keep, instead of a `budget`; `None` for
            no such limit.
        max_error: the largest predicted error of a layer, instead of a `budget`; the plan
            is then the smallest that keeps to it. `None` for no such limit. The errors
            are relative: 0.1 means a root mean square error of a tenth.
        calibration_data: inputs of the model: an array, a dictionary of arrays, a list
            with an array for each of several inputs, or an iterable of batches, such as
            a `tf.data.Dataset`. Of a tuple of inputs and labels only the inputs count.
            With these data, the predicted errors are errors of each layer's output, weighed
            by what they do to the loss; with `None`, they are errors of its kernels. A warning
            says if the data are few, unlike what the normalization layers of the model were
            trained on, or so large that activations are saturated.
        rank: `"auto"`, or the rank of every layer, with near-square factors, where this
            rank saves anything. A rank excludes all limits.
        layers: the layers that may be rewritten; `None` for all layers. Paths (those of a
            plan, or `layer.path`), compiled regular expressions that are found in a path of
            a plan, layers, classes of layers, or functions that get a layer and return
            whether it may be rewritten; alone or in a list. The path of a layer that holds
            others, this layer and its class stand for the layers in it. Or a
            mapping from the paths of some layers to their rank, with near-square
            factors, or to `None`, which leaves the layer alone. If a layer has a rank there
            and no limit is given, all other layers are left alone.
        scale: what both output factors of each hidden layer are multiplied by: the
            paper's way to win back freedom. The layer has `scale**2` times the units,
            and the network the same outputs at first. A layer of a Sequential or
            Functional model is hidden if only layers that become bilinear get its
            outputs; layers between them must do the same to each channel. Other layers
            keep their width.
        low_rank: whether layers may get the factors of kernels of low rank. These are
            often nearest to a trained kernel, and fast to fit. Near-square factors can
            learn more where a network is trained on for long; but they have few terms,
            so near-square factors alone may not use up a large budget.
        exclude: layers that are left alone, chosen as `layers` are, but for the mapping;
            `None` for no such layers. It goes before `layers`.
            `exclude=[model.layers[0], model.layers[-1]]` keeps the first and the last layer.
        verbose: 1 shows on stderr, or in a notebook, how far the work is and how long it will
            take; 0 shows nothing. `"auto"` is 1 in a terminal and in a notebook, 0 elsewhere.

    Returns:
        A `RewritePlan`.

    Raises:
        ValueError: if an argument is not valid, if the model is not built, or if
            no plan keeps to the limit.
        TypeError: if the calibration data are neither arrays nor an iterable of batches.

    Example:

    >>> hidden = keras.layers.Dense(256, activation="relu", name="hidden")
    >>> model = keras.Sequential([keras.Input((64,)), hidden, keras.layers.Dense(10)])
    >>> plan = plan_rewrite(model, budget=0.25)
    >>> plan.parameters <= 0.25 * model.count_params()
    True
    """
    if isinstance(budget, RewritePlan):
        raise ValueError("The model has a plan already: give it to `rewrite_model`.")
    limits = Limits(budget, max_params, max_error)
    options = PlanOptions(limits, rank, layers, scale, low_rank, exclude)
    with shown(verbose):
        check_built(model)
        batches = model_batches(calibration_data, model)
        if batches is not None:
            warn_of_other_inputs(model, batches)
        return make_plan(model, options, batches)


def make_plan(model: keras.Model, options: PlanOptions, calibration_data=None) -> RewritePlan:
    """Plans which layers of a model become bilinear, with what factors and of what rank.

    Args:
        model: a built model.
        options: what the plan is asked for.
        calibration_data: see `plan_rewrite`.

    Raises:
        ValueError, TypeError: see `plan_rewrite`.
    """
    plan = survey(model)
    _choose_layers(model, plan, options)
    if options.chosen_ranks_only:
        for layer in _free_layers(plan).values():
            layer.skip()
    rank = options.fixed_rank
    if options.scale > 1:
        scale_hidden_layers(model, plan, options.scale, 1 if rank is None else rank)
    if rank is not None or options.chosen_ranks_only:
        if rank is not None:
            _set_ranks(plan, rank)
        predict_errors(model, plan, _pinned(plan), calibration_data)
        return plan
    candidates = _candidates(plan, options.low_rank)
    limits, other = options.limits, plan.other_parameters
    if "macs" in limits.resources:
        plan_macs(model, plan, {**_pinned(plan), **candidates}, calibration_data)
    check_reachable(plan, candidates, limits, other)
    small = without_too_large(plan, candidates, limits, other)
    for path, choices in candidates.items():
        # The fits of near-square factors take long. The others are kept for further limits.
        if calibration_data is not None:
            choices = [x for x in choices if x in small[path] or _is_low_rank(plan[path], x)]
        candidates[path] = choices
    predict_errors(model, plan, {**_pinned(plan), **candidates}, calibration_data)
    for path, choices in candidates.items():
        candidates[path] = [choice for choice in choices if choice in plan[path].errors]
    search(plan, candidates, limits, other)
    return plan


def _is_low_rank(layer, choice):
    return layer.with_factors(choice[0])[0].is_low_rank


def _pinned(plan) -> Candidates:
    """Factors and rank of each layer whose rank is given."""
    return {
        path: [layer.choice]
        for path, layer in plan.items()
        if layer.pinned and layer.choice is not None
    }


def check_plan_exists(model: keras.Model, options: PlanOptions) -> None:
    """Checks, without a look at the weights, that `make_plan` finds a plan.

    Raises:
        ValueError: if no plan keeps to the limit, or an option is not valid.
    """
    plan = survey(model)
    _choose_layers(model, plan, options)
    candidates = _candidates(plan, options.low_rank)
    if "macs" in options.limits.resources:
        plan_macs(model, plan, {**_pinned(plan), **candidates}, None)
    check_reachable(plan, candidates, options.limits, plan.other_parameters)


def _set_ranks(plan, rank):
    """Gives every free layer the same rank, where this saves anything."""
    for layer in _free_layers(plan).values():
        if layer.saves(rank):
            layer.rank = rank
        else:
            layer.skip("too small to gain at this rank")


def _free_layers(plan):
    """The layers that may be rewritten and whose rank is not given, by their paths."""
    return {
        path: layer
        for path, layer in plan.items()
        if layer.factorizations and not layer.reason and not layer.pinned
    }


def _candidates(plan: RewritePlan, low_rank: bool) -> Candidates:
    """`{path: [(factors, rank), ...]}` that the search chooses from."""
    candidates = {}
    for path, layer in _free_layers(plan).items():
        candidates[path] = [
            (factors, rank)
            for factors, ranks in _ranks_of_factors(layer, low_rank).items()
            for rank in ranks
            if layer.saves(rank, factors)
        ]
        if not candidates[path]:
            layer.skip("too small to gain")
    return candidates


def _ranks_of_factors(layer: LayerPlan, low_rank: bool) -> dict[Factors, list[int]]:
    """`{factors: ranks}` for a layer, whether these save anything or not."""
    kernel = layer.factorizations[0]
    own = kernel.input_factors, kernel.output_factors
    most = max(MOST_TERMS, MOST_UNKNOWNS // max(input_index(kernel).shape))
    ranks = {own: [rank for rank in rank_grid(RANKS_PER_OCTAVE) if rank <= most]}
    if low_rank and kernel.low_rank_factors and not layer.scaled:
        ranks[kernel.low_rank_factors] = rank_grid(LOW_RANKS_PER_OCTAVE)
    return ranks


def rank_grid(steps: int) -> list[int]:
    """Ranks in a geometric progression.

    Args:
        steps: how many ranks for each power of 2, as far as they are different integers.

    >>> rank_grid(2)[:8]
    [1, 2, 3, 4, 6, 8, 11, 16]
    """
    return sorted({round(2 ** (i / steps)) for i in range(14 * steps)})


def survey(model: keras.Model) -> RewritePlan:
    """The layers of a model, none of them planned to be rewritten yet.

    Raises:
        ValueError: if the model is not built.
    """
    check_built(model)
    tied = tied_variables(model)
    layers = [plan_layer(site, reason_to_leave(site, tied)) for site in walk(model)]
    return RewritePlan(
        layers, model.count_params() - sum(layer.full_parameters for layer in layers)
    )


def plan_layer(site: Site, reason: str = "") -> LayerPlan:
    """The plan of one layer, not yet to be rewritten.

    Args:
        site: the layer.
        reason: why the layer cannot be rewritten; empty if it can.
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


def _choose_layers(model: keras.Model, plan: RewritePlan, options: PlanOptions) -> None:
    """Leaves alone what the options do not allow, and sets the ranks that they give.

    Raises:
        ValueError: if a choice matches no layer, or a rank is not valid.
    """
    sites = [*walk(model)]
    layers: Any = options.layers
    excluded = choose(sites, check_choices("exclude", options.exclude or ()), "exclude")
    if isinstance(layers, Mapping):
        for path, rank in choose_ranks(sites, layers).items():
            if rank is None:
                excluded.add(path)
            elif path not in excluded:
                plan[path].rank = rank
    elif layers is not None:
        excluded |= plan.keys() - choose(sites, check_choices("layers", layers), "layers")
    for path in excluded:
        if not plan[path].reason:
            plan[path].skip()
