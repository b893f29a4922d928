"""Whether a model can be rewritten inside `fit` with a version of Keras that no test has seen."""

import functools
import random

import keras
import numpy as np
from absl import logging

from keras_bilinear.keras_private.training import TESTED, is_tested
from keras_bilinear.rewriting.in_training import ModelInTraining
from keras_bilinear.rewriting.limits import PlanOptions

# Enough examples for a batch on each of many devices.
_EXAMPLES = 64
_NAME = "keras_bilinear_trial"


def check_version() -> None:
    """Checks that this version of Keras lets a model change inside `fit`.

    With a version that the tests do not run with, a tiny model is trained and rewritten, once
    in a process. A warning says that this went well.

    Raises:
        RuntimeError: if it did not.
    """
    if not is_tested(keras.__version__):
        _try_once(keras.__version__)


@functools.cache
def _try_once(version):
    tested = f"The tests of this package run with Keras {TESTED[0]} to {TESTED[1]}"
    try:
        _try()
    except Exception as error:
        raise RuntimeError(
            f"BilinearRewrite changes a model inside `fit`, and a tiny model could not be changed "
            f"so with this version of Keras. {tested}. Found: Keras {version}. Use "
            f"`rewrite_model`, which does not need `fit`. {type(error).__name__}: {error}"
        ) from error
    logging.warning(
        "%s. Found: Keras %s. A tiny model was rewritten inside `fit` as it must be, so "
        "BilinearRewrite goes on.",
        tested,
        version,
    )


def _try() -> None:
    """Rewrites a tiny model between two steps of its training.

    Raises:
        Exception: whatever Keras raises.
        AssertionError: if the model or its optimizer is not what it must be.
    """
    state = random.getstate()  # Keras draws the seeds of layers from it
    try:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(_EXAMPLES, 4)).astype("float32")
        # Names and dtypes of their own: the trial must change no name and ask for no policy.
        layers = [
            keras.layers.Dense(units, use_bias=False, dtype="float32", name=f"{_NAME}_{name}")
            for name, units in (("hidden", 4), ("head", 2))
        ]
        inputs = keras.Input((4,), name=f"{_NAME}_inputs", dtype="float32")
        model = keras.Sequential([inputs, *layers], name=_NAME)
        optimizer = keras.optimizers.Adam(0.01, name=f"{_NAME}_adam")
        model.compile(optimizer, "mse", jit_compile=False)
        step = _Step(x)
        model.fit(
            x, x[:, :2], batch_size=_EXAMPLES, epochs=2, shuffle=False, verbose=0, callbacks=[step]
        )
        step.check()
    finally:
        random.setstate(state)


class _Step(keras.callbacks.Callback):
    """Rewrites the tiny model before its second step, and looks at what the step did."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def on_epoch_begin(self, epoch, logs=None):
        del logs
        if epoch != 1:
            return
        training = ModelInTraining(self.model)
        if training.inputs is not self.x:
            raise AssertionError("the inputs of `fit` are not found")
        before = self._outputs()
        # At this rank the factors store the kernel exactly.
        options = PlanOptions(layers={f"{_NAME}_hidden": 4})
        training.rewrite(options, None, now=None)
        np.testing.assert_allclose(self._outputs(), before, atol=1e-4)
        self.before = [np.array(w) for w in self.model.get_weights()]

    def check(self):
        """Checks that the second step trained all that the rewrite made, and nothing else."""
        model = self.model
        for variable, before in zip(model.weights, self.before, strict=True):
            if np.array_equal(keras.ops.convert_to_numpy(variable), before):
                raise AssertionError(f"a step did not train {variable.path}")
        if int(model.optimizer.iterations) != 2:
            raise AssertionError("the optimizer lost its iterations")
        predicted = model.predict(self.x, batch_size=_EXAMPLES, verbose=0)
        np.testing.assert_allclose(predicted, self._outputs(), atol=1e-4)

    def _outputs(self):
        return keras.ops.convert_to_numpy(self.model(self.x, training=False))
