"""Hidden layers of a plan that get more units: what both factors are multiplied by."""

import dataclasses

import keras

from keras_bilinear.kronecker.factorization import exact_factors
from keras_bilinear.rewriting.layer_plan import LayerPlan
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.widen import hidden_layers


def scale_hidden_layers(model: keras.Model, plan: RewritePlan, scale: int, rank: int) -> None:
    """Scales each hidden layer where it and the layers behind it still save parameters.

    Args:
        model: the model.
        plan: its plan, which is changed.
        scale: what both output factors of a hidden layer are multiplied by.
        rank: the rank at which all of these layers store fewer numbers than in full.

    Raises:
        ValueError: if the model has no graph.
    """
    for name, hidden in hidden_layers(model).items():
        if not all(_can_be_rewritten(plan, path) for path in (name, *hidden.consumers)):
            continue
        factors = exact_factors(plan[name].factorizations[0].output_dim)
        if factors is None:
            continue
        scaled = [_with_scaled_outputs(plan[name], factors, scale)]
        for path, positions in hidden.consumers.items():
            inputs = positions * factors[0], factors[1]
            scaled.append(_with_scaled_inputs(plan[path], inputs, scale))
        if not all(layer.saves(rank) for layer in scaled):
            continue
        for new in scaled:
            layer = plan[new.path]
            layer.factorizations = new.factorizations
            layer.scale, layer.input_scale = new.scale, new.input_scale
        for path in hidden.normalizations:
            plan[path].scale = scale


def _can_be_rewritten(plan, path):
    return path in plan and bool(plan[path].factorizations) and not plan[path].reason


def _with_scaled_outputs(layer: LayerPlan, factors: tuple, scale: int) -> LayerPlan:
    """The plan of a hidden layer with these output factors and this scale."""
    kernel, *recurrent = layer.factorizations
    return dataclasses.replace(
        layer,
        scale=scale,
        factorizations=[
            dataclasses.replace(kernel, output_factors=factors),
            # A recurrent kernel gets the layer's own outputs.
            *(
                dataclasses.replace(other, input_factors=factors, output_factors=factors)
                for other in recurrent
            ),
        ],
    )


def _with_scaled_inputs(layer: LayerPlan, factors: tuple, scale: int) -> LayerPlan:
    """The plan of a layer behind a hidden layer, with these input factors and input scale."""
    kernel, *recurrent = layer.factorizations
    kernel = dataclasses.replace(kernel, input_factors=factors)
    return dataclasses.replace(layer, input_scale=scale, factorizations=[kernel, *recurrent])
