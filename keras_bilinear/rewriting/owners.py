"""Saving layers and models that make the layers they hold themselves.

A `keras.layers.MultiHeadAttention` or a subclassed model makes its layers from
its own configuration, which knows nothing of layers that were replaced. The class of such
an owner gets `Rewritten` mixed in: its configuration then has the replacements as well, and
puts them in their places when the owner is made again.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import keras

from keras_bilinear.keras_private.graph import is_functional, sublayers
from keras_bilinear.keras_private.surgery import replace_in_place, set_class
from keras_bilinear.rewriting.sites import Site

# A layer's place in an owner: its number among the sublayers of the owner, its number among
# the sublayers of that sublayer, and so on.
Place = tuple[int, ...]

# The configurations of these owners have the layers that they hold.
_KEEPERS = (
    keras.Sequential,
    keras.layers.RNN,
    keras.layers.StackedRNNCells,
    keras.layers.TimeDistributed,
)


# It is mixed into classes of layers only.
_Base = keras.Layer if TYPE_CHECKING else object


@keras.saving.register_keras_serializable(package="keras_bilinear", name="Rewritten")
class Rewritten(_Base):
    """Mixed into the class of an owner in which layers were replaced.

    Attributes:
        original: the class of the owner without this one.
        replaced: places of the layers that were replaced.
    """

    original: ClassVar[type]
    replaced: tuple[Place, ...] = ()

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

    def __reduce__(self) -> tuple:
        # Python cannot find a class that is made here, but it finds the original class.
        unpickle, arguments = cast(tuple, super().__reduce__())
        return _unpickle, (type(self).original, unpickle.__name__, *arguments)

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> Self:
        owner = keras.saving.deserialize_keras_object(config["owner"], custom_objects)
        for replaced in config["layers"]:
            layer = keras.saving.deserialize_keras_object(replaced["layer"], custom_objects)
            replace_in_place(_at(owner, replaced["place"]), layer)
        _mark(owner, [tuple(replaced["place"]) for replaced in config["layers"]])
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


def _places(site: Site) -> Iterator[tuple[Any, Place]]:
    """The owners of a layer, and the place of the layer in each of them."""
    for depth, (owner, _) in enumerate(site.owners):
        yield owner, tuple(index for _, index in site.owners[depth:])


def _mark(owner: keras.Layer, places: Iterable[Place]) -> None:
    """Makes an owner store the layers at some places, and no others."""
    places = tuple(places)
    original: type = type(owner).original if isinstance(owner, Rewritten) else type(owner)
    # Not through Keras, which would track the list.
    owner.__dict__.pop("replaced", None)
    set_class(owner, original)
    if places:
        owner.__dict__["replaced"] = places
        set_class(owner, _rewritten(original))


def _at(owner: keras.Layer, place: Iterable[int]) -> keras.Layer:
    """The layer at a place of an owner."""
    for index in place:
        owner = sublayers(owner)[index]
    return owner


@functools.cache
def _rewritten(original: type) -> type:
    """A class with `Rewritten` mixed in, of the same name."""
    cls = type(original.__name__, (Rewritten, original), {"original": original})
    # All such classes are saved under one name: `from_config` knows which class is meant.
    return keras.saving.register_keras_serializable("keras_bilinear", "Rewritten")(cls)
