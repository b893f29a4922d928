import contextlib
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
import warnings

import keras
import pytest
import rich.table
from absl import logging
from absl.testing import flagsaver
from run_command import run_command

import keras_bilinear
from keras_bilinear.benchmark import cases, choices
from keras_bilinear.cli import console, main, plan

if keras.config.backend() != "tensorflow":
    pytest.skip("nothing here depends on the backend", allow_module_level=True)


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_lists_the_commands(run, flag):
    status, output, error = run(flag)
    assert (status, error) == (0, "")
    assert output.startswith("usage: keras-bilinear COMMAND")
    assert all(command in output for command in main.COMMANDS)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("demo", ("--output_dir", "--rank", "--[no]mixed_precision")),
        ("inspect", ("--dataset", "--import", "--[no]overwrite", "--[no]unsafe", "--verbosity")),
        ("plan", ("--output", "--budget", "--calibration", "--examples", "--[no]overwrite")),
        ("rewrite", ("--plan", "--budget", "--[no]low_rank", "--data_dir", "--[no]unsafe")),
        ("expand", ("--[no]overwrite", "--[no]unsafe")),
        ("export", ("--quantize", "--representative_data", "--examples", "--[no]overwrite")),
        (
            "tradeoff",
            ("--data", "--labels", "--budget", "--max_bytes", "--output_dir", "--recover"),
        ),
        ("benchmark", ("--suite", "--backend")),
    ],
)
def test_help_of_a_command_lists_its_flags(run, command, expected):
    status, output, error = run(command, "--help")
    assert (status, error) == (0, "")
    assert all(f"  {flag}" in output for flag in expected)
    assert "absl" not in output


def test_every_command_is_a_module():
    for command in main.COMMANDS.values():
        assert importlib.util.find_spec(f"keras_bilinear.{command.module}")


def python(*arguments):
    """Runs Python in a process of its own, which Ctrl-C interrupts."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        # A suite that runs in the background may have inherited that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def imported(done):
    """The modules that a process of `python -X importtime` imported."""
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--version"], 0, f"keras-bilinear {keras_bilinear.__version__}\n"),
        (["--help"], 0, "usage: keras-bilinear COMMAND"),
        (["demo", "--help"], 0, "usage: keras-bilinear demo"),
        (["export", "--rank=1"], 2, ""),
    ],
)
def test_what_needs_no_keras_does_not_import_it(arguments, status, text):
    script = "-c", "from keras_bilinear_cli import main; main()"  # as the console script does
    for start in (script, ("-m", "keras_bilinear")):
        done = python("-X", "importtime", *start, *arguments)
        assert done.returncode == status
        assert done.stdout.startswith(text)
        assert "keras_bilinear.cli.main" in imported(done)
        assert not {"keras", "numpy", "rich", "tensorflow"} & imported(done)


def test_suites_and_cases_are_the_same():
    assert (*cases.CASES, "huge", *choices.MEMORY) == choices.SUITES


CTRL_C = "import os, signal; ctrl_c = lambda: os.kill(os.getpid(), signal.SIGINT)"
AT_AN_IMPORT = """
import sys
class Finder:
    def find_spec(name, *_):
        name == "keras_bilinear" and ctrl_c()
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("when", [AT_AN_IMPORT, "import atexit\natexit.register(ctrl_c)"])
def test_ctrl_c_at_the_start_and_at_the_end(when):
    lines = f"{CTRL_C}\n{when}\nfrom keras_bilinear_cli import main\nmain()"
    done = python("-c", lines, "--version")
    assert (done.returncode, done.stderr) == (130, "keras-bilinear: interrupted\n")
    assert bool(done.stdout) == ("atexit" in when)


@pytest.mark.parametrize("verbosity", [None, "--verbosity=-1", "--verbosity=0"])
def test_only_python_code_writes_to_stderr(monkeypatch, capfd, verbosity):
    def command(arguments):
        os.write(2, b"from C++\n")
        warnings.warn_explicit("from Keras", UserWarning, "saving.py", 1, "keras.saving")
        warnings.warn_explicit("from TensorFlow", UserWarning, "lite.py", 1, "tensorflow.lite")
        print("from Python", file=sys.stderr)

    monkeypatch.setattr(plan, "main", command)
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    before = sys.stderr
    with (
        flagsaver.flagsaver(verbosity=logging.get_verbosity()),
        warnings.catch_warnings(record=True, action="always") as caught,
    ):
        assert run_command("plan", *filter(None, [verbosity])) == 0
    error = capfd.readouterr().err + str([warning.message for warning in caught])
    assert sys.stderr is before
    assert "from Python" in error
    assert "from Keras" in error
    shown = verbosity == "--verbosity=0"
    assert ("from C++" in error, "from TensorFlow" in error) == (shown, shown)


