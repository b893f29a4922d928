"""Whole models: replacing full layers by bilinear ones as a plan says, and expanding them."""

import contextlib
import dataclasses
import numbers
import os
from collections.abc import Iterable
from typing import Any, cast

import keras
from absl import logging

from keras_bilinear.data import count_examples, describe, model_batches
from keras_bilinear.keras_private.cloning import (
    by_hand,
    carry_attributes,
    carry_over,
    copy_flags,
    copy_layer,
    copy_model,
)
from keras_bilinear.keras_private.graph import all_layers
from keras_bilinear.keras_private.surgery import refresh, replace_in_place, restore, snapshot
from keras_bilinear.keras_private.training import compile_alike
from keras_bilinear.kronecker.factorization import check_positive_int
from keras_bilinear.layers.calibration import (
    Calibration,
    calibrations_of,
    collect,
)
from keras_bilinear.layers.converter import converter_of, full_converter, is_bilinear
from keras_bilinear.progress import check_verbose, shown, track, working
from keras_bilinear.rewriting import recovery
from keras_bilinear.rewriting.calls import check_calls
from keras_bilinear.rewriting.choice import Choices
from keras_bilinear.rewriting.data_checks import warn_of_few_examples, warn_of_other_inputs
from keras_bilinear.rewriting.layer_plan import LayerPlan
from keras_bilinear.rewriting.limits import Budget, LayerChoice, Limits, PlanOptions
from keras_bilinear.rewriting.owners import drop_replacement, store_replacement
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.planner import make_plan, plan_layer
from keras_bilinear.rewriting.sensitivities import Sensitivities
from keras_bilinear.rewriting.sites import (
    Site,
    check_built,
    is_leaf,
    reason_to_leave,
    tied_variables,
    walk,
)
from keras_bilinear.rewriting.widen import give_weights, hidden_layers, widen

# The layers are fitted in at most so many groups. For each group the calibration data run
# through both models.
MOST_PASSES = 24


