"""Optimizers whose variables change while they train.

Below Keras' public interface: an optimizer's `_trainable_variables`,
`_trainable_variables_indices`, `_var_key`, `_learning_rate`, `_iterations`, `_momentums`,
`_velocities`, `_model_variables_moving_average` and `_exclude_from_weight_decay_cache`; that an
optimizer keeps a list of slots, in the order of the trainable variables, for each of its
statistics; and `LossScaleOptimizer.inner_optimizer`. Keras 3.13 to 3.15.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

# Adam and its kin keep means of the gradients and of their squares, and correct both by the
# number of iterations.
_ADAMS = (keras.optimizers.Adam, keras.optimizers.Nadam, keras.optimizers.Lamb)


def check_optimizer(model: keras.Model) -> None:
    """Checks that `move_optimizer` can give the optimizer of a model other variables.

    Raises:
        ValueError: if the optimizer cannot be made again from its configuration, or if the model
            has further optimizers, which a `train_step` of its own may use.
    """
    compiled = _inner(model.optimizer)
    fresh_optimizer(compiled)
    others = [
        name
        for name, value in vars(model).items()
        if isinstance(value, keras.optimizers.Optimizer) and _inner(value) is not compiled
    ]
    if others:
        raise ValueError(
            f"The model {model.name!r} has optimizers of its own beside its compiled optimizer. "
            "BilinearRewrite cannot give them the new variables. "
            f"Received: {', '.join(map(repr, others))}"
        )


def moments(
    optimizer: keras.optimizers.Optimizer,
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The first and second moments that Adam, Nadam or Lamb keeps of its variables.

    Returns:
        By the `id` of each variable, the running means of its gradient and of the gradient's
        square, at least in float32. Empty for other optimizers and before the first step.
    """
    inner: Any = _inner(optimizer)
    if not inner.built or not isinstance(inner, _ADAMS):
        return {}
    slots = zip(inner._trainable_variables, inner._momentums, inner._velocities, strict=True)
    return {
        id(variable): (_to_numpy(first), _to_numpy(second))
        for variable, first, second in slots
        if first is not None and second is not None
    }


def _to_numpy(variable):
    array = np.asarray(keras.ops.convert_to_numpy(variable))
    # NumPy computes little with half precision, and nothing with bfloat16.
    return array.astype(np.promote_types(array.dtype, "float32"))


def move_optimizer(
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    squares: Mapping[int, np.ndarray] | None = None,
) -> None:
    """Makes a built optimizer train other variables, in place.

    The optimizer keeps its iterations, its learning rate and the slots of the variables that it
    trained before. The slots of new variables start as in a new optimizer.

    Args:
        optimizer: the optimizer.
        variables: the variables to train from now on.
        squares: for Adam and its kin, by the `id` of a new variable, the first value of its second
            moment. `None` starts every new second moment at zero.

    Raises:
        ValueError: if the optimizer cannot be made again from its configuration, or keeps
            statistics of its variables in an unknown way.
    """
    inner = _inner(optimizer)
    moved = fresh_optimizer(inner)
    moved.build(variables)
    _copy_slots(inner, moved, variables, squares or {})
    # Attributes that were set after construction stay, such as those of
    # `exclude_from_weight_decay`.
    attributes = {**vars(inner), **vars(moved)}
    # The cache knows variables by their `id`, which new variables may get again.
    attributes.pop("_exclude_from_weight_decay_cache", None)
    inner.__dict__.clear()
    inner.__dict__.update(attributes)
    if inner is not optimizer:  # a `LossScaleOptimizer`, which lists the variables as well
        optimizer.__dict__["_trainable_variables"] = list(variables)
        optimizer.__dict__["_trainable_variables_indices"] = {
            inner._var_key(variable): index for index, variable in enumerate(variables)
        }


def _copy_slots(old, new, variables, squares):
    """Copies what an optimizer knows into a new optimizer of the same class for other variables.

    Raises:
        ValueError: if the new optimizer has a variable that is neither an attribute nor a slot in
            a list.
    """
    indices = old._trainable_variables_indices
    done = set()

    def copy(target, source):
        # Through NumPy, as JAX gives away the memory of a variable that it updates.
        target.assign(keras.ops.convert_to_numpy(source))
        done.add(id(target))

    for name, slots in vars(new).items():
        if isinstance(slots, keras.Variable):
            copy(slots, vars(old)[name])
        elif isinstance(slots, list) and name not in ("_variables", "_trainable_variables"):
            for variable, slot in zip(variables, slots, strict=False):
                if not isinstance(slot, keras.Variable):
                    continue
                if (key := old._var_key(variable)) in indices:
                    copy(slot, vars(old)[name][indices[key]])
                elif name == "_model_variables_moving_average":
                    copy(slot, variable)
                elif name == "_velocities" and id(variable) in squares:
                    copy(slot, squares[id(variable)])
                done.add(id(slot))
    if done != {id(variable) for variable in new.variables}:
        raise ValueError(
            f"It is not known how the optimizer {type(old).__name__} keeps its statistics of each "
            "variable."
        )


@contextlib.contextmanager
def iterations_kept(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """A context after which the optimizer's number of iterations is what it was."""
    counters = [optimizer._iterations, _inner(optimizer)._iterations]
    values = [keras.ops.convert_to_numpy(counter) for counter in counters]
    yield
    for counter, value in zip(counters, values, strict=True):
        counter.assign(value)


def fresh_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """An optimizer without variables, of the same class and configuration.

    It shares a learning rate schedule with the given optimizer.

    Raises:
        ValueError: if the optimizer cannot be made again from its configuration.
    """
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


def _inner(optimizer) -> keras.optimizers.Optimizer:
    """The optimizer that updates the variables, inside a `LossScaleOptimizer` as well."""
    return getattr(optimizer, "inner_optimizer", optimizer)
