"""Saving layers and models that make the layers they hold themselves.

A `keras.layers.MultiHeadAttention` or a subclassed model makes its layers from
its own configuration, which knows nothing of those that became others. Such an
owner becomes a `Rewritten` one: its configuration has the other layers as well,
and puts them in their places when it is made again.
"""

import functools
from collections.abc import Iterable
from typing import Self

import keras

from keras_bilinear.keras_private.graph import is_functional, sublayers
from keras_bilinear.keras_private.surgery import replace_in_place, set_class
from keras_bilinear.rewriting.sites import Site

# Their configurations have the layers that they hold.
_KEEPERS = (
    keras.Sequential,
    keras.layers.RNN,
    keras.layers.StackedRNNCells,
    keras.layers.TimeDistributed,
)


@keras.saving.register_keras_serializable(package="keras_bilinear", name="Rewritten")
class Rewritten:
    """Mixed into the class of an owner in which layers became others.

    Attributes:
        replaced: places of these layers: numbers among the sublayers of the
            owner, of that sublayer, and so on.
    """

    replaced = ()

    def get_config(self) -> dict:
        rewritten = type(self)
        set_class(self, rewritten.original)
        try:
            owner = keras.saving.serialize_keras_object(self)
        finally:
            set_class(self, rewritten)
        owner.pop("compile_config", None)
        layers = [
            {"place": place, "layer": keras.saving.serialize_keras_object(_at(self, place))}
            for place in self.replaced
        ]
        return {"owner": owner, "layers": layers}

    def __reduce__(self):
        # Python finds no class that is made here, but the original one.
        unpickle, arguments = super().__reduce__()
        return _unpickle, (type(self).original, unpickle.__name__, *arguments)

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> Self:
        owner = keras.saving.deserialize_keras_object(config["owner"], custom_objects)
        for one in config["layers"]:
            other = keras.saving.deserialize_keras_object(one["layer"], custom_objects)
            replace_in_place(_at(owner, one["place"]), other)
        _mark(owner, [tuple(one["place"]) for one in config["layers"]])
        return owner


def _unpickle(original, name, *arguments):
    return getattr(original, name)(*arguments)


def store_replacement(sites: Iterable[Site]) -> None:
    """Makes the owners of replaced layers save the replacements.

    Args:
        sites: the layers that were replaced.
    """
    for site in sites:
        for owner, place in _places(site):
            if type(owner) not in _KEEPERS and not is_functional(owner):
                _mark(owner, dict.fromkeys([*getattr(owner, "replaced", ()), place]))
                break


def drop_replacement(sites: Iterable[Site]) -> None:
    """Makes owners make layers themselves again, after a replacement was undone.

    An owner that never stored a replacement at a place makes another layer there, so it
    stores what the layer is now.

    Args:
        sites: the layers whose replacement was undone.
    """
    for site in sites:
        for owner, place in _places(site):
            if place in getattr(owner, "replaced", ()):
                _mark(owner, [other for other in owner.replaced if other != place])
                break
        else:
            store_replacement([site])


def _places(site):
    """The owners of a layer, and where each of them has it."""
    for depth, (owner, _) in enumerate(site.owners):
        yield owner, tuple(index for _, index in site.owners[depth:])


def _mark(owner, places):
    original = type(owner).original if isinstance(owner, Rewritten) else type(owner)
    # Not through Keras, which would track the list.
    vars(owner).pop("replaced", None)
    set_class(owner, original)
    if places:
        vars(owner)["replaced"] = tuple(places)
        set_class(owner, _rewritten(original))


def _at(owner, place):
    for index in place:
        owner = sublayers(owner)[index]
    return owner


@functools.cache
def _rewritten(original):
    """The class of the owners of a class, with the name that they have."""
    cls = type(original.__name__, (Rewritten, original), {"original": original})
    # One name for all of them: `from_config` knows which one is meant.
    return keras.saving.register_keras_serializable("keras_bilinear", "Rewritten")(cls)
