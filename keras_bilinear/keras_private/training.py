"""What `compile` and `fit` keep of a model while it trains.

Below Keras' public interface: `Model._compile_config`, the local variables `callbacks` and `x` of
`Model.fit`, `EarlyStopping._set_monitor_op`, the state of `EarlyStopping` and `ModelCheckpoint`,
the file names of `BackupAndRestore`, and `train_function`, `test_function` and `predict_function`
of a model, each with the method that makes it. Keras 3.13 to 3.15.
"""

import contextlib
import gc
import re
import sys
from collections.abc import Iterable
from typing import Any

import keras

from keras_bilinear.keras_private.graph import all_layers
from keras_bilinear.keras_private.optimizer import fresh_optimizer

# The first and the last version of Keras that the tests run with.
TESTED = ("3.13", "3.15")
# Files in the folder of a `keras.callbacks.BackupAndRestore`: latest weights, weights before them.
BACKUPS = ("latest.weights.h5", "latest.weights.h5.bkp")


def compile_alike(model: keras.Model, other: keras.Model) -> None:
    """Compiles a model like another model, with an optimizer and metrics of its own.

    It passes on the arguments of `compile` and not their configuration: losses and metrics may be
    functions that no configuration describes.

    Args:
        model: the model to compile.
        other: a compiled model.

    Raises:
        ValueError: if the optimizer cannot be made again from its configuration.
    """
    if type(other).compile is not keras.Model.compile:  # the class says itself how to compile
        model.compile_from_config(other.get_compile_config())
        return
    arguments = dict(other._compile_config.config)
    optimizer = arguments.pop("optimizer")
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.tree.map_structure(_own_metric, arguments[name])
    model.compile(optimizer and fresh_optimizer(optimizer), **arguments)
    if model.optimizer:
        model.optimizer.build(model.trainable_variables)


def _own_metric(metric):
    if not isinstance(metric, keras.Metric):
        return metric
    return type(metric).from_config(metric.get_config())


def is_tested(version: str) -> bool:
    """Whether a version of Keras is among those from the first to the last of `TESTED`."""
    first, found, last = (
        tuple(int(part) for part in re.findall(r"\d+", text)[:2])
        for text in (TESTED[0], version, TESTED[1])
    )
    return first <= found <= last


def fit_arguments(model: keras.Model) -> dict[str, Any]:
    """The arguments of the running call of a model's `fit`.

    Returns:
        `{"x": inputs, "callbacks": list of callbacks}`; empty outside of `fit`.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is model:
            # The user's list at first, and Keras' `CallbackList` later.
            callbacks = frame.f_locals["callbacks"]
            callbacks = getattr(callbacks, "callbacks", callbacks)
            return {"x": frame.f_locals["x"], "callbacks": keras.tree.flatten(callbacks)}
        frame = frame.f_back
    return {}


def strategy_scope(model: keras.Model) -> contextlib.AbstractContextManager:
    """The context in which to make variables of a model, which a `tf.distribute` strategy needs."""
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def higher_is_better(callback: keras.callbacks.Callback, monitor: str, mode: str) -> bool:
    """Whether training should raise a metric, by the rules of `keras.callbacks.EarlyStopping`.

    Args:
        callback: a callback of a model that is compiled.
        monitor: name of the metric in the logs.
        mode: `"min"`, `"max"`, or `"auto"` to find out by the metric.

    Raises:
        ValueError: if `mode` is `"auto"` and Keras does not know the metric's direction.
    """
    judge: Any = keras.callbacks.EarlyStopping(monitor, mode=mode)
    judge.set_model(callback.model)
    judge._set_monitor_op()
    return bool(judge.monitor_op(1, 0))


def metric_direction(metric: keras.metrics.Metric) -> str | None:
    """Which is better for a metric, `"max"` or `"min"`; `None` if Keras does not know it."""
    return {"up": "max", "down": "min"}.get(getattr(metric, "_direction", "") or "")


def forget_best(callbacks: Iterable[keras.callbacks.Callback]) -> None:
    """Makes `EarlyStopping` and `ModelCheckpoint` start their search for the best epoch again.

    The best weights so far may have the shapes of layers that were replaced.
    """
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.EarlyStopping):
            callback.best, callback.best_weights, callback.wait = None, None, 0
        elif isinstance(callback, keras.callbacks.ModelCheckpoint):
            callback.best = None


def models_with(layers: Iterable[keras.Layer]) -> list[keras.Model]:
    """The built models of this process that hold one of some layers, at any depth.

    Python's garbage collector knows them: a layer does not know the models that hold it.
    """
    wanted = {id(layer) for layer in layers}
    # Not by `isinstance`, which asks the object for its class and may run any code.
    objects = [found for found in gc.get_objects() if issubclass(type(found), keras.Model)]
    models = [found for found in objects if getattr(found, "built", False)]
    return [model for model in models if not wanted.isdisjoint(map(id, all_layers(model)))]


def retrace(model: keras.Model) -> None:
    """Makes a model trace its functions for training, evaluation and prediction again."""
    forget_functions(model)
    model.make_train_function(force=True)


def forget_functions(model: keras.Model) -> None:
    """Makes a model trace its functions again when it needs them.

    They are those of Keras, and those that other classes keep in the same way: in an attribute
    `name_function` that a method `make_name_function` sets where it is `None`, as the
    `generate_function` of a language model of KerasHub.
    """
    for name in traced_functions(model):
        setattr(model, name, None)


def traced_functions(model: keras.Layer) -> list[str]:
    """The names of the attributes with the functions that a model traces."""
    return [
        name
        for name in vars(model)
        if name.endswith("_function") and callable(getattr(model, f"make_{name}", None))
    ]
