import contextlib
import functools
import importlib.util
import signal
import subprocess
import sys
import time

import keras
import pytest

from keras_bilinear.cli import main

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
        ("inspect", ("--dataset", "--[no]overwrite", "--[no]unsafe")),
        ("plan", ("--output", "--budget", "--calibration", "--examples", "--[no]overwrite")),
        ("rewrite", ("--plan", "--budget", "--[no]low_rank", "--data_dir", "--[no]unsafe")),
        ("expand", ("--[no]overwrite", "--[no]unsafe")),
        ("export", ("--quantize", "--representative_data", "--examples", "--[no]overwrite")),
        ("benchmark", ("--suite", "--backend")),
    ],
)
def test_help_of_a_command_lists_its_flags(run, command, expected):
    status, output, error = run(command, "--help")
    assert (status, error) == (0, "")
    assert all(f"  {flag}" in output for flag in expected)
    assert "absl" not in output


def test_every_command_is_a_module():
    for module, _ in main.COMMANDS.values():
        assert importlib.util.find_spec(f"keras_bilinear.{module}")


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
    done = subprocess.run(
        [sys.executable, "-m", "keras_bilinear", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("keras-bilinear: unknown command 'nothing'")
