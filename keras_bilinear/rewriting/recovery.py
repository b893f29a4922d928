"""Trains a rewritten model, without labels, to answer as the full model does."""

import math
import numbers
from typing import Any

import keras
import numpy as np
from absl import logging
from keras import ops

from keras_bilinear.data import describe, model_batches
from keras_bilinear.keras_private.graph import stateful_layers
from keras_bilinear.keras_private.normalization import batch_statistics
from keras_bilinear.keras_private.optimizer import fresh_optimizer
from keras_bilinear.kronecker.factorization import check_positive_int
from keras_bilinear.messages import check_choice
from keras_bilinear.rewriting.answers import Examples, StreamedExamples, read_examples, read_inputs
from keras_bilinear.rewriting.output_losses import output_losses

# The range test takes a step at each of these rates. It ends where the loss is so many times the
# least loss before, and the training begins at a share of the rate that is reached there. Trainings
# of an MLP and a CNN were best at 1/20 to 1/3 of it.
_RATES = np.geomspace(1e-5, 2e-2, 40)
_DIVERGED, _SAFE = 4.0, 1 / 6
# The losses of so many steps of the range test are averaged.
_SMOOTH = 5
# Moving statistics of batch normalization are over a fifth of an epoch, or ten batches if that is
# more. Those of few data would else never leave what the full model had.
_WINDOWS, _BATCHES = 5, 10
# Of fewer held-out examples a user is warned. What was best on 6 to 60 of them was worse on others
# in 3 of 12 trainings of an MLP, and on 100 or more in none of 6, however many weights there were.
_ENOUGH = 100


def recover(
    small: keras.Model,
    full: keras.Model,
    data: Any,
    epochs: int = 3,
    loss: Any = "auto",
    optimizer: Any = None,
    batch_size: int = 32,
    validation_split: float = 0.1,
    verbose: int | str = "auto",
) -> keras.Model:
    """Trains a smaller model, without labels, to give the outputs of the full model.

    A part of the examples is held out. The weights that are best on it are kept, be they those
    of an epoch or those from before the first one: `small` never gets worse there. Layers that
    are frozen in `small` stay frozen. Its optimizer, metrics and loss are not used or changed.

    Layers run as in inference, without dropout, but `BatchNormalization` layers that are not
    frozen run as in training.

    Args:
        small: the model to train, such as `rewrite_model` makes it. It is trained in place.
        full: the model whose outputs are learned. It is left untouched.
        data: inputs of the models: an array, a dictionary of arrays, a list with an array for
            each of several inputs, or an iterable of batches, such as a `tf.data.Dataset`. Of
            a tuple of inputs and labels only the inputs count. The more examples there are,
            the better: all of the training data are best. A warning tells if fewer than 100 are
            held out. They are shuffled. What the full
            model makes of them is computed once if it takes at most 1 GiB, together with the
            inputs if these come as an iterable. Otherwise the full model runs in each epoch,
            and an iterable is read anew in each epoch: in its own order, which must be the
            same each time, and its own batches.
        epochs: number of times to go through the training examples.
        loss: `"auto"`; or a loss of Keras or of `keras.distillation`, or a function, which gets
            the outputs of `full` and of `small`; or a dictionary or list with any of these
            for each output. `"auto"` takes the Kullback-Leibler divergence where an output has
            probabilities, or logits, as the loss says that the model is compiled with:
            along the last axis, or of each number where the last activation is a sigmoid or
            the compiled loss is binary. Other outputs get the squared error over their variance.
        optimizer: a Keras optimizer or its name, of which a copy is used. `None` takes Adam. A
            short test at rising rates, after which the weights are restored, finds its
            learning rate, which falls to 0 along a cosine.
        batch_size: number of examples in a training batch.
        validation_split: the share of the examples to hold out, above 0 and below 1. They are
            drawn at random; of an iterable that is read anew, every tenth of the first batches
            is held out if it is 0.1.
        verbose: as in `fit`: 0 is silent, 1 shows a progress bar, 2 prints a line for each
            epoch, and `"auto"` is 1.

    Returns:
        `small`.

    Raises:
        ValueError: if an argument is not valid, if the models have different outputs or
            `small` has nothing to train, if outputs are not finite or no floats, or if a model
            has recurrent layers with `stateful=True`.
        TypeError: if the data are neither arrays nor an iterable of batches.

    Example:

    >>> full = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, "relu"),
    ...                          keras.layers.Dense(10, "softmax")])
    >>> x = np.random.rand(500, 64)
    >>> small = rewrite_model(full, budget=0.5, calibration_data=x)
    >>> small = recover(small, full, x, epochs=2, verbose=0)
    """
    check_positive_int("epochs", epochs)
    check_positive_int("batch_size", batch_size)
    check_choice("verbose", verbose, ("auto", 0, 1, 2))
    if not isinstance(validation_split, numbers.Real) or not 0 < float(validation_split) < 1:
        raise ValueError(
            "`validation_split` must be above 0 and below 1. "
            f"Received: validation_split={validation_split!r}"
        )
    _check_models(small, full)
    batches = model_batches(data, small, "data")
    if batches is None:
        raise ValueError("`data` must be inputs of the model. Received: data=None")
    losses = output_losses(loss, full, small, _first_outputs(small, full, batches))
    shown = 1 if verbose == "auto" else int(verbose)
    steps = len(batches) if isinstance(batches, list) else None
    with _Progress(f"Outputs of {full.name!r}", steps, shown) as progress:
        examples = read_examples(
            full, batches, float(validation_split), batch_size, progress.advance
        )
    if examples.held_out_count < _ENOUGH:
        logging.warning(
            "recover holds out %d examples only, so what is best on them may be worse on others. "
            "Give more `data`, or a larger `validation_split`.",
            examples.held_out_count,
        )
    _Recovery(small, losses, examples, optimizer).train(epochs, shown)
    return small


