"""Signs of life of long work: a bar with what is done now and the time that is left.

A public function does its work within `shown(verbose)`. Whatever it calls says by `track` and
`working` how far it is. Outside of `shown`, as in a callback, these print nothing.
"""

import contextlib
import contextvars
import io
import operator
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import rich.console
import rich.progress
import rich.text

from keras_bilinear.messages import check_choice

# Seconds between two pictures of the bar in a notebook, and between two lines in a file.
_NOTEBOOK_PAUSE, _FILE_PAUSE = 0.2, 10.0

_DISPLAY: contextvars.ContextVar["_Display | None"] = contextvars.ContextVar(
    "display", default=None
)

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
    if outer is not None and (verbose == "auto" or (verbose and outer.visible)):
        yield
        return
    display = _display(verbose)
    token = _DISPLAY.set(display)
    try:
        yield
    finally:
        _DISPLAY.reset(token)
        # An exception may keep a generator of `track` alive, and so its task.
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
    if display is None or not display.visible:
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
    with contextlib.nullcontext() if display is None else display.task(description, None):
        yield


class _Display:
    """Tasks under way. This class shows nothing of them."""

    visible = False

    def __init__(self, console: rich.console.Console):
        self._tasks = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            _Times(),
            console=console,
            refresh_per_second=4,  # what is timed meanwhile must not notice
            transient=True,
            redirect_stderr=False,  # a logger would keep what replaces stderr
        )

    @property
    def busy(self) -> bool:
        """Whether a task is under way."""
        return bool(self._tasks.task_ids)

    @contextlib.contextmanager
    def task(self, description: str, total: float | None) -> Iterator[rich.progress.TaskID]:
        """A context with a task that is under way.

        Args:
            description: what is done.
            total: the sum of the sizes of its steps; `None` if it is unknown.
        """
        task = self._tasks.add_task(description, total=total, steps_end=0.0)
        self.draw()
        try:
            yield task
        finally:
            if task in self._tasks.task_ids:
                self._tasks.remove_task(task)
            if not self.busy:
                self.erase()

    def begin(self, task: rich.progress.TaskID, description: str) -> None:
        """Begins a step of a task."""
        self._tasks.update(task, description=description)
        self.draw()

    def advance(self, task: rich.progress.TaskID, size: float) -> None:
        """Ends a step of a task."""
        (found,) = (each for each in self._tasks.tasks if each.id == task)
        self._tasks.update(task, advance=size, steps_end=found.elapsed)

    def close(self) -> None:
        """Ends all tasks."""
        for task in self._tasks.task_ids:
            self._tasks.remove_task(task)
        self.erase()

    def draw(self) -> None:
        """Shows the tasks."""

    def erase(self) -> None:
        """Shows nothing any more."""


class _Terminal(_Display):
    """A bar in the last lines of a terminal, which a thread draws."""

    visible = True

    def draw(self):
        self._tasks.start()

    def erase(self):
        self._tasks.stop()


class _Notebook(_Display):
    """A bar in the output of a cell. It needs no widgets."""

    visible = True
    _handle: Any = None
    _drawn = 0.0

    def draw(self):
        if time.monotonic() >= self._drawn + _NOTEBOOK_PAUSE:
            self._drawn = time.monotonic()
            console = rich.console.Console(
                file=io.StringIO(), record=True, width=100, force_jupyter=False
            )
            console.print(self._tasks.get_renderable())
            self._show(console.export_html(inline_styles=True, code_format="<pre>{code}</pre>"))

    def erase(self):
        if self._handle is not None:
            self._show("")

    def _show(self, html):
        from IPython.display import display

        data = {"text/html": html, "text/plain": ""}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class _File(_Display):
    """A line now and then, in a file or a pipe."""

    visible = True
    _drawn = -_FILE_PAUSE

    def draw(self):
        if time.monotonic() >= self._drawn + _FILE_PAUSE:
            self._drawn = time.monotonic()
            self._tasks.console.print(self._tasks.get_renderable())


class _Times(rich.progress.ProgressColumn):
    """How long a task has taken and, as the steps so far tell, how long it will take."""

    max_refresh = 0.5

    def render(self, task):
        elapsed = task.elapsed or 0.0
        text = _clock(elapsed)
        if task.completed and task.total:
            left = task.fields["steps_end"] * task.total / task.completed - elapsed
            text += f", {_clock(left)} left" if left > 0 else ""
        return rich.text.Text(text)


def _clock(seconds):
    """Minutes and seconds, such as `1:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"


def _display(verbose):
    """The display for an argument `verbose`."""
    console = rich.console.Console(stderr=True)
    if verbose and console.is_jupyter:
        return _Notebook(console)
    if verbose and console.is_terminal:
        return _Terminal(console)
    return (_File if verbose == 1 else _Display)(console)
