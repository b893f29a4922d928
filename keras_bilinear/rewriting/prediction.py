"""Predicted errors: what factors and a rank cost a layer, of its kernels or of its output."""

import functools
import math

import keras
import numpy as np

from keras_bilinear.data import count_examples, model_batches
from keras_bilinear.kronecker.nearest import remaining_energies
from keras_bilinear.layers.calibration import calibrations_of, collect
from keras_bilinear.layers.converter import converter_of
from keras_bilinear.progress import track
from keras_bilinear.rewriting.data_checks import warn_of_few_examples
from keras_bilinear.rewriting.layer_plan import Candidates
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.sensitivities import Sensitivities
from keras_bilinear.rewriting.sites import walk

# A fit of a near-square kernel takes long. It is tried where its estimated error, times this
# share, is below the error of kernels of low rank that are no larger.
HOPE = 0.8


def predict_errors(
    model: keras.Model, plan: RewritePlan, candidates: Candidates, calibration_data
) -> None:
    """Fills in the `errors` of each layer of a plan.

    With calibration data, ranks that take long to fit may be left out: see `HOPE`.

    Args:
        model: the full model.
        plan: its plan.
        candidates: what each layer may become.
        calibration_data: inputs of the model, or `None`, see `plan_rewrite`.
    """
    sites = {site.path: site.layer for site in walk(model)}
    ranks = {path: _by_factors(choices) for path, choices in candidates.items() if choices}
    for path, ranks_of_factors in _track_layers(plan, ranks, "predicting the error of"):
        _note_errors(plan[path], ranks_of_factors, functools.partial(_kernel_errors, sites[path]))
    batches = model_batches(calibration_data, model)
    if batches is None:
        return
    layers = {path: sites[path] for path in ranks}
    calibrations = calibrations_of(layers)
    layers = {path: layers[path] for path in calibrations}
    sensitivities, examples = Sensitivities(model, {}, batches), 0
    for batch in track(batches, "reading the calibration data"):
        examples += count_examples(batch)
        seen = collect(model, layers, batch)
        weights = sensitivities.add(calibrations, model, batch, seen)
        for path, calls in seen.items():
            for (inputs, options, _), of_call in zip(calls, weights[path], strict=True):
                calibrations[path].add(inputs, weights=of_call, **options)
    warn_of_few_examples(calibrations, examples)
    for path, calibration in _track_layers(plan, calibrations, "fitting"):
        # A layer that no batch reaches keeps the errors of its kernels.
        if calibration.has_examples():
            _note_fitted_errors(plan[path], ranks[path], calibration, examples)


def _track_layers(plan, items, description):
    """Yields the items of a dictionary by paths, and shows how far they are."""
    return track(
        items.items(),
        description,
        name=lambda item: item[0],
        size=lambda item: plan[item[0]].full_parameters,
    )


def _by_factors(choices):
    """`{factors: ranks}` of pairs of factors and a rank."""
    ranks = {}
    for factors, rank in choices:
        ranks.setdefault(factors, []).append(rank)
    return ranks


def _note_errors(layer, ranks_of_factors, predict):
    """Fills in the errors of a layer for `{factors: ranks}`."""
    for factors, ranks in ranks_of_factors.items():
        errors, losses = predict(layer.with_factors(factors), ranks)
        layer.errors.update({(factors, rank): error for rank, error in errors.items()})
        layer.losses.update({(factors, rank): loss for rank, loss in losses.items()})


def _note_fitted_errors(layer, ranks_of_factors, calibration, examples):
    """Fills in the errors of a layer's outputs, without ranks that cannot be the best choice.

    Kernels of low rank are fast to fit, so they come first. Near-square kernels are fitted only
    where they may be ahead of them, as far as an estimate tells.
    """

    def predict(factorizations, ranks):
        errors, losses = calibration.errors(factorizations, ranks)
        return errors, {rank: loss / examples for rank, loss in losses.items()}

    kernels = {factors: layer.with_factors(factors)[0] for factors in ranks_of_factors}
    for factors in sorted(kernels, key=lambda factors: not kernels[factors].is_low_rank):
        ranks = ranks_of_factors[factors]
        if not kernels[factors].is_low_rank and len(kernels) > 1:
            estimates = calibration.estimated_errors(layer.with_factors(factors), ranks)
            ahead = [
                rank
                for rank in ranks
                if _least_error(layer, layer.parameters_at(rank, factors), factors)
                > HOPE * estimates[rank]
            ]
            for rank in {*ranks} - {*ahead}:
                del layer.errors[factors, rank]
            ranks = ahead
        if ranks:
            _note_errors(layer, {factors: ranks}, predict)


def _least_error(layer, size, factors):
    """The least error of other factors that take no more parameters; infinite if none do."""
    return min(
        (
            error
            for (other_factors, rank), error in layer.errors.items()
            if other_factors != factors and layer.parameters_at(rank, other_factors) <= size
        ),
        default=math.inf,
    )


def _kernel_errors(layer, factorizations, ranks):
    """`{rank: error}` of the kernels of a full layer: root mean square over them, relative.

    A second dictionary, of losses, stays empty.
    """
    blocks = converter_of(layer).kernels(layer)
    left, total = np.zeros(max(ranks) + 1), 0.0
    for kernels, factorization in zip(blocks.values(), factorizations, strict=True):
        energies = remaining_energies(kernels, factorization, max(ranks))
        # Each kernel counts the same, whatever its size.
        left += energies / energies[0] if energies[0] else 0
        total += 1
    return {rank: float(np.sqrt(left[rank] / total)) for rank in ranks}, {}
