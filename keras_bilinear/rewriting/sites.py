"""The layers of a model: where they are, and which of them can become bilinear."""

import collections
import dataclasses
import os
from collections.abc import Iterator

import keras

from keras_bilinear.keras_private.graph import own_variables, sublayers
from keras_bilinear.layers.converter import full_converter, is_bilinear

# Layers that read or write the kernel of a layer they hold.
_MEDDLERS = (keras.layers.SpectralNormalization,)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


@dataclasses.dataclass(frozen=True)
class Site:
    """One layer of a model.

    Attributes:
        path: names of the layers that hold the layer, and its own name, joined by `/`.
        layer: the layer.
        owners: pairs `(owner, index)` from the model to the layer: each owner holds
            the next owner, or the layer, as its sublayer of that index.
    """

    path: str
    layer: keras.Layer
    owners: tuple


def check_built(model: keras.Model) -> None:
    """Checks that `model` is a built Keras model.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(model, str | os.PathLike):
        raise ValueError(
            f"`model` must be a Keras model, not a path. Load it first: "
            f"keras.models.load_model({os.fspath(model)!r})"
        )
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"`model` must be a built Keras model: call it on data first. Received: model={model!r}"
        )


def walk(model: keras.Model, weightless: bool = False) -> Iterator[Site]:
    """Every layer with weights that holds no other layers, once, in the order of the model.

    A bilinear layer, and a full layer that a bilinear layer can stand for, comes as a whole:
    the layers in it, such as cells, do not come.

    Args:
        model: the model, or a layer that holds others.
        weightless: whether layers without weights count as well.
    """
    seen, paths = set(), set()

    def visit(layer, prefix, owners):
        for index, child in enumerate(sublayers(layer)):
            if id(child) in seen:
                continue
            seen.add(id(child))
            path, count = f"{prefix}{child.name}", 1
            while path in paths:
                count += 1
                path = f"{prefix}{child.name}_{count}"
            paths.add(path)
            held = (*owners, (layer, index))
            if is_leaf(child):
                if weightless or child.weights or not child.built:
                    yield Site(path, child, held)
            else:
                yield from visit(child, f"{path}/", held)

    return visit(model, "", ())


def is_leaf(layer: keras.Layer) -> bool:
    """Whether a layer is rewritten, expanded or left alone as a whole."""
    if full_converter(type(layer)) or is_bilinear(layer):
        return True
    return not any(child.weights or not child.built for child in sublayers(layer))


def reason_to_leave(site: Site, tied: set) -> str:
    """Why a layer cannot be rewritten; empty if it can.

    Args:
        site: the layer.
        tied: ids of the variables that several layers of the model have.
    """
    layer = site.layer
    if is_bilinear(layer):
        return "bilinear already"
    if isinstance(layer, _DEPTHWISE):
        return "depthwise: one small filter for each channel, little to save"
    converter = full_converter(type(layer))
    if converter is None:
        return "no projection in it that a bilinear layer stands for"
    if not layer.built:
        return "not built: call the model on data first"
    for owner, _ in site.owners:
        if isinstance(owner, _MEDDLERS):
            return f"{type(owner).__name__} works on its kernel"
    if any(id(variable) in tied for variable in layer.variables):
        return "shares a variable with another layer"
    return converter.reason_to_leave(layer)


def tied_variables(model: keras.Model) -> set:
    """Ids of the variables that several layers of a model have as their own."""
    holders = collections.Counter(map(id, own_variables(model)))
    return {variable for variable, count in holders.items() if count > 1}
