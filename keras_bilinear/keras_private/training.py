"""What `compile` and `fit` keep of a model."""

import contextlib
import re
import sys
from collections.abc import Iterable

import keras

from keras_bilinear.keras_private.optimizer import _fresh


def compile_alike(model: keras.Model, other: keras.Model) -> None:
    """Compiles a model as another one is, with an optimizer and metrics of its own.

    Not by the configuration, which knows only what is registered: losses and metrics
    may be any functions.
    """
    if type(other).compile is not keras.Model.compile:  # it says itself how
        model.compile_from_config(other.get_compile_config())
        return
    arguments = dict(other._compile_config.config)
    optimizer = arguments.pop("optimizer")
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.tree.map_structure(_own_metric, arguments[name])
    model.compile(optimizer and _fresh(optimizer), **arguments)
    if model.optimizer:
        model.optimizer.build(model.trainable_variables)


def _own_metric(metric):
    if not isinstance(metric, keras.Metric):
        return metric
    return type(metric).from_config(metric.get_config())


# Versions of Keras whose training loop and optimizers `BilinearRewrite` knows.
_KNOWN = ((3, 13), (3, 15))


# Where a `keras.callbacks.BackupAndRestore` has the weights, and those before.
BACKUPS = ("latest.weights.h5", "latest.weights.h5.bkp")


def check_version() -> None:
    """Checks that training can be changed while it runs with this version of Keras.

    Raises:
        RuntimeError: if not.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", keras.__version__)[:2])
    if not _KNOWN[0] <= version <= _KNOWN[1]:
        low, high = (".".join(map(str, one)) for one in _KNOWN)
        raise RuntimeError(
            "BilinearRewrite changes a model inside `fit`, which is known to work with Keras "
            f"{low} to {high}. Found: Keras {keras.__version__}. `rewrite_model` needs no such "
            "knowledge."
        )


def fit_arguments(model: keras.Model) -> dict:
    """Inputs `x` and `callbacks` of the call of `fit` that goes on; empty if there is none."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is model:
            # A list of the user at first, and one of Keras later.
            callbacks = frame.f_locals["callbacks"]
            callbacks = getattr(callbacks, "callbacks", callbacks)
            return {"x": frame.f_locals["x"], "callbacks": keras.tree.flatten(callbacks)}
        frame = frame.f_back
    return {}


def strategy_scope(model: keras.Model) -> contextlib.AbstractContextManager:
    """Where variables of a model are made; matters under a `tf.distribute` strategy."""
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def higher_is_better(callback: keras.callbacks.Callback, monitor: str, mode: str) -> bool:
    """Whether a metric is to become larger, as Keras' own callbacks find it out.

    Raises:
        ValueError: if that is not known.
    """
    judge = keras.callbacks.EarlyStopping(monitor, mode=mode)
    judge.set_model(callback.model)
    judge._set_monitor_op()
    return bool(judge.monitor_op(1, 0))


def forget_best(callbacks: Iterable[keras.callbacks.Callback]) -> None:
    """Makes callbacks compare with what comes, and not with weights of other shapes."""
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.EarlyStopping):
            callback.best, callback.best_weights, callback.wait = None, None, 0
        elif isinstance(callback, keras.callbacks.ModelCheckpoint):
            callback.best = None


def retrace(model: keras.Model) -> None:
    """Makes a model trace its functions for training, evaluation and prediction again."""
    model.train_function = model.test_function = model.predict_function = None
    model.make_train_function(force=True)
