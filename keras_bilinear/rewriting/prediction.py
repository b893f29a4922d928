"""The errors that a plan is made by."""

import functools

import numpy as np

from keras_bilinear.data import model_batches
from keras_bilinear.kronecker.nearest import input_index, remaining_energies
from keras_bilinear.layers.calibration import calibrations_of, collect
from keras_bilinear.layers.converter import converter_of
from keras_bilinear.rewriting.sites import (
    walk,
)

# Near-square kernels whose linear systems are larger are fitted only where the smaller ones
# are not behind kernels of low rank of the same size.
FEW_UNKNOWNS = 512


def predict_errors(model, plan, candidates, calibration_data):
    """Fills in `errors` of each layer, for `{path: [(factors, rank), ...]}`."""
    sites = {site.path: site.layer for site in walk(model)}
    candidates = {path: _by_factors(pairs) for path, pairs in candidates.items() if pairs}
    for path, choices in candidates.items():
        _note_errors(plan[path], choices, functools.partial(_kernel_errors, sites[path]))
    batches = model_batches(calibration_data, model)
    if batches is None:
        return
    layers = {path: sites[path] for path in candidates}
    calibrations = calibrations_of(layers)
    layers = {path: layers[path] for path in calibrations}
    for batch in batches:
        for path, calls in collect(model, layers, batch).items():
            for inputs, options in calls:
                calibrations[path].add(inputs, **options)
    for path, calibration in calibrations.items():
        # A layer that no batch reaches keeps the errors of its kernels.
        if calibration.has_examples():
            _note_fitted_errors(plan[path], candidates[path], calibration)


def _by_factors(pairs):
    """`{factors: ranks}` of pairs of them."""
    choices = {}
    for factors, rank in pairs:
        choices.setdefault(factors, []).append(rank)
    return choices


def _note_errors(layer, choices, predict):
    for factors, ranks in choices.items():
        errors = predict(layer.with_factors(factors), ranks)
        layer.errors.update({(factors, rank): error for rank, error in errors.items()})


def _note_fitted_errors(layer, choices, calibration):
    """As `_note_errors`, but for ranks that take long to fit and are going to be behind."""
    choices = {factors: (layer.with_factors(factors), ranks) for factors, ranks in choices.items()}
    for factors, (kernels, ranks) in sorted(
        choices.items(), key=lambda choice: not choice[1][0][0].is_low_rank
    ):
        first, *_ = kernels
        few = ranks
        if not first.is_low_rank:
            few = [r for r in ranks if r * max(input_index(first).shape) <= FEW_UNKNOWNS]
        many = [rank for rank in ranks if rank not in few]
        if few:
            _note_errors(layer, {factors: few}, calibration.errors)
        if many and few and _is_behind(layer, factors, few[-1]):
            for rank in many:
                del layer.errors[factors, rank]
        elif many:
            _note_errors(layer, {factors: many}, calibration.errors)


def _is_behind(layer, factors, rank):
    """Whether other factors have a smaller error and take no more parameters."""
    size, error = layer.parameters_at(rank, factors), layer.errors[factors, rank]
    return any(
        one != factors and other_error < error and layer.parameters_at(other, one) <= size
        for (one, other), other_error in layer.errors.items()
    )


def _kernel_errors(layer, factorizations, ranks):
    """`{rank: error}` of the kernels of a full layer."""
    blocks = converter_of(layer).kernels(layer)
    left, total = np.zeros(max(ranks) + 1), 0.0
    for kernels, factorization in zip(blocks.values(), factorizations, strict=True):
        energies = remaining_energies(kernels, factorization, max(ranks))
        # Each kernel counts the same, whatever its size.
        left += energies / energies[0] if energies[0] else 0
        total += 1
    return {rank: float(np.sqrt(left[rank] / total)) for rank in ranks}
