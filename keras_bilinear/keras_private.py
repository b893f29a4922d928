"""The one place that reaches below the public interface of Keras; tested on Keras 3.13 and 3.15."""

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator

import keras
import numpy as np
from keras.src import backend
from keras.src.layers.core.einsum_dense import _analyze_einsum_string
from keras.src.models.functional import Functional
from keras.src.ops.function import Function

# The loop over time that `keras.layers.RNN` runs its cell in.
rnn = backend.rnn


def analyze_einsum(equation, bias_axes, input_shape, output_shape) -> tuple:
    """The shapes of kernel, bias (or `None`) and outputs of a `keras.layers.EinsumDense`.

    Raises:
        ValueError: if they do not fit.
    """
    shapes = _analyze_einsum_string(equation, bias_axes, input_shape, output_shape)
    return tuple(shape if shape is None else tuple(shape) for shape in shapes[:3])


def nodes(model: keras.Model) -> Iterator[tuple[keras.Operation, list]]:
    """The calls in the graph of a model, in an order in which they can be done.

    Yields:
        `(operation, inputs)`, the inputs but for masks as `(operation that made
        it, shape)`.

    Raises:
        ValueError: if the model is subclassed or not built, so that it has no graph.
    """
    for _, level in sorted(_graph(model)._nodes_by_depth.items(), reverse=True):
        for node in level:
            if not node.is_input:
                tensors = [one for one in node.input_tensors if one.dtype != "bool"]
                yield (
                    node.operation,
                    [(one._keras_history.operation, one.shape) for one in tensors],
                )


def output_operations(model: keras.Model) -> list[keras.Operation]:
    """The operations that make the outputs of a model with a graph."""
    return [tensor._keras_history.operation for tensor in _graph(model).outputs]


