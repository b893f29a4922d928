"""Whether a model can still be called once layers of it are bilinear.

A layer of the user's may read the weights of a layer that it holds, such as `dense.weights[0]`.
"""

from collections.abc import Iterable, Sequence

import keras

from keras_bilinear.keras_private.graph import all_layers
from keras_bilinear.keras_private.surgery import replace_in_place, restore, snapshot
from keras_bilinear.keras_private.symbolic import find_failure, known_inputs
from keras_bilinear.layers.converter import converter_of
from keras_bilinear.rewriting.layer_plan import LayerPlan
from keras_bilinear.rewriting.owners import Rewritten
from keras_bilinear.rewriting.sites import Site

# Their layers read no weights of other layers but those that a rewrite leaves alone.
_TRUSTED = {"keras", "keras_bilinear"}


def check_calls(
    model: keras.Layer,
    plans: Sequence[tuple[Site, LayerPlan]],
    batches: Iterable | None = None,
    full: keras.Layer | None = None,
) -> None:
    """Checks that a model can be called once layers of it are bilinear. The model stays as it is.

    It costs nothing if all layers are those of Keras and of this package, and otherwise one call
    on symbolic inputs, with factors of any values.

    Args:
        model: a model, or another layer that holds layers, with full layers.
        plans: the layers that become bilinear, with their plans.
        batches: inputs of the model, as batches; `None` if there are none.
        full: a layer that `model` is a copy of, and that has been called; `None` if `model` has.

    Raises:
        ValueError: if a layer cannot be called that can be called as the model is.
    """
    if not plans or all(map(_is_trusted, all_layers(model))):
        return
    batch = None if batches is None else next(iter(batches), None)
    inputs, *_ = (None,) if batch is None else keras.utils.unpack_x_y_sample_weight(batch)
    for given in known_inputs(full or model, inputs):
        failure = _failure(model, plans, given)
        if failure is None:
            return
        if find_failure(full or model, given) is None:
            failed, error = failure
            raise ValueError(_text(model, plans, failed, error)) from error


def _failure(model, plans, inputs):
    """What `find_failure` says of the model with bilinear layers."""
    states = snapshot(all_layers(model))
    try:
        for site, plan in plans:
            try:
                bilinear = converter_of(site.layer).built_like(site.layer, **plan.arguments)
            except Exception:  # the rewrite of this layer will say why
                return None
            replace_in_place(site.layer, bilinear)
        return find_failure(model, inputs)
    finally:
        restore(states)


def _is_trusted(layer: keras.Layer) -> bool:
    cls = type(layer).original if isinstance(layer, Rewritten) else type(layer)
    runs_any_function = isinstance(layer, keras.layers.Lambda)
    return cls.__module__.partition(".")[0] in _TRUSTED and not runs_any_function


def _text(model, plans, failed, error):
    """What an error says of the layers that cannot be called, the innermost one first."""
    failed = [layer for layer in failed if not isinstance(layer, keras.Model)] or failed
    held: list[str] = []
    for layer in failed:
        held = held or [
            site.path for site, _ in plans if any(layer is owner for owner, _ in site.owners)
        ]
    name = "/".join(layer.name for layer in reversed(failed))
    return (
        f"{name!r} cannot be called once layers of {model.name!r} are bilinear: it may read their "
        f"weights, which are factors then. Leave these layers alone, with exclude={held!r}. "
        f"{type(error).__name__}: {error}"
    )
