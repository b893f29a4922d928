import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The suite compiles thousands of small functions and runs each of them once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import keras
import pytest

pytest.register_assert_rewrite("layer_checks")

hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    # JAX compiles anew for each shape that is drawn.
    max_examples=5 if keras.backend.backend() == "jax" else 20,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


def pytest_configure(config):
    # Keras' own tensors, thousands of times.
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation doesn't accept")


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)
