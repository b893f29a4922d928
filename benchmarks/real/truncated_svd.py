"""Truncated singular value decompositions of all kernels of a model, as a plan."""

from keras_bilinear import plan_rewrite


def truncated_svd_plan(model, parameters):
    """A plan of kernels that are products of two matrices, within a number of parameters.

    The ranks rise where a rank keeps most energy for its parameters. Without calibration data,
    `rewrite_model` makes such kernels by truncated singular value decompositions.
    """
    plan = plan_rewrite(model, max_params=parameters)
    ladders = {}  # of each layer: what it may become, from the smallest on
    for path, layer in plan.items():
        kernels = layer.factorizations
        factors = kernels[0].low_rank_factors if kernels else None
        ranks = sorted(rank for other, rank in layer.errors if other == factors)
        if ranks:
            layer.factors, layer.rank = factors, ranks[0]
            ladders[path] = [*ranks[1:], None]
        elif kernels:
            layer.skip()
    while ladders:
        gains = {}
        for path, ladder in ladders.items():
            layer = plan[path]
            error = 0.0 if ladder[0] is None else layer.errors[layer.factors, ladder[0]]
            added = layer.parameters_at(ladder[0]) - layer.parameters
            if plan.parameters + added <= parameters:
                gains[path] = (layer.error**2 - error**2) / added
        if not gains:
            break
        best = max(gains, key=gains.get)
        plan[best].rank = ladders[best].pop(0)
        if plan[best].rank is None:
            plan[best].skip("stays full")
            del ladders[best]
    return plan
