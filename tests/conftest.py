import collections
import functools
import gc
import os
import zlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The suite compiles thousands of small functions and runs each of them once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Its matrices are small, and threads that wait for each other cost more than they save,
# the more so where other suites run beside this one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

import hypothesis
import pytest

# Keras is imported where it is used: the process that only deals tests to others needs none.
pytest.register_assert_rewrite("layer_checks")

for profile, max_examples in {"suite": 20, "quick": 5}.items():
    hypothesis.settings.register_profile(
        profile,
        derandomize=True,
        deadline=None,
        max_examples=max_examples,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
# JAX compiles anew for each shape that is drawn.
hypothesis.settings.load_profile("quick" if os.environ.get("KERAS_BACKEND") == "jax" else "suite")


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        metavar="K/N",
        help="run part K of N of each test's cases: a part has at least one of every test, "
        "the parts together have them all",
    )


def pytest_collection_modifyitems(config, items):
    if not config.option.part:
        return
    part, parts = map(int, config.option.part.split("/"))
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    dealt = set()
    for group in cases.values():
        # Shuffled, as in their own order every Nth case may have the same value of a parameter.
        group.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        hands = min(parts, len(group))
        dealt.update(group[part % hands :: hands])
    config.hook.pytest_deselected(items=[item for item in items if item not in dealt])
    items[:] = [item for item in items if item in dealt]


def pytest_collection_finish(session):
    # The backends' modules hold millions of objects, which live as long as the process does.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


def pytest_configure(config):
    # Keras' own tensors, thousands of times.
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation doesn't accept")


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Readline, which the processes of the suite may load, says that they have a terminal."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def own_log(caplog):
    """Keeps what TensorFlow logs out of `caplog`: its warnings depend on earlier tests."""

    def is_own(record):
        return record.name == "absl"

    caplog.handler.addFilter(is_own)
    yield
    caplog.handler.removeFilter(is_own)


@pytest.fixture(autouse=True)
def seed():
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    """Lets LiteRT files that are exported run as often as they must, not for half a second."""
    from keras_bilinear.litert import comparison

    brief = functools.partial(comparison.run_litert, seconds=0.0)
    monkeypatch.setattr(comparison, "run_litert", brief)


@pytest.fixture
def cpu_costs(monkeypatch):
    """Lets `implementation="auto"` choose as on a CPU, also where the suite runs on a GPU."""
    monkeypatch.setattr("keras_bilinear.kronecker.cost.on_gpu", lambda: False)


@pytest.fixture
def run(capsys):
    """Runs a command line in this process: `(status, stdout, stderr)`."""
    from run_command import run_command

    def run(*arguments):
        return run_command(*arguments), *capsys.readouterr()

    return run


@pytest.fixture
def fails(run, tmp_path):
    """Runs a command line that must fail in one line without writing; returns that line."""

    def fails(*arguments):
        before = sorted(tmp_path.rglob("*"))
        status, output, error = run(*arguments)
        assert status == 2
        assert output == ""
        assert error.count("\n") == 1
        assert error.startswith("keras-bilinear: ")
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return fails
