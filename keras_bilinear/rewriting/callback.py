"""The callback that rewrites a model during `fit`: it connects Keras' hooks with the rest.

When is in `schedule`, whether the model has got worse in `metric_watch`, how layers change in
`in_training`, what a step is undone with in `undo`, and what a killed training has to know in
`journal`.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import cast

import keras
from absl import logging

from keras_bilinear.data import model_batches
from keras_bilinear.keras_private.optimizer import check_optimizer
from keras_bilinear.messages import check_choice
from keras_bilinear.rewriting.choice import Choices
from keras_bilinear.rewriting.data_checks import other_inputs
from keras_bilinear.rewriting.in_training import ModelInTraining
from keras_bilinear.rewriting.journal import History, Journal, Step, check_backup_dir
from keras_bilinear.rewriting.limits import LayerChoice, Limits, PlanOptions
from keras_bilinear.rewriting.metric_watch import MetricWatch
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.planner import check_plan_exists
from keras_bilinear.rewriting.schedule import due_epoch, parse_schedule
from keras_bilinear.rewriting.tensorboard import show_errors
from keras_bilinear.rewriting.training_batches import training_batches
from keras_bilinear.rewriting.trial import check_version
from keras_bilinear.rewriting.undo import WeightsBefore


class BilinearRewrite(keras.callbacks.Callback):
    """Rewrites a model into a smaller one while `fit` trains it.

    At the beginning of an epoch with a step, layers of the model become bilinear in place,
    fitted to their inputs as `rewrite_model` fits them. The model, its history, metrics and
    optimizer stay the same objects. The optimizer keeps what it knows of the variables that
    stay, and starts as usual with the new factors. Adam and its kin, however, begin with an
    estimate of the squares of their gradients, from what they know of the kernel: without it,
    the first steps would be several times too large.

    A schedule of several budgets makes the model smaller in steps, in which bilinear layers
    get lower ranks. Each step plans and fits anew, so it takes time.
    `benchmarks/callback.py` measures what schedules bring.

    `EarlyStopping` and `ModelCheckpoint` beside this callback compare only models of one
    size: their best value starts anew with each step. In a `keras.distillation.Distiller`
    the student is rewritten. The logs of each epoch have the number of `parameters` of the
    model, and `TensorBoard` shows the predicted error of each layer at each step.

    Other models that hold a rewritten layer, such as an encoder inside the model or a second
    model on the same layers, go on with it: they trace their functions again, and their
    optimizers get the new variables. Where an optimizer cannot, a warning names the model to
    compile again. What you have traced yourself, by `tf.function` or `jax.jit`, you must
    trace again.

    Args:
        at_epoch: the epoch at whose beginning the model is rewritten, counted from 0 as
            `initial_epoch` is. `None` if there is a `schedule`.
        budget: the share of the full model's parameters to keep at `at_epoch`, above 0 and
            at most 1; `None` means 0.1.
        schedule: instead of both, a mapping from epochs to budgets. Each budget must be
            smaller than the budget before it. `None` if there is an `at_epoch`.
        calibration_data: inputs of the model: an array, a dictionary of arrays, a list
            with an array for each of several inputs, or an iterable of batches, such as
            a `tf.data.Dataset`. Of a tuple of inputs and labels only the inputs count.
            `None` takes 1024 examples of the training data: spread over arrays, or the
            first of a data set.
        layers: the layers that may be rewritten; `None` for all layers. Paths (those of a
            plan, or `layer.path`), compiled regular expressions that are found in a path of
            a plan, layers, classes of layers, or functions that get a layer and return
            whether it may be rewritten; alone or in a list. The path of a layer that holds
            others, this layer and its class stand for the layers in it. Or a
            mapping from the paths of some layers to their rank, with near-square
            factors, or to `None`, which leaves the layer alone.
        low_rank: whether layers may get the factors of kernels of low rank: two plain
            layers, one after the other. These are often nearest to a trained kernel, and
            fast to fit. Near-square factors can learn more where the model is trained on
            for long.
        monitor: name of a metric in the logs, such as `"val_accuracy"`, which must not drop
            by more than `max_drop`. `None` watches no metric.
        mode: `"min"` if a smaller metric is better, `"max"` if a larger metric is better,
            or `"auto"`, which knows the metrics of Keras.
        max_drop: how much worse than before the first step the metric may be, in the
            metric's own unit. The callback looks at it before the next step, and at the end
            of the training. `None` if there is no `monitor`.
        on_drop: what to do if the metric is worse: `"stop"` makes no more steps; `"undo"`
            also takes back the last step: all weights are then what they were before it.
        on_error: what to do if a step fails: `"raise"` ends the training, `"continue"` goes
            on training. The model is what it was before the step either way.
        backup_dir: the folder of a `keras.callbacks.BackupAndRestore` beside this callback,
            which must come after it in the list of callbacks. A training that was killed
            then goes on with the model as it was rewritten. `None` if there is no backup.
        verbose: 1 prints a line for each step; 0 prints nothing.
        exclude: layers that are left alone, chosen as `layers` are, but for the mapping;
            `None` for no such layers. It goes before `layers`.
            `exclude=[model.layers[0], model.layers[-1]]` keeps the first and the last layer.

    Attributes:
        plan: the `RewritePlan` of the last step; `None` before the first step.

    Raises:
        ValueError: if an argument is not valid. In `fit`: if no plan keeps to the smallest
            budget, if the training data can be read only once and there are no calibration
            data, if the logs do not have the metric, if the model has optimizers beside the
            optimizer that it is compiled with, or if the backup is of another model.
        RuntimeError: if this version of Keras does not allow it, as a tiny model shows where
            the tests of this package do not run with the version. In `fit`: if a step fails
            and `on_error` is `"raise"`.

    Example:

    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(256, "relu"),
    ...                           keras.layers.Dense(10)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.random.rand(256, 64), np.random.rand(256, 10)
    >>> callback = BilinearRewrite(at_epoch=1, budget=0.25)
    >>> history = model.fit(x, y, epochs=3, callbacks=[callback], verbose=0)
    >>> sizes = history.history["parameters"]
    >>> sizes[0], sizes[1] == sizes[2] <= 0.25 * sizes[0]
    (19210, True)
    """

    def __init__(
        self,
        at_epoch: int | None = None,
        budget: float | None = None,
        schedule: Mapping[int, float] | None = None,
        calibration_data=None,
        layers: LayerChoice = None,
        low_rank: bool = True,
        monitor: str | None = None,
        mode: str = "auto",
        max_drop: float | None = None,
        on_drop: str = "stop",
        on_error: str = "raise",
        backup_dir: str | os.PathLike | None = None,
        verbose: int = 0,
        exclude: Choices | None = None,
    ):
        super().__init__()
        check_version()
        self.schedule = parse_schedule(at_epoch, budget, schedule)
        self.calibration_data = calibration_data
        self.layers, self.low_rank, self.exclude = layers, low_rank, exclude
        self._choices = PlanOptions(layers=layers, low_rank=low_rank, exclude=exclude)
        self.monitor, self.mode, self.max_drop = monitor, mode, max_drop
        self._start(None)
        if monitor is not None and 0 in self.schedule:
            raise ValueError(
                "Before epoch 0 there is no metric to compare with. "
                f"Received: monitor={monitor!r}, schedule={self.schedule!r}"
            )
        check_choice("on_drop", on_drop, ("stop", "undo"))
        check_choice("on_error", on_error, ("raise", "continue"))
        self.on_drop, self.on_error, self.verbose = on_drop, on_error, verbose
        self.backup_dir = None if backup_dir is None else check_backup_dir(backup_dir)
        self._weights_before = WeightsBefore(self.backup_dir)
        self._journal = Journal(self.backup_dir)

    @property
    def plan(self) -> RewritePlan | None:
        return self._history.plan

    def set_model(self, model: keras.Model) -> None:
        """Called by Keras. Takes a model to where a training that was killed had come."""
        super().set_model(model)
        if model is not None and model is not self._known:
            self._start(model)
            self._resume()

    def on_train_begin(self, logs=None) -> None:
        """Called by Keras. Finds mistakes before the training takes time."""
        del logs
        check_optimizer(self._training.model)
        self.calibration_data = model_batches(self.calibration_data, self._training.target)
        if not self._history.steps:
            check_plan_exists(self._training.target, self._options(min(self.schedule.values())))
        if self.calibration_data is None and isinstance(self._training.inputs, Iterator):
            raise ValueError(
                "The training data can be read only once, so they are no calibration data: give "
                "`calibration_data` to BilinearRewrite."
            )

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        """Called by Keras. Makes the step that is due, unless the metric has dropped."""
        del logs
        due = due_epoch(self.schedule, self._history.last_epoch, epoch)
        if due is None or self._history.stopped:
            return
        self._training.take_averages_out(epoch)
        if self._has_dropped(epoch):
            self._stop(epoch)
        else:
            self._step(due)

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        """Called by Keras. Adds the number of parameters to the logs, and notes the metric."""
        logs = {} if logs is None else logs
        logs["parameters"] = self._training.target.count_params()
        if self._watch.note(epoch, logs):
            self._journal.write(self._history, self._watch.values)

    def on_train_end(self, logs=None) -> None:
        """Called by Keras. Looks at what the last step did to the metric."""
        del logs
        if not self._history.stopped and self._has_dropped(math.inf):
            self._stop(max(self._watch.values) + 1)

    def _start(self, model):
        """Begins anew with a model."""
        self._known = model
        self._history = History()
        self._watch = MetricWatch(self.monitor, self.mode, self.max_drop)

    def _resume(self):
        """Gives the model the layers whose weights are in the backup, if there is a backup."""
        found = self._journal.read()
        if found is None:
            return
        history, values = found
        # The last steps may have come after the backup.
        for done in history.shortened():
            self._training.set_layers(done.plan, now=self.plan)
            self._history = done
            if self._journal.backup_fits(self._training.model):
                self._watch.values = values
                return
        raise ValueError(
            f"The weights in {str(self.backup_dir)!r} fit the model "
            f"{self._training.target.name!r} neither as it is nor as it was rewritten."
        )

    @property
    def _training(self) -> ModelInTraining:
        return ModelInTraining(cast(keras.Model, self.model))

    def _options(self, budget: float) -> PlanOptions:
        return dataclasses.replace(self._choices, limits=Limits(budget))

    def _has_dropped(self, until: float) -> bool:
        """Whether the last step made the metric worse than it may be."""
        if self.plan is None:
            return False
        first, *_ = self._history.steps
        return self._watch.has_dropped(first.epoch, self._history.last_epoch, until, self)

    def _step(self, epoch: int) -> None:
        """Makes the model smaller, or leaves it as it was."""
        training = self._training
        try:
            batches = self.calibration_data
            if batches is None:
                batches = list(training_batches(training.inputs))
            else:
                self._warn_of_other_inputs(batches)
            undo = self.on_drop == "undo"
            keeping = self._weights_before.kept(training.model) if undo else None
            with keeping or contextlib.nullcontext():
                options = self._options(self.schedule[epoch])
                plan = training.rewrite(options, batches, now=self.plan)
        except Exception as error:
            text = (
                f"The step of BilinearRewrite at epoch {epoch} failed, and "
                f"{training.target.name!r} is what it was before. {error}"
            )
            if self.on_error == "raise":
                raise RuntimeError(text) from error
            logging.error("%s", text)
            self._note(Step(epoch, len(self._history.plans)))
        else:
            self._history.plans.append(plan)
            self._note(Step(epoch, len(self._history.plans)))
            self._say(epoch, f"{plan.full_parameters:,} parameters become {plan.parameters:,}")
            show_errors(training.callbacks, epoch, plan)

    def _warn_of_other_inputs(self, batches) -> None:
        """Warns if calibration data are not scaled as the training data are.

        Early in a training, `BatchNormalization` knows little of what it is trained on: then the
        training data differ from it as well.
        """
        target, inputs = self._training.target, self._training.inputs_or_none
        warning = other_inputs(target, batches)
        if warning is None:
            return
        readable = inputs is not None and not isinstance(inputs, Iterator)
        if not readable or not other_inputs(target, list(training_batches(inputs))):
            logging.warning("%s", warning)

    def _stop(self, epoch: int) -> None:
        """Makes no more steps, and undoes the last step if `on_drop` asks for it."""
        plans, what = len(self._history.plans), "no more steps are made"
        # After a `fit` that ended well, the weights are gone as the backup is.
        if self.on_drop == "undo" and self._weights_before.exist():
            plans -= 1
            before = self._history.plans[plans - 1] if plans else None
            self._training.set_layers(before, now=self.plan)
            self._weights_before.give_back(self._training.model)
            what = "the last step is undone"
        self._note(Step(epoch, plans, stopped=True))
        self._say(epoch, f"{self.monitor} has dropped by more than {self.max_drop}; {what}")

    def _note(self, step: Step) -> None:
        self._history.steps.append(step)
        self._journal.write(self._history, self._watch.values)

    def _say(self, epoch: int, text: str) -> None:
        logging.info("Epoch %d: %s", epoch, text)
        if self.verbose:
            print(f"\nEpoch {epoch + 1}: BilinearRewrite: {text}")
