"""Optimizers whose variables change while they train."""

import contextlib
from collections.abc import Iterator

import keras
import numpy as np


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