def check_recovery(model: keras.Model, name: str = "full") -> None:
    """Checks that `recover` can learn from a model, as far as it can be told at once.

    Args:
        model: the model.
        name: what the error text calls it.

    Raises:
        ValueError: if it has states.
    """
    if stateful_layers(model):
        raise ValueError(
            "`recover` shuffles the examples, but the states of layers with `stateful=True` need "
            f"them in order. Received: {name}={model.name!r}"
        )


def _check_models(small, full):
    for name, model in (("small", small), ("full", full)):
        if not isinstance(model, keras.Model) or not model.built:
            raise ValueError(f"`{name}` must be a built Keras model. Received: {describe(model)}")
        check_recovery(model, name)
    if small is full:
        raise ValueError("`small` and `full` must be two models. Received: the same one")
    if not small.trainable_variables:
        raise ValueError(
            f"`small` must have weights to train. Received: {small.name!r}, in which all layers "
            "are frozen"
        )


def _first_outputs(small, full, batches) -> Any:
    """The outputs of the full model for a batch.

    Raises:
        ValueError: if those of the small model differ in number or shapes.
    """
    inputs = read_inputs(next(iter(batches)))
    outputs = full.predict_on_batch(inputs)
    found, expected = (
        [tuple(values.shape[1:]) for values in keras.tree.flatten(values)]
        for values in (small.predict_on_batch(inputs), outputs)
    )
    if found != expected:
        raise ValueError(
            "`small` must have the outputs of `full`. Received: outputs of shapes "
            f"{found} instead of {expected}, without the axis of the examples"
        )
    return outputs


class _Recovery:
    """A training of a small model, with what it needs beside the model.

    Args:
        small: the model.
        losses: a loss for each of its outputs.
        examples: what it learns.
        optimizer: an optimizer, its name, or `None`, see `recover`.
    """

    def __init__(
        self, small: keras.Model, losses, examples: Examples | StreamedExamples, optimizer: Any
    ):
        self._small, self._examples = small, examples
        window = max(_BATCHES, examples.steps / _WINDOWS)
        self._student = _Student(small, losses, momentum=1 - 1 / window)
        self._finds_rate = optimizer is None
        self._optimizer = (
            keras.optimizers.Adam()
            if optimizer is None
            else fresh_optimizer(keras.optimizers.get(optimizer))
        )
        self._student.compile(self._optimizer)
        # In half precision it is another one, which scales the loss.
        self._compiled_optimizer: Any = self._student.optimizer
        self._compiled_optimizer.build(small.trainable_variables)

    def train(self, epochs: int, verbose: int) -> None:
        """Trains the model, and gives it the weights that were best on the held-out examples."""
        first = best = self._held_out_loss()
        weights, best_epoch = self._weights(), 0
        try:
            rate = self._find_rate(verbose) if self._finds_rate else None
            for epoch in range(epochs):
                title = f"Epoch {epoch + 1}/{epochs}"
                with _Progress(title, self._examples.steps, verbose) as progress:
                    self._train_epoch(epoch, epochs, rate, progress)
                    loss = self._held_out_loss()
                    progress.finish(val_loss=loss)
                if loss < best:
                    best, weights, best_epoch = loss, self._weights(), epoch + 1
                if not math.isfinite(loss):
                    logging.warning("recover: the loss is not finite, so the training ends.")
                    break
        finally:  # an interrupted training leaves the best weights as well
            self._set_weights(weights)
        if verbose:
            kept = f"epoch {best_epoch}" if best_epoch else "before the training"
            print(f"Loss on held-out examples: {first:.4g} -> {best:.4g} ({kept})")

    def _train_epoch(self, epoch, epochs, rate, progress):
        for step, (inputs, outputs) in enumerate(self._examples.epoch()):
            if rate is not None:
                share = (epoch + step / self._examples.steps) / epochs
                self._optimizer.learning_rate = rate * (1 + math.cos(math.pi * share)) / 2
            progress.advance(loss=self._step(inputs, outputs))

    def _find_rate(self, verbose: int) -> float:
        """The learning rate at which the losses of training batches begin to rise, and below it."""
        variables = [*self._small.variables, *self._compiled_optimizer.variables]
        before = _to_numpy(variables)
        first, losses = [], []
        with _Progress("Learning rate", 2 * len(_RATES), verbose) as progress:
            # The losses of batches differ, so each counts relative to what it was at first. With a
            # rate of 0, batch normalization runs as in the steps that follow.
            self._optimizer.learning_rate = 0.0
            batches = self._some_batches(len(_RATES))
            for batch in batches:
                first.append(self._step(*batch))
                progress.advance()
            _assign(variables, before)
            for rate, batch, at_first in zip(_RATES, batches, first, strict=True):
                self._optimizer.learning_rate = float(rate)
                losses.append(self._step(*batch) / max(at_first, 1e-12))
                progress.advance()
                if not losses[-1] < 1e6:
                    break
            _assign(variables, before)
        return _safe_rate(np.array(losses))

    def _some_batches(self, count):
        """So many training batches, of several epochs if need be."""
        batches = []
        while len(batches) < count:
            for batch in self._examples.epoch():
                batches.append(batch)
                if len(batches) == count:
                    break
        return batches

    def _step(self, inputs, outputs) -> float:
        self._student.reset_metrics()  # Keras 3.13 gives the mean over batches.
        return _scalar(self._student.train_on_batch(inputs, outputs))

    def _held_out_loss(self) -> float:
        total = count = 0.0
        for inputs, outputs in self._examples.held_out():
            examples = len(outputs[0])
            self._student.reset_metrics()
            total += examples * _scalar(self._student.test_on_batch(inputs, outputs))
            count += examples
        return total / count

    def _weights(self):
        return _to_numpy(self._small.variables)

    def _set_weights(self, values):
        _assign(self._small.variables, values)