def rewrite_model(
    model: keras.Model,
    plan: RewritePlan | float | None = None,
    calibration_data=None,
    budget: Budget | None = None,
    max_params: int | None = None,
    max_error: float | None = None,
    rank: int | str = "auto",
    layers: LayerChoice = None,
    scale: int = 1,
    low_rank: bool = True,
    exclude: Choices | None = None,
    recover: int = 0,
    verbose: int | str = "auto",
) -> keras.Model:
    """Makes a smaller model from a trained model.

    Args:
        model: a built model. It is left untouched.
        plan: the `RewritePlan` of the model, such as `plan_rewrite` makes it. It excludes
            all arguments below but `calibration_data`. `None` makes a plan by them. A number
            is the `budget`, as for `plan_rewrite`.
        calibration_data: inputs of the model: an array, a dictionary of arrays, a list
            with an array for each of several inputs, or an iterable of batches, such as
            a `tf.data.Dataset`. Of a tuple of inputs and labels only the inputs count.
            With these data, the layers are fitted one after the other: from the outputs
            of the layers before it, each layer makes what the full model makes. Errors are
            weighed by what they do to the outputs of the model, see `plan_rewrite`. With
            `None`, each kernel is replaced by the nearest bilinear kernel, which may ruin
            a trained model.
        budget: the share of the model's parameters to keep, above 0 and at most 1; or a
            mapping with shares of `"parameters"` and `"macs"`, see `plan_rewrite`.
            `None` means 0.1 if neither a plan nor `max_params` nor `max_error` nor a `rank`
            nor the ranks of some `layers` are given.
        max_params: the number of parameters to keep, instead of a `budget`; `None` for
            no such limit.
        max_error: the largest predicted error of a layer, relative, instead of a
            `budget`; the model is then the smallest that keeps to it. `None` for no such
            limit.
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
        scale: what both output factors of each hidden layer are multiplied by. The layer
            has `scale**2` times the units, and the model the same outputs at first. A
            layer of a Sequential or Functional model is hidden if only layers that become
            bilinear get its outputs.
        low_rank: whether layers may get the factors of kernels of low rank: two plain
            layers, one after the other. These are often nearest to a trained kernel, and
            fast to fit. Near-square factors can learn more where the model is trained on
            for long.
        exclude: layers that are left alone, chosen as `layers` are, but for the mapping;
            `None` for no such layers. It goes before `layers`.
            `exclude=[model.layers[0], model.layers[-1]]` keeps the first and the last layer.
        recover: the number of epochs for which the new model learns the outputs of `model`, from
            the calibration data and without labels, see `recover`. 0 does not train it.
        verbose: 1 shows on stderr, or in a notebook, how far the work is and how long it will
            take; 0 shows nothing. `"auto"` is 1 in a terminal and in a notebook, 0 elsewhere.

    Returns:
        A new model with the same names, weights and losses, whose planned
        layers are bilinear. Its optimizer starts anew. Where the optimizer or a metric
        cannot be made again from its configuration, the model is not compiled, and a
        warning says so. Attributes that you set on the model or a layer are copied if they are
        plain values; a warning names the others.

    Raises:
        ValueError: if an argument is not valid, if the plan was made for another model,
            if no plan keeps to the limit, if weights or calibration data are not
            finite, if the model cannot be copied, or if a layer of your own cannot be called
            once layers are bilinear, as it reads their weights.
        TypeError: if the calibration data are neither arrays nor an iterable of batches.
        RuntimeError: if a layer cannot be rewritten for another reason.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(256)])
    >>> small = rewrite_model(model, budget=0.1, calibration_data=np.random.rand(500, 64))
    >>> small.count_params() <= 0.1 * model.count_params()
    True
    """
    if isinstance(plan, numbers.Real):
        if budget is not None:
            raise ValueError(
                f"The budget is given twice. Received: {describe(plan)} and budget={budget!r}"
            )
        plan, budget = None, cast(float, plan)
    if plan is not None and not isinstance(plan, RewritePlan):
        raise _no_plan(plan)
    limits = Limits(budget, max_params, max_error)
    options = PlanOptions(limits, rank, layers, scale, low_rank, exclude)
    if plan is not None and options != PlanOptions():
        raise ValueError("A plan and arguments for making one exclude each other.")
    with shown(verbose):
        return _rewrite(model, plan, options, calibration_data, recover)


def _rewrite(model, plan, options, calibration_data, recover):
    """What `rewrite_model` returns, for a plan or else for options."""
    check_built(model)
    if recover:
        check_positive_int("recover", recover)
        recovery.check_recovery(model, "model")
        if calibration_data is None:
            raise ValueError(f"`recover` needs calibration data. Received: recover={recover!r}")
    batches = model_batches(calibration_data, model)
    if batches is not None:
        warn_of_other_inputs(model, batches)
    planned_before = plan is not None
    if plan is None:
        plan = make_plan(model, options, batches)
    small = rewrite_by_plan(model, plan, batches, warn=planned_before)
    if not recover:
        return small
    with working("recovering"):
        return recovery.recover(small, model, batches, recover, verbose=0)


def rewrite_by_plan(
    model: keras.Model, plan: RewritePlan, batches: Iterable | None, warn: bool
) -> keras.Model:
    """Makes a smaller model as a plan says.

    Args:
        model: a built model.
        plan: its plan.
        batches: calibration data as batches, or `None`, see `rewrite_model`.
        warn: whether few calibration data are reported, as planning does it.

    Raises:
        ValueError, RuntimeError: see `rewrite_model`.
    """
    _check_plan(model, plan)
    small = copy_model(model)
    # Layers without a name of their own have another name in the copy.
    sites = [
        dataclasses.replace(site, path=full.path)
        for full, site in zip(walk(model), walk(small), strict=True)
    ]
    rewrite_layers(small, sites, plan, batches, warn)
    scales = {
        path: (layer.input_scale, layer.scale)
        for path, layer in plan.items()
        if layer.scaled and layer.factorizations
    }
    if scales:
        small = widen(small, scales, hidden_layers(model))
    return _finish(small, model)


