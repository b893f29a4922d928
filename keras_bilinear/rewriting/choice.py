"""Choosing layers of a model: by paths, regular expressions, layers, classes and functions."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras

from keras_bilinear.data import describe
from keras_bilinear.rewriting.sites import Site

# What chooses one layer or several, see `choose`.
Choice = str | re.Pattern[str] | keras.Layer | type[keras.Layer] | Callable[[keras.Layer], bool]
Choices = Choice | Iterable[Choice]


def check_choices(name: str, value: Any) -> tuple[Choice, ...]:
    """A choice, or several, as a tuple.

    Args:
        name: name of the argument that holds `value`, for error texts.
        value: a choice, see `choose`, or an iterable of choices.

    Raises:
        ValueError: if it is neither.
    """
    if _is_choice(value):
        return (value,)
    several = isinstance(value, Iterable) and not isinstance(value, Mapping)
    choices = tuple(value) if several else (value,)
    for choice in choices:
        if not _is_choice(choice):
            raise ValueError(
                f"`{name}` must be paths, compiled regular expressions, layers, classes of layers "
                f"or functions of a layer. Received: {describe(choice)}"
            )
    return choices


def _is_choice(value: Any) -> bool:
    return isinstance(value, str | re.Pattern) or callable(value)  # layers and classes are callable


def choose(sites: Sequence[Site], choices: Iterable[Choice], name: str) -> set[str]:
    """The paths of the layers that are chosen.

    Args:
        sites: the layers of a model.
        choices: each of them a path, as plans or as Keras write it (`layer.path`), of a layer or
            of a layer that holds others; a compiled regular expression, searched for in the
            paths of plans; a layer, which may hold others; a class, of a layer or of what holds
            it; or a function that tells of a layer whether it is chosen.
        name: name of the argument that holds the choices, for error texts. To `exclude` a layer
            without weights changes nothing.

    Raises:
        ValueError: if a choice matches no layer.
    """
    chosen = set()
    for choice in choices:
        matched = [site.path for site in sites if _matches(site, choice)]
        if not matched and not (name == "exclude" and _holds_nothing(choice)):
            raise _matches_nothing(sites, choice, name)
        chosen.update(matched)
    return chosen


def choose_ranks(sites: Sequence[Site], ranks: Mapping[str, int | None]) -> dict[str, int | None]:
    """The ranks of layers, by the paths of plans.

    Args:
        sites: the layers of a model.
        ranks: the ranks by paths, as plans or as Keras write them.

    Raises:
        ValueError: if a path is the path of no layer.
    """
    found = {}
    for path, rank in ranks.items():
        matched = [site.path for site in sites if path in (site.path, site.layer.path)]
        if not matched:
            raise _matches_nothing(sites, path, "layers")
        found.update(dict.fromkeys([path] if path in matched else matched, rank))
    return found


def _matches(site: Site, choice: Choice) -> bool:
    # The first owner is the model itself.
    layers = [site.layer, *(owner for owner, _ in site.owners[1:])]
    if isinstance(choice, str):
        held = f"{site.path}/".startswith(f"{choice}/")
        return held or any(layer.path == choice for layer in layers)
    if isinstance(choice, re.Pattern):
        return bool(choice.search(site.path))
    if isinstance(choice, keras.Layer):
        return any(layer is choice for layer in layers)
    if isinstance(choice, type):
        return any(isinstance(layer, choice) for layer in layers)
    return bool(choice(site.layer))


def _holds_nothing(choice: Any) -> bool:
    """Whether a choice is a layer without weights, such as an input, which nothing rewrites."""
    return isinstance(choice, keras.Layer) and choice.built and not choice.weights


def _matches_nothing(sites, choice, name):
    if isinstance(choice, keras.Layer):
        shown = f"the {type(choice).__name__} {choice.name!r}"
    else:
        shown = getattr(choice, "__qualname__", repr(choice))
    return ValueError(
        f"`{name}` must choose among the layers with weights: "
        f"{', '.join(site.path for site in sites)}. Received: {shown}, which matches none of them"
    )
