"""Where a progress bar appears: in a terminal, in a notebook or as lines in a file."""

import contextlib
import importlib
import io
import time
from collections.abc import Iterator
from typing import Any

import rich.console
import rich.progress
import rich.text

# Seconds between two pictures of the bar in a notebook, and between two lines in a file.
_NOTEBOOK_PAUSE, _FILE_PAUSE = 0.2, 10.0


def find_display(everywhere: bool):
    """The display for where this process runs.

    Args:
        everywhere: whether there is one where stderr is neither a terminal nor in a notebook.

    Returns:
        A `Display`; `False` for none.
    """
    console = rich.console.Console(stderr=True)
    if console.is_jupyter:
        return _Notebook(console)
    if console.is_terminal:
        return _Terminal(console)
    return _File(console) if everywhere else False


class Display:
    """Tasks under way, which a subclass shows."""

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
        raise NotImplementedError

    def erase(self) -> None:
        """Shows nothing any more."""


class _Terminal(Display):
    """A bar in the last lines of a terminal, which a thread draws."""

    def draw(self):
        self._tasks.start()

    def erase(self):
        self._tasks.stop()


class _Notebook(Display):
    """A bar in the output of a cell. It needs no widgets."""

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
        # Only a notebook needs IPython, and has it.
        display = importlib.import_module("IPython.display").display
        data = {"text/html": html, "text/plain": ""}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class _File(Display):
    """A line now and then, in a file or a pipe."""

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
