"""Predicted errors: what factors and a rank cost a layer, of its kernels or of its output."""

import functools

import keras
import numpy as np

from keras_bilinear.data import count_examples, model_batches
from keras_bilinear.kronecker.nearest import input_index, remaining_energies
from keras_bilinear.layers.calibration import calibrations_of, collect
from keras_bilinear.layers.converter import converter_of
from keras_bilinear.rewriting.data_checks import warn_of_few_examples
from keras_bilinear.rewriting.plan import Candidates, RewritePlan
from keras_bilinear.rewriting.sites import walk

# Near-square kernels whose linear systems have more unknowns take long to fit. They are fitted
# only where near-square kernels of lower rank are not behind kernels of low rank of their size.
FEW_UNKNOWNS = 512


def predict_errors(
    model: keras.Model, plan: RewritePlan, candidates: Candidates, calibration_data
) -> None:
    """Fills in the `errors` of each layer of a plan.

    With calibration data, ranks that take long to fit may be left out: see `FEW_UNKNOWNS`.

    Args:
        model: the full model.
        plan: its plan.
        candidates: what each layer may become.
        calibration_data: inputs of the model, or `None`, see `plan_rewrite`.
    """
    sites = {site.path: site.layer for site in walk(model)}
    ranks = {path: _by_factors(choices) for path, choices in candidates.items() if choices}
    for path, ranks_of_factors in ranks.items():
        _note_errors(plan[path], ranks_of_factors, functools.partial(_kernel_errors, sites[path]))
    batches = model_batches(calibration_data, model)
    if batches is None:
        return
    layers = {path: sites[path] for path in ranks}
    calibrations = calibrations_of(layers)
    layers = {path: layers[path] for path in calibrations}
    examples = 0
    for batch in batches:
        examples += count_examples(batch)
        for path, calls in collect(model, layers, batch).items():
            for inputs, options in calls:
                calibrations[path].add(inputs, **options)
    warn_of_few_examples(calibrations, examples)
    for path, calibration in calibrations.items():
        # A layer that no batch reaches keeps the errors of its kernels.
        if calibration.has_examples():
            _note_fitted_errors(plan[path], ranks[path], calibration)


def _by_factors(choices):
    """`{factors: ranks}` of pairs of factors and a rank."""
    ranks = {}
    for factors, rank in choices:
        ranks.setdefault(factors, []).append(rank)
    return ranks


def _note_errors(layer, ranks_of_factors, predict):
    """Fills in the errors of a layer for `{factors: ranks}`."""
    for factors, ranks in ranks_of_factors.items():
        errors = predict(layer.with_factors(factors), ranks)
        layer.errors.update({(factors, rank): error for rank, error in errors.items()})


def _note_fitted_errors(layer, ranks_of_factors, calibration):
    """Fills in the errors of a layer's outputs, without ranks that cannot be the best choice.

    Kernels of low rank are fast to fit, so they come first. Near-square kernels that take long
    to fit are left out where near-square kernels of lower rank are already behind.
    """
    kernels = {factors: layer.with_factors(factors)[0] for factors in ranks_of_factors}
    for factors in sorted(kernels, key=lambda factors: not kernels[factors].is_low_rank):
        kernel, ranks = kernels[factors], ranks_of_factors[factors]
        few = ranks
        if not kernel.is_low_rank:
            unknowns = max(input_index(kernel).shape)
            few = [rank for rank in ranks if rank * unknowns <= FEW_UNKNOWNS]
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
        other_factors != factors
        and other_error < error
        and layer.parameters_at(other_rank, other_factors) <= size
        for (other_factors, other_rank), other_error in layer.errors.items()
    )


def _kernel_errors(layer, factorizations, ranks):
    """`{rank: error}` of the kernels of a full layer: root mean square over them, relative."""
    blocks = converter_of(layer).kernels(layer)
    left, total = np.zeros(max(ranks) + 1), 0.0
    for kernels, factorization in zip(blocks.values(), factorizations, strict=True):
        energies = remaining_energies(kernels, factorization, max(ranks))
        # Each kernel counts the same, whatever its size.
        left += energies / energies[0] if energies[0] else 0
        total += 1
    return {rank: float(np.sqrt(left[rank] / total)) for rank in ranks}