def rewrite_layers(
    model: keras.Model,
    sites: Iterable[Site],
    plan: RewritePlan,
    batches: Iterable | None = None,
    warn: bool = False,
) -> None:
    """Makes layers of a model bilinear, in place. If a layer cannot be, none is changed.

    Args:
        model: the model.
        sites: layers of the model. Layers without a rank in the plan stay what they are.
        plan: what each layer becomes.
        batches: calibration data as batches, or `None`, see `rewrite_model`.
        warn: whether few calibration data are reported, as planning does it.

    Raises:
        ValueError, RuntimeError: if a layer cannot be rewritten, or if a layer of the user's
            cannot be called any more.
    """
    sites = [site for site in sites if site.path in plan and plan[site.path].rank is not None]
    check_calls(model, [(site, plan[site.path]) for site in sites], batches)
    before, full, used = snapshot(all_layers(model)), [], {}
    sensitivities = None
    if batches is not None:
        layers = {site.path: site.layer for site in sites}
        sensitivities = Sensitivities(model, layers, batches)
    try:
        for group in track(
            _groups(sites, batches),
            "rewriting",
            _names,
            lambda group: sum(plan[site.path].full_parameters for site in group),
        ):
            calibrations = _calibrate(model, full, group, batches, sensitivities)
            used |= calibrations
            full += snapshot(site.layer for site in group)
            for site in track(group, "fitting", lambda site: site.path):
                _make_bilinear(site, plan[site.path], calibrations.get(site.path))
            store_replacement(group)
    except BaseException:
        restore(before)
        raise
    refresh(model)
    if warn and batches is not None:
        warn_of_few_examples(used, sum(map(count_examples, batches)))


def _make_bilinear(site: Site, plan: LayerPlan, calibration: Calibration | None) -> None:
    """Makes a full layer bilinear, in place.

    Raises:
        ValueError, RuntimeError: if it cannot be, with the path of the layer.
    """
    try:
        bilinear = converter_of(site.layer).from_full(site.layer, calibration, **plan.arguments)
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        raise kind(f"The layer {site.path!r} cannot be rewritten. {error}") from error
    _replace(site.layer, bilinear)


def _replace(layer: keras.Layer, other: keras.Layer) -> None:
    """Turns a layer into another layer, in place. Attributes that were set by hand stay."""
    kept: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # a class of the user's may have no configuration
        kept = by_hand(layer, type(layer).from_config(layer.get_config()))
    replace_in_place(layer, other)
    for name, value in kept.items():
        is_state = isinstance(value, keras.Variable | keras.Layer)
        # A method that was set by hand is one of the other class.
        if not is_state and name not in vars(layer) and not callable(getattr(layer, name, None)):
            setattr(layer, name, value)


