import functools
import io
import re
import time
import types

import IPython.display
import keras
import numpy as np
import pytest
import rich.console

from keras_bilinear import (
    Rewriter,
    compare,
    export_litert,
    plan_rewrite,
    progress,
    progress_display,
    rewrite_model,
    summarize,
)
from keras_bilinear.litert import export
from keras_bilinear.progress import shown, track, working
from keras_bilinear.reports import summary
from keras_bilinear.reports.timing import median_seconds

# Erases the line and shows the cursor again.
CLEAN = "\r\x1b[2K\x1b[?25h\r"


class Terminal(io.StringIO):
    """A terminal that keeps what is written."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name in ("TERM", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    file = Terminal()
    # pytest replaces stderr again before the test begins.
    monkeypatch.setattr(rich.console.Console, "file", file)
    return file


@pytest.fixture
def notebook(monkeypatch):
    """The HTML that a notebook shows, from its first picture to its last."""
    seen = []

    class Handle:
        def update(self, data, raw):
            assert raw
            seen.append(data["text/html"])

    def display(data, raw, display_id):
        assert raw
        assert display_id
        assert not any(seen[-1:])  # what was there before is gone
        seen.append(data["text/html"])
        return Handle()

    console = functools.partial(rich.console.Console, force_jupyter=True)
    monkeypatch.setattr(rich.console, "Console", console)
    monkeypatch.setattr(IPython.display, "display", display)
    return seen


def model():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(32, name=name) for name in ("first", "second")]
    return keras.Sequential([keras.Input((32,)), *layers])


X = np.random.default_rng(0).random((200, 32)).astype("float32")


def test_a_terminal_shows_steps_and_time_and_is_clean_in_the_end(terminal, capsys):
    with shown():
        for _ in track(["a[b]", "c"], "fitting", name=str):
            time.sleep(0.01)
            progress._DISPLAY.get()._tasks.refresh()
    written = terminal.getvalue()
    assert "fitting a[b]" in written
    assert "fitting c" in written
    assert written.endswith(CLEAN)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("elapsed", "text"), [(30, "0:30, 2:00 left"), (90, "1:30, 1:00 left"), (200, "3:20")]
)
def test_sizes_of_steps_tell_how_long_the_others_take(elapsed, text):
    task = types.SimpleNamespace(elapsed=elapsed, completed=2, total=10, fields={"steps_end": 30.0})
    assert str(progress_display._Times().render(task)) == text


def test_a_notebook_shows_html_without_widgets_and_nothing_in_the_end(notebook, monkeypatch):
    monkeypatch.setattr(progress_display, "_NOTEBOOK_PAUSE", 0)
    with shown(), working("planning"):
        for _ in track([1, 2], "fitting", name=str):
            pass
    assert "planning" in notebook[0]
    assert "fitting 1" not in notebook[0]
    assert any("planning" in html and "fitting 2" in html for html in notebook)
    assert notebook[-1] == ""


def test_a_file_gets_a_line_now_and_then(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress_display.time, "monotonic", lambda: now)
    with shown(1):
        for step in track(range(100), "fitting", name=str):
            now = step / 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["fitting", str(step)] for step in (21, 41, 61, 81)
    ]


@pytest.mark.parametrize("verbose", ["auto", 0, False])
def test_nothing_is_shown_elsewhere(verbose, capsys):
    with shown(verbose), working("planning"):
        assert [*track(range(3), "fitting")] == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("outer", "inner"), [(0, "auto"), (0, 0), (1, 0)])
def test_auto_does_as_the_work_around_it(outer, inner, terminal):
    with shown(outer), shown(inner):
        assert [*track(range(3), "fitting")] == [0, 1, 2]
    assert not terminal.getvalue()


@pytest.mark.parametrize("inner", ["auto", 1])
def test_work_within_other_work_has_the_same_display(inner, terminal):
    with shown(1):
        outer = progress._DISPLAY.get()
        with shown(inner):
            assert progress._DISPLAY.get() is outer
        assert progress._DISPLAY.get() is outer
    assert progress._DISPLAY.get() is None


def test_an_exception_ends_the_bar(terminal):
    def fail():
        with shown():
            for _ in track(range(3), "fitting"):
                raise KeyError

    with pytest.raises(KeyError) as caught:
        fail()
    # The traceback keeps the generator of the loop.
    assert caught.traceback
    assert terminal.getvalue().endswith(CLEAN)


def test_loops_that_are_left_have_no_bar(terminal):
    with shown():
        display = progress._DISPLAY.get()
        for _ in track(range(3), "solving"):
            break
        assert not display.busy
        for _ in track(range(2), "rewriting"):
            for _ in track(["a"], "fitting"):  # says no more than the loop around it
                assert len(display._tasks.tasks) == 1


@pytest.mark.parametrize("verbose", [2, "yes", None])
def test_verbose_is_checked_before_the_work(verbose):
    full, read = model(), []
    data = (read.append(1) or batch for batch in [X])
    for call in (
        lambda: plan_rewrite(full, calibration_data=data, verbose=verbose),
        lambda: rewrite_model(full, calibration_data=data, verbose=verbose),
        lambda: Rewriter(1, verbose=verbose),
        lambda: summarize(full, data, verbose=verbose),
        lambda: compare(full, full, data, verbose=verbose),
        lambda: export_litert(full, "model.tflite", representative_data=data, verbose=verbose),
    ):
        with pytest.raises(ValueError, match=re.escape(f"Received: verbose={verbose!r}")):
            call()
    assert not read


def test_plans_and_rewrites_show_what_layer_they_are_at(notebook, monkeypatch):
    monkeypatch.setattr(progress_display, "_NOTEBOOK_PAUSE", 0)
    full = model()

    def shows(work):
        notebook.clear()
        work()
        assert notebook[-1] == ""
        return "".join(notebook)

    text = shows(lambda: plan_rewrite(full, 0.5, calibration_data=X))
    for part in ("predicting the error of second", "reading the calibration data", "fitting first"):
        assert part in text
    assert "rank 2" in text
    plan = plan_rewrite(full, 0.5, calibration_data=X, verbose=0)
    assert "rewriting second" in shows(lambda: rewrite_model(full, plan, X))
    clone = functools.partial(keras.models.clone_model, full, clone_function=Rewriter(1))
    assert "rewriting second" in shows(clone)
    notebook.clear()
    plan_rewrite(full, 0.5, calibration_data=X, verbose=0)
    rewrite_model(full, plan, X, verbose=0)
    assert not notebook


def test_reports_and_exports_show_what_they_do(notebook, monkeypatch, tmp_path):
    monkeypatch.setattr(progress_display, "_NOTEBOOK_PAUSE", 0)
    monkeypatch.setattr(summary, "median_seconds", lambda functions: [1.0 for _ in functions])
    full = model()
    summarize(full, (X, X))
    assert f"measuring the accuracy of {full.name}" in "".join(notebook)
    compare(full, full, X, verbose=1)
    assert notebook.pop() == ""
    notebook.clear()
    compare(full, full, (X, X), verbose=0)
    summarize(full, (X, X), verbose=0)
    assert not notebook

    def fail(*arguments):
        raise ValueError("no such operation")

    monkeypatch.setattr(export, "convert", fail)
    with pytest.raises(ValueError, match="no such operation"):
        export_litert(full, tmp_path / "model.tflite")
    assert "converting the model" in "".join(notebook)
    assert notebook[-1] == ""


def test_timing_shows_its_rounds(notebook, monkeypatch):
    monkeypatch.setattr(progress_display, "_NOTEBOOK_PAUSE", 0)
    with shown():
        median_seconds([int], rounds=2, burst=0)
    assert "compiling" in notebook[0]
    assert any("timing" in html for html in notebook)
