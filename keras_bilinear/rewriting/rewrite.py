"""Whole models: full layers become bilinear ones as a plan says, and the other way round."""

import dataclasses
from collections.abc import Iterable, Mapping

import keras
from absl import logging

from keras_bilinear.data import model_batches
from keras_bilinear.keras_private.cloning import copy_model
from keras_bilinear.keras_private.graph import all_layers
from keras_bilinear.keras_private.surgery import refresh, replace_in_place, restore, snapshot
from keras_bilinear.keras_private.training import compile_alike
from keras_bilinear.kronecker.factorization import check_positive_int
from keras_bilinear.layers.calibration import calibrations_of, collect
from keras_bilinear.layers.converter import converter_of, full_converter, is_bilinear
from keras_bilinear.rewriting.owners import drop_replacement, store_replacement
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.planner import plan_layer, plan_rewrite
from keras_bilinear.rewriting.sites import (
    Site,
    check_built,
    is_leaf,
    reason_to_leave,
    tied_variables,
    walk,
)
from keras_bilinear.rewriting.widen import give_weights, hidden_layers, widen

# The layers are fitted in at most so many groups, for each of which the
# calibration data run through both models.
MOST_PASSES = 24


def rewrite_model(
    model: keras.Model,
    plan: RewritePlan | None = None,
    calibration_data=None,
    budget: float | None = None,
    max_params: int | None = None,
    max_error: float | None = None,
    rank: int | str = "auto",
    layers: Iterable[str] | Mapping[str, int | None] | None = None,
    scale: int = 1,
    low_rank: bool = True,
) -> keras.Model:
    """Makes a smaller model from a trained one.

    Args:
        model: a built model. It is left untouched.
        plan: what `plan_rewrite` made of the model, or `None` to call it with
            the other arguments.
        calibration_data: inputs of the model, see `plan_rewrite`. The layers are
            fitted one after the other, such that each answers to what it gets
            from those before it as the full model would.
        budget, max_params, max_error, rank, layers, scale, low_rank: see
            `plan_rewrite`.

    Returns:
        A new model with the same names, weights and losses, whose planned
        layers are bilinear. Its optimizer starts anew. It is not compiled, and a
        warning says so, where the optimizer or a metric cannot be made again from
        its configuration.

    Raises:
        ValueError: if an argument is not valid, if the plan is not one of this
            model, if weights or calibration data are not finite, or if the model
            cannot be copied.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(256)])
    >>> small = rewrite_model(model, budget=0.1, calibration_data=np.random.rand(500, 64))
    >>> small.count_params() <= 0.1 * model.count_params()
    True
    """
    given = (budget, max_params, max_error, rank, layers, scale, low_rank)
    if plan is not None and given != (None, None, None, "auto", None, 1, True):
        raise ValueError("A plan and arguments for making one exclude each other.")
    check_built(model)
    batches = model_batches(calibration_data, model)
    if plan is None:
        plan = plan_rewrite(
            model, budget, max_params, max_error, batches, rank, layers, scale, low_rank
        )
    _check_plan(model, plan)
    small = copy_model(model)
    # Layers without a name of their own have another one in the copy.
    sites = [
        dataclasses.replace(site, path=full.path)
        for full, site in zip(walk(model), walk(small), strict=True)
    ]
    rewrite_layers(small, sites, plan, batches)
    scales = {
        path: (layer.input_scale, layer.scale)
        for path, layer in plan.items()
        if layer.scaled and layer.factorizations
    }
    if scales:
        small = widen(small, scales, hidden_layers(model))
    return _finish(small, model)


def rewrite_layers(
    model: keras.Model, sites: Iterable[Site], plan: RewritePlan, batches: Iterable | None = None
) -> None:
    """Makes layers of a model bilinear, in place. If one cannot be, all stay what they were.

    Args:
        model: the model.
        sites: its layers.
        plan: what becomes of them.
        batches: calibration data, see `rewrite_model`.

    Raises:
        ValueError, RuntimeError: if a layer cannot be rewritten.
    """
    sites = [site for site in sites if site.path in plan and plan[site.path].rank is not None]
    before, full = snapshot(all_layers(model)), []
    try:
        for group in _groups(sites, batches):
            calibrations = _calibrate(model, full, group, batches)
            full += snapshot(site.layer for site in group)
            for site in group:
                _make_bilinear(site, plan[site.path], calibrations.get(site.path))
            store_replacement(group)
    except BaseException:
        restore(before)
        raise
    refresh(model)


def _make_bilinear(site, plan, calibration):
    input_factors, output_factors = plan.factors
    try:
        bilinear = converter_of(site.layer).from_full(
            site.layer,
            calibration,
            rank=plan.rank,
            input_factors=input_factors,
            output_factors=output_factors,
        )
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        raise kind(f"The layer {site.path!r} cannot be rewritten. {error}") from error
    replace_in_place(site.layer, bilinear)