class _Student(keras.Model):
    """A model in a model: it trains with an optimizer of its own, and leaves that of the other.

    The losses that layers add, such as regularizers, do not count: the full model was trained with
    them, and its outputs are all that is learned.
    """

    def __init__(self, model: keras.Model, losses: list, momentum: float):
        super().__init__(name="recovery", dtype=model.dtype_policy)
        self.model = model
        self._output_losses = losses
        self._momentum = momentum

    def call(self, inputs, training=None):
        if not training:
            return self.model(inputs, training=False)
        # Dropout and augmentation would keep the outputs apart. Batch normalization, however, must
        # learn the statistics of the rewritten model: a CNN (CIFAR-10, 8,192 examples, a tenth of
        # the parameters) came from a divergence of 0.761 to 0.462 with statistics of batches, and
        # to 0.530 with moving ones that stay (accuracy 0.506 to 0.606 and 0.592, 0.737 in full).
        with batch_statistics(self.model, self._momentum):
            return self.model(inputs, training=False)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        del x, sample_weight, training
        outputs, targets = keras.tree.flatten(y_pred), keras.tree.flatten(y)
        pairs = zip(self._output_losses, targets, outputs, strict=True)
        return sum(loss(target, output) for loss, target, output in pairs)


def _safe_rate(losses: np.ndarray) -> float:
    """The rate to train with, by the losses at the first of the rates of the test."""
    logs = np.log(np.clip(np.nan_to_num(losses, nan=1e6), 1e-6, 1e6))
    around = np.pad(logs, _SMOOTH // 2, "edge")
    smooth = np.convolve(around, np.full(_SMOOTH, 1 / _SMOOTH), "valid")
    diverged = smooth > np.minimum.accumulate(smooth) + math.log(_DIVERGED)
    end = int(np.argmax(diverged)) if diverged.any() else len(losses) - 1
    return float(_RATES[end]) * _SAFE


class _Progress:
    """A progress bar of Keras under a title, as in `fit`.

    Args:
        title: what is going on.
        steps: the number of steps; `None` if it is not known.
        verbose: 0, 1 or 2, see `recover`.
    """

    def __init__(self, title: str, steps: int | None, verbose: int):
        self._title, self._verbose = title, verbose
        self._bar = keras.utils.Progbar(steps, verbose=verbose, stateful_metrics=["val_loss"])
        self._done, self._values = 0, []

    def __enter__(self) -> "_Progress":
        if self._verbose:
            print(self._title)
        return self

    def __exit__(self, *error) -> None:
        if error[0] is None:
            self._bar.target = self._done
            self._bar.update(self._done, self._values, finalize=True)

    def advance(self, **values: float) -> None:
        """Shows that a step is done, and means of its values."""
        self._done += 1
        self._bar.update(self._done, [*values.items()], finalize=False)

    def finish(self, **values: float) -> None:
        """Values to show at the end."""
        self._values = [*values.items()]


def _scalar(loss: Any) -> float:
    return float(np.ravel(loss)[0])


def _to_numpy(variables):
    return [np.array(ops.convert_to_numpy(variable)) for variable in variables]


def _assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
