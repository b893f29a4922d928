"""Signs of life of long work: a bar with what is done now and the time that is left.

A public function does its work within `shown(verbose)`. Whatever it calls says by `track` and
`working` how far it is. Outside of `shown`, as in a callback, these print nothing.
"""

import contextlib
import contextvars
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from keras_bilinear.messages import check_choice

# What shows the work under way; `False` if it must not be shown, `None` if nobody said.
_DISPLAY: contextvars.ContextVar[Any] = contextvars.ContextVar("display", default=None)

Item = TypeVar("Item")


def check_verbose(verbose: int | str) -> None:
    """Checks an argument `verbose`, see `shown`.

    Raises:
        ValueError: if it is not valid.
    """
    check_choice("verbose", verbose, ("auto", 0, 1))


@contextlib.contextmanager
def shown(verbose: int | str = "auto") -> Iterator[None]:
    """A context that shows on stderr, or in a notebook, how far the work in it is.

    Args:
        verbose: 1 shows a bar that vanishes in the end, and a line every 10 seconds where stderr
            is a file; 0 shows nothing; `"auto"` is 1 in a terminal and in a notebook, and 0
            elsewhere. Within another such context, `"auto"` does as this other context does.

    Raises:
        ValueError: if `verbose` is something else.
    """
    check_verbose(verbose)
    outer = _DISPLAY.get()
    if outer is not None and (verbose == "auto" or (verbose and outer)):
        yield
        return
    display = _display(verbose)
    token = _DISPLAY.set(display)
    try:
        yield
    finally:
        _DISPLAY.reset(token)
        # An exception may keep a generator of `track` alive, and so its task.
        if display:
            display.close()


def track(
    items: Iterable[Item],
    description: str,
    name: Callable[[Item], str] | None = None,
    size: Callable[[Item], float] | None = None,
) -> Iterator[Item]:
    """Yields items, and shows how many of them are done.

    Args:
        items: what a loop goes through.
        description: what the loop does, such as `"fitting"`.
        name: what to call an item; `None` for no name.
        size: a number that grows with the time that an item takes; `None` if all take as long.
    """
    display = _DISPLAY.get()
    if not display:
        yield from items
        return
    if size is not None:
        items = list(items)
        total = sum(map(size, items))
    else:
        total = operator.length_hint(items) or None
        if total == 1 and display.busy:  # the task that this step belongs to says it all
            yield from items
            return
    with display.task(description, total) as task:
        for item in items:
            display.begin(task, description if name is None else f"{description} {name(item)}")
            yield item
            display.advance(task, 1 if size is None else size(item))


@contextlib.contextmanager
def working(description: str) -> Iterator[None]:
    """A context that shows what is done, where it is unknown how far it is.

    Args:
        description: what is done, such as `"converting"`.
    """
    display = _DISPLAY.get()
    with display.task(description, None) if display else contextlib.nullcontext():
        yield


def _display(verbose):
    """The display for an argument `verbose`; `False` for none."""
    if not verbose:
        return False
    # Importing the package must not import what only a bar needs.
    from keras_bilinear.progress_display import find_display

    return find_display(everywhere=verbose != "auto")