class Rewriter:
    """Rewrites the layers of a model that `keras.models.clone_model` clones.

    Other layers are cloned with their weights, which `clone_model` alone does
    not do.

    Args:
        plan: what `plan_rewrite` made of the model, without a `scale`, or the rank
            of every layer where it saves anything.

    Raises:
        ValueError: if it is neither.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    >>> small = keras.models.clone_model(model, clone_function=Rewriter(2))
    >>> model.count_params(), small.count_params()
    (4160, 320)
    """

    def __init__(self, plan: RewritePlan | int):
        if not isinstance(plan, RewritePlan):
            plan = check_positive_int("plan", plan)
        elif any(layer.scaled for layer in plan.values()):
            raise ValueError(
                "A plan with a scale changes shapes, which `clone_model` does not: use "
                "`rewrite_model`."
            )
        self.plan = plan

    def __call__(self, layer: keras.Layer) -> keras.Layer:
        if not isinstance(layer, keras.Layer):  # an operation, such as `keras.ops.relu`
            return layer
        if isinstance(layer, keras.Model):
            copy = copy_model(layer)
        else:
            copy = keras.layers.deserialize(keras.layers.serialize(layer))
            give_weights(copy, layer.get_weights())
        if is_leaf(copy):
            pairs = [(Site(layer.name, layer, ()), Site(layer.name, copy, ()))]
        else:
            pairs = [*zip(walk(layer), walk(copy), strict=True)]
            pairs = [
                (dataclasses.replace(site, path=f"{layer.name}/{site.path}"), mine)
                for site, mine in pairs
            ]
        tied = tied_variables(layer)
        replaced = [(mine, self._plan_of(site, tied)) for site, mine in pairs]
        replaced = [(mine, plan) for mine, plan in replaced if plan and plan.rank]
        for mine, plan in replaced:
            _make_bilinear(mine, plan, None)
        store_replacement(mine for mine, _ in replaced)
        refresh(copy)
        return copy

    def _plan_of(self, site, tied):
        """The plan of a layer; `None` if it stays what it is."""
        if isinstance(self.plan, RewritePlan):
            return self.plan.get(site.path)
        plan = plan_layer(site, reason_to_leave(site, tied))
        if plan.reason or not plan.saves(self.plan):
            return None
        plan.rank = self.plan
        return plan


def expand_model(model: keras.Model) -> keras.Model:
    """Makes a model of stock Keras layers from one with bilinear ones.

    Args:
        model: a built model. It is left untouched.

    Returns:
        A new model with the same outputs, which loads without this package.

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
    """Makes bilinear layers of a model full ones with the same outputs, in place.

    Args:
        model: the model.
        sites: its layers; those that are full already stay what they are.
    """
    sites = [site for site in sites if is_bilinear(site.layer)]
    for site in sites:
        replace_in_place(site.layer, site.layer.expand())
    drop_replacement(sites)
    refresh(model)


def _finish(copy, model):
    if model.compiled:
        try:
            compile_alike(copy, model)
        except Exception as error:  # whatever classes of the user raise
            logging.warning(
                "The new model %r is not compiled, as the optimizer or a metric of the given one "
                "cannot be made again: compile it. %s: %s",
                copy.name,
                type(error).__name__,
                error,
            )
    return copy


def _check_plan(model, plan):
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
                f"The layer {path!r} has a scale, or one before it has: it needs a rank. "
                f"Received: scale={layer.scale}, input_scale={layer.input_scale}, rank=None"
            )


def _groups(sites, batches):
    """The layers in the order of the model, those together that are fitted at once."""
    if batches is None or not sites:
        return [sites] if sites else []
    size = -(-len(sites) // MOST_PASSES)
    return [sites[start : start + size] for start in range(0, len(sites), size)]


def _calibrate(model, full, group, batches):
    """`{path: Calibration}` of the layers of a group.

    They are full ones yet; `full` has the states of those before them, which
    are not.
    """
    if batches is None:
        return {}
    layers = {site.path: site.layer for site in group}
    calibrations = calibrations_of(layers)
    layers = {path: layers[path] for path in calibrations}
    for batch in batches:
        seen = collect(model, layers, batch)
        rewritten = snapshot(layer for layer, *_ in full)
        restore(full)
        try:
            seen_full = collect(model, layers, batch)
        finally:
            restore(rewritten)
        for path, calibration in calibrations.items():
            for (inputs, options), (full_inputs, _) in zip(
                seen[path], seen_full[path], strict=True
            ):
                calibration.add(inputs, full_inputs, **options)
    return {path: one for path, one in calibrations.items() if one.has_examples()}