def _graph(model):
    graph = getattr(model, "_functional", model)  # a Sequential model keeps its own graph
    if not isinstance(graph, Function):
        raise ValueError(
            "The model must be a built Sequential or a Functional one, whose graph is known. "
            f"Received: model={model!r}"
        )
    return graph


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that a layer holds itself, in the order in which they were attached."""
    return layer._flatten_layers(include_self=False, recursive=False)


def all_layers(model: keras.Model) -> list[keras.Layer]:
    """A model and all layers in it, to any depth."""
    return list(model._flatten_layers())


def own_variables(layer: keras.Layer) -> Iterator[keras.Variable]:
    """The variables of a layer and of those in it; one that several have comes up again."""
    for one in layer._flatten_layers():
        yield from (*one._trainable_variables, *one._non_trainable_variables)


def stateful_layers(model: keras.Model) -> list[keras.layers.RNN]:
    """The recurrent layers that remember their states from call to call."""
    return [one for one in all_layers(model) if isinstance(one, keras.layers.RNN) and one.stateful]


@contextlib.contextmanager
def states_kept(model: keras.Model) -> Iterator[None]:
    """Keeps what layers remember from call to call, as stateful recurrent ones do."""
    layers = all_layers(model)
    states = [one for layer in layers for one in layer._non_trainable_variables]
    states += keras.tree.flatten([one.states for one in stateful_layers(model) if one.built])
    values = [keras.ops.convert_to_numpy(state).copy() for state in states]
    try:
        yield
    finally:
        for state, value in zip(states, values, strict=True):
            if (keras.ops.convert_to_numpy(state) != value).any():
                state.assign(value)


# What ties a layer to the graphs and the layers that hold it.
_PLACE = ("_inbound_nodes", "_outbound_nodes", "_path", "_parent_path", "_called")
# Functions that Keras makes for each object.
_BOUND = ("build", "quantize")


def become(layer: keras.Layer, other: keras.Layer) -> None:
    """Makes a layer another one, which is used up, and keeps it where it is.

    Graphs, attributes, lists and wrappers hold the object, so nothing else
    has to change.
    """
    attributes = {name: value for name, value in vars(other).items() if name not in _BOUND}
    attributes |= {name: vars(layer)[name] for name in _PLACE if name in vars(layer)}
    restore([(layer, type(other), attributes)])


def snapshot(layers: Iterable[keras.Layer]) -> list[tuple]:
    """What layers are now, for `restore`. The values of their variables are not copied."""
    return [(layer, type(layer), dict(vars(layer))) for layer in layers]


def restore(states: Iterable[tuple]) -> None:
    """Makes layers what they were when `snapshot` saw them."""
    for layer, cls, attributes in states:
        set_class(layer, cls)
        vars(layer).clear()
        vars(layer).update(attributes)


def set_class(layer: keras.Layer, cls: type) -> None:
    """Changes the class of a layer, behind the back of its own `__setattr__`."""
    object.__setattr__(layer, "__class__", cls)


def is_functional(layer: keras.Layer) -> bool:
    """Whether a layer is a model that is its graph, and not of a subclass."""
    return type(layer) is Functional


def refresh(model: keras.Model) -> None:
    """Makes a model notice that layers in it have become others."""
    if keras.config.backend() == "torch":
        layers = all_layers(model)
        # A Sequential model holds the graph of its layers, and that holds their variables.
        graphs = [one._functional for one in layers if isinstance(one, keras.Sequential)]
        for layer in (*layers, *filter(None, graphs)):
            layer._track_variables()


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


def check_optimizer(model: keras.Model) -> None:
    """Checks that the optimizer of a model can be made one of other variables.

    Raises:
        ValueError: if not, or if the model has others beside it, as one with a
            `train_step` of its own may.
    """
    _fresh(_inner(model.optimizer))
    others = [
        name
        for name, value in vars(model).items()
        if isinstance(value, keras.optimizers.Optimizer)
        and _inner(value) is not _inner(model.optimizer)
    ]
    if others:
        raise ValueError(
            f"The model {model.name!r} has optimizers of its own beside the one that it is "
            "compiled with, and BilinearRewrite could not give them the new variables. "
            f"Received: {', '.join(map(repr, others))}"
        )


# They keep means of gradients and of their squares, and correct them by the iterations.
_ADAMS = (keras.optimizers.Adam, keras.optimizers.Nadam, keras.optimizers.Lamb)


def moments(optimizer: keras.optimizers.Optimizer) -> dict:
    """What Adam or one of its kin keeps of its variables; nothing of other optimizers.

    Returns:
        By the ids of the variables, means of their gradients and of the squares.
    """
    inner = _inner(optimizer)
    if not inner.built or not isinstance(inner, _ADAMS):
        return {}
    slots = zip(inner._trainable_variables, inner._momentums, inner._velocities, strict=True)
    return {
        id(variable): tuple(map(_to_numpy, pair))
        for variable, *pair in slots
        if all(slot is not None for slot in pair)
    }


def _to_numpy(variable):
    array = keras.ops.convert_to_numpy(variable)
    # NumPy computes little with half precision, and nothing with bfloat16.
    return array.astype(np.promote_types(array.dtype, "float32"))


def move_optimizer(
    optimizer: keras.optimizers.Optimizer, variables: list, squares: dict | None = None
) -> None:
    """Makes a built optimizer one of other variables.

    It keeps its iterations and learning rate, and what it knows of the variables
    that it had; for the others it starts as it would with them.

    Args:
        optimizer: the optimizer.
        variables: those that it is to train.
        squares: for Adam and its kin, by the ids of variables that are new, what
            the means of the squares of their gradients begin with.

    Raises:
        ValueError: if the class of the optimizer cannot be made again.
    """
    old = _inner(optimizer)
    new = _fresh(old)
    new.build(variables)
    index = old._trainable_variables_indices
    done = set()

    def copy(target, source):
        # Through NumPy, as JAX gives away the memory of what it updates.
        target.assign(keras.ops.convert_to_numpy(source))
        done.add(id(target))

    for name, slots in vars(new).items():
        before = vars(old).get(name)
        if isinstance(slots, keras.Variable):
            copy(slots, before)
        elif isinstance(slots, list) and name not in ("_variables", "_trainable_variables"):
            for variable, slot in zip(variables, slots, strict=False):
                if not isinstance(slot, keras.Variable):
                    continue
                if (key := old._var_key(variable)) in index:
                    copy(slot, before[index[key]])
                elif name == "_model_variables_moving_average":
                    copy(slot, variable)
                elif name == "_velocities" and id(variable) in (squares or {}):
                    copy(slot, squares[id(variable)])
                done.add(id(slot))
    if done != {id(variable) for variable in new.variables}:
        raise ValueError(
            f"It is not known how the optimizer {type(old).__name__} keeps what it knows of "
            "each variable."
        )
    # What was set after it was made, such as `exclude_from_weight_decay`, stays.
    attributes = {**vars(old), **vars(new)}
    # By ids of variables, which new ones may get.
    attributes.pop("_exclude_from_weight_decay_cache", None)
    vars(old).clear()
    vars(old).update(attributes)
    if old is not optimizer:
        vars(optimizer)["_trainable_variables"] = list(variables)
        vars(optimizer)["_trainable_variables_indices"] = {
            old._var_key(variable): number for number, variable in enumerate(variables)
        }


@contextlib.contextmanager
def iterations_kept(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Keeps the number of iterations while the variables of an optimizer are loaded."""
    counters = [one._iterations for one in (optimizer, _inner(optimizer))]
    values = [keras.ops.convert_to_numpy(counter) for counter in counters]
    yield
    for counter, value in zip(counters, values, strict=True):
        counter.assign(value)


def _inner(optimizer):
    return getattr(optimizer, "inner_optimizer", optimizer)


def _fresh(optimizer):
    config = optimizer.get_config()
    if not isinstance(optimizer._learning_rate, keras.Variable):  # a schedule
        config["learning_rate"] = optimizer._learning_rate
    try:
        return type(optimizer).from_config(config)
    except Exception as error:
        raise ValueError(
            f"The optimizer {type(optimizer).__name__} cannot be made again from its "
            f"configuration. {type(error).__name__}: {error}"
        ) from error


def retrace(model: keras.Model) -> None:
    """Makes a model trace its functions for training, evaluation and prediction again."""
    model.train_function = model.test_function = model.predict_function = None
    model.make_train_function(force=True)