class Rewriter:
    """Makes `keras.models.clone_model` clone a model with bilinear layers.

    Pass it as the `clone_function`. Layers that are not rewritten are cloned with their
    weights, which `clone_model` alone does not do. Rewritten layers get the kernels nearest to
    the full ones; `rewrite_model` can fit them to calibration data instead.

    Args:
        plan: the `RewritePlan` of the model, such as `plan_rewrite` makes it, without a
            `scale`. Or a positive integer: the rank of every layer, with near-square
            factors, where this rank saves anything.
        verbose: 1 shows on stderr, or in a notebook, which layer is under way; 0 shows
            nothing. `"auto"` is 1 in a terminal and in a notebook, 0 elsewhere.

    Raises:
        ValueError: if `plan` is neither, if the plan has a scale, or if `verbose` is not
            valid. In `clone_model`, if a layer cannot be rewritten, or if a layer of your own
            cannot be called once layers in it are bilinear, as it reads their weights.
        RuntimeError: in `clone_model`, if a layer cannot be rewritten for another reason.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    >>> small = keras.models.clone_model(model, clone_function=Rewriter(2))
    >>> model.count_params(), small.count_params()
    (4160, 320)
    """

    def __init__(self, plan: RewritePlan | int, verbose: int | str = "auto"):
        check_verbose(verbose)
        if not isinstance(plan, RewritePlan):
            plan = check_positive_int("plan", plan)
        elif any(layer.scaled for layer in plan.values()):
            raise ValueError(
                "A plan with a scale changes shapes, which `clone_model` does not: use "
                "`rewrite_model`."
            )
        self.plan, self.verbose = plan, verbose

    def __call__(self, layer: keras.Layer) -> keras.Layer:
        if not isinstance(layer, keras.Layer):  # an operation, such as `keras.ops.relu`
            return layer
        if isinstance(layer, keras.Model):
            copy = copy_model(layer)
        else:
            copy = copy_layer(layer)
            give_weights(copy, layer.get_weights())
            copy_flags(layer, copy)
            carry_over(layer, copy)
        if is_leaf(copy):
            pairs = [(Site(layer.name, layer, ()), Site(layer.name, copy, ()))]
        else:
            pairs = []
            for pair in zip(walk(layer), walk(copy), strict=True):
                path = f"{layer.name}/{pair[0].path}"
                pairs.append([dataclasses.replace(site, path=path) for site in pair])
        tied = tied_variables(layer)
        plans = [(cloned, self._plan_of(site, tied)) for site, cloned in pairs]
        replaced = [(cloned, plan) for cloned, plan in plans if plan and plan.rank]
        if not is_leaf(copy):
            check_calls(copy, replaced, full=layer)
        with shown(self.verbose):
            for cloned, plan in track(replaced, "rewriting", lambda pair: pair[0].path):
                _make_bilinear(cloned, plan, None)
        store_replacement(cloned for cloned, _ in replaced)
        refresh(copy)
        return copy

    def _plan_of(self, site, tied):
        """The plan of a layer; `None` if the layer is left alone."""
        if isinstance(self.plan, RewritePlan):
            return self.plan.get(site.path)
        plan = plan_layer(site, reason_to_leave(site, tied))
        if plan.reason or not plan.saves(self.plan):
            return None
        plan.rank = self.plan
        return plan


def expand_model(model: keras.Model) -> keras.Model:
    """Makes a model of stock Keras layers from a model with bilinear layers.

    Args:
        model: a built model. It is left untouched.

    Returns:
        A new model with the same outputs, which loads without this package. Its optimizer
        starts anew. Where the optimizer or a metric cannot be made again from its
        configuration, the model is not compiled, and a warning says so.

    Raises:
        ValueError: if the model cannot be copied.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), BilinearDense(256)])
    >>> [type(layer).__name__ for layer in expand_model(model).layers]
    ['Dense']
    """
    full = copy_model(model)
    expand_layers(full, walk(full))
    return _finish(full, model)


def expand_layers(model: keras.Model, sites: Iterable[Site]) -> None:
    """Replaces bilinear layers of a model by full layers with the same outputs, in place.

    Args:
        model: the model.
        sites: its layers. Full layers stay what they are.
    """
    sites = [site for site in sites if is_bilinear(site.layer)]
    for site in sites:
        _replace(site.layer, site.layer.expand())
    drop_replacement(sites)
    refresh(model)


def _finish(copy: keras.Model, model: keras.Model) -> keras.Model:
    """Compiles a new model as the given model is, or warns that this cannot be done."""
    if model.compiled:
        try:
            compile_alike(copy, model)
        except Exception as error:  # whatever classes of the user raise
            logging.warning(
                "The new model %r is not compiled, as the optimizer or a metric of the given model "
                "cannot be made again: compile it. %s: %s",
                copy.name,
                type(error).__name__,
                error,
            )
        # Some classes set attributes of their own when they are compiled.
        carry_attributes(model, copy)
    return copy