@pytest.mark.parametrize("width", [40, 100])
def test_tables_are_as_wide_as_columns_says(monkeypatch, capsys, width):
    table = rich.table.Table(*(["a rather long name of a column"] * 5))
    table.add_row(*["1,234,567,890"] * 5)
    console.print_table(table)
    before = capsys.readouterr().out
    assert len(before.splitlines()[0]) == 120
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    console.print_table(table)
    output = capsys.readouterr().out
    assert {len(line) for line in output.splitlines()} == {width}
    assert "\x1b" not in output
    assert "…" not in output


def test_colours_are_for_terminals_that_want_them(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for colours, variable in ((False, "OTHER"), (True, "FORCE_COLOR"), (False, "NO_COLOR")):
        monkeypatch.setenv(variable, "1")  # The second one makes a terminal of any file.
        console.stdout().print("text", style="red")
        assert ("\x1b[31m" in capsys.readouterr().out) == colours


@pytest.fixture
def ctrl_c():
    """Presses Ctrl-C, also where the suite runs in the background and would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield functools.partial(signal.raise_signal, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_a_finalizer_is_not_lost(run, monkeypatch, ctrl_c):
    class Finalized:
        def __del__(self):
            ctrl_c()
            finished.append(True)

    def command(arguments):
        Finalized()
        time.sleep(60)

    finished = []
    monkeypatch.setattr(main, "run", command)
    assert run("demo") == (130, "", "keras-bilinear: interrupted\n")
    assert finished


def test_ctrl_c_that_becomes_another_error(run, monkeypatch, ctrl_c):
    def command(arguments):
        try:
            ctrl_c()
        except KeyboardInterrupt:
            raise SystemError("from compiled code") from None

    monkeypatch.setattr(main, "run", command)
    assert run("demo") == (130, "", "keras-bilinear: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_is_swallowed_is_raised_again(run, monkeypatch, ctrl_c):
    def command(arguments):
        with contextlib.suppress(KeyboardInterrupt):
            ctrl_c()
            swallowed.append("not raised")
        time.sleep(60)

    swallowed = []
    monkeypatch.setattr(main, "run", command)
    assert run("demo") == (130, "", "keras-bilinear: interrupted\n")
    assert not swallowed


def test_ctrl_c_does_not_disturb_what_cleans_up(run, monkeypatch, ctrl_c):
    def command(arguments):
        try:
            ctrl_c()
        finally:
            time.sleep(10 * main._PAUSE)
            ctrl_c()
            cleaned.append(True)

    cleaned = []
    monkeypatch.setattr(main, "run", command)
    assert run("demo") == (130, "", "keras-bilinear: interrupted\n")
    assert cleaned


def test_no_or_an_unknown_command(fails):
    assert "no command given, choose one of: demo" in fails()
    assert "unknown command 'dmeo', choose one of: demo" in fails("dmeo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank=0"], "rank"),
        (["--epochs=many"], "epochs"),
        (["--learning_rate=0"], "learning_rate"),
        (["--learning_rate=nan"], "learning_rate"),
        (["--seed=-1"], "seed"),
        (["--rnak=2"], "rnak"),
        (["fashion_mnist"], "fashion_mnist"),
    ],
)
def test_bad_flags(fails, tmp_path, arguments, message):
    assert message in fails("demo", f"--output_dir={tmp_path}/out", *arguments)


@pytest.mark.parametrize(
    ("module", "dataset"),
    [
        ("matplotlib", "digits"),
        ("ai_edge_litert", "digits"),
        ("sklearn", "digits"),
        ("tensorflow_datasets", "mnist"),
    ],
)
def test_a_missing_package_is_named(fails, tmp_path, monkeypatch, module, dataset):
    monkeypatch.setitem(sys.modules, module, None)
    line = fails("demo", f"--output_dir={tmp_path}/out", f"--dataset={dataset}")
    assert f'needs {module}: run `pip install "keras-bilinear[demo]"`' in line


def test_the_extra_that_brings_a_missing_package_is_named(fails, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    line = fails("export", f"{tmp_path}/model.keras", f"{tmp_path}/model.tflite")
    assert 'run `pip install "keras-bilinear[litert]"`' in line


def test_an_output_folder_that_cannot_be_written(fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in ("file", "file/below/it"):
        assert "cannot write into" in fails("demo", f"--output_dir={tmp_path}/{folder}")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unknown_data_set(fails, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    line = fails("demo", f"--output_dir={tmp_path}/out", "--dataset=fashion_mnst")
    assert "unknown data set 'fashion_mnst'; did you mean fashion_mnist" in line


def test_ctrl_c_is_one_line(run, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "run", interrupt)
    assert run("demo") == (130, "", "keras-bilinear: interrupted\n")


def test_python_m_runs_the_command_line():
    done = python("-m", "keras_bilinear", "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("keras-bilinear: unknown command 'nothing'")