def _no_plan(value) -> ValueError:
    """The error for what is given in place of a plan."""
    hint = "give it as calibration_data="
    if isinstance(value, str | os.PathLike):
        hint = "read its text with RewritePlan.from_json"
    return ValueError(
        f"`plan` must be a RewritePlan or a budget. That is no plan: {hint}. "
        f"Received: {describe(value)}"
    )


def _check_plan(model: keras.Model, plan: RewritePlan) -> None:
    """Checks that a plan was made for a model, and that its edits are valid.

    Raises:
        ValueError: if not.
    """
    found = {site.path: site.layer for site in walk(model)}
    for path, layer in plan.items():
        if path not in found or type(found[path]).__name__ != layer.type:
            raise ValueError(
                f"The plan is not one of the model {model.name!r}, which has no {layer.type} "
                f"{path!r}."
            )
        if layer.full_parameters != (found[path].count_params() if found[path].built else 0):
            raise ValueError(
                f"The plan is not one of the model {model.name!r}, whose layer {path!r} has "
                f"{found[path].count_params():,} parameters, and not {layer.full_parameters:,}."
            )
        if layer.rank is not None and not full_converter(type(found[path])):
            raise ValueError(f"The layer {path!r} cannot be rewritten: {layer.reason}.")
        most = max((kernel.sufficient_rank for kernel in layer.factorizations), default=0)
        if layer.rank is not None and layer.rank > most and not layer.scaled:
            raise ValueError(
                f"The rank of the layer {path!r} must be at most {most}, at which its kernels are "
                f"stored exactly. Received: rank={layer.rank}"
            )
        if layer.scaled and layer.factorizations and layer.rank is None:
            raise ValueError(
                f"The layer {path!r} or a layer before it has a scale, so {path!r} needs a rank. "
                f"Received: scale={layer.scale}, input_scale={layer.input_scale}, rank=None"
            )


def _groups(sites, batches):
    """The layers in the order of the model, in groups that are fitted at once."""
    if batches is None or not sites:
        return [sites] if sites else []
    size = -(-len(sites) // MOST_PASSES)
    return [sites[start : start + size] for start in range(0, len(sites), size)]


def _names(group):
    """The names of the layers of a group, in a few words."""
    first, last = group[0].path, group[-1].path
    return first if len(group) == 1 else f"{first} to {last}"


def _calibrate(model, full, group, batches, sensitivities):
    """`{path: Calibration}` of the layers of a group.

    Args:
        model: the model, in which the layers of the group are still full.
        full: the states of the full layers that were already replaced, as `snapshot` made
            them.
        group: the sites of the layers.
        batches: the calibration data, or `None`.
        sensitivities: what the loss of the full model feels; `None` without data.
    """
    if batches is None:
        return {}
    layers = {site.path: site.layer for site in group}
    calibrations = calibrations_of(layers)
    layers = {path: layers[path] for path in calibrations}
    sensitivities.share(calibrations)
    for batch in track(batches, "reading the calibration data"):
        seen = seen_full = collect(model, layers, batch)
        rewritten = snapshot(layer for layer, *_ in full)
        restore(full)
        try:
            if full:
                seen_full = collect(model, layers, batch)
            weights = sensitivities.weights(model, layers, batch, seen_full)
        finally:
            restore(rewritten)
        for path, calibration in calibrations.items():
            calls = zip(seen[path], seen_full[path], weights[path], strict=True)
            for (inputs, options, _), (full_inputs, *_), of_call in calls:
                calibration.add(inputs, full_inputs, of_call, **options)
    return {
        path: calibration
        for path, calibration in calibrations.items()
        if calibration.has_examples()
    }
