"""When a model is rewritten during `fit`; how is in `rewrite`."""

import contextlib
import dataclasses
import itertools
import json
import math
import numbers
import operator
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping

import h5py
import keras
from absl import logging

from keras_bilinear.data import model_batches
from keras_bilinear.files import check_writable, staged
from keras_bilinear.keras_private.graph import all_layers
from keras_bilinear.keras_private.optimizer import (
    check_optimizer,
    iterations_kept,
    moments,
    move_optimizer,
)
from keras_bilinear.keras_private.surgery import refresh, restore, snapshot
from keras_bilinear.keras_private.training import (
    BACKUPS,
    check_version,
    fit_arguments,
    forget_best,
    higher_is_better,
    retrace,
    strategy_scope,
)
from keras_bilinear.layers.converter import full_converter
from keras_bilinear.rewriting import adam
from keras_bilinear.rewriting.limits import Limits, PlanOptions
from keras_bilinear.rewriting.owners import store_replacement
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.planner import check_plan_exists, plan_rewrite
from keras_bilinear.rewriting.rewrite import expand_layers, rewrite_layers
from keras_bilinear.rewriting.sites import walk

# So many training examples are calibration data, where none are given.
EXAMPLES = 1024
_BATCH = 128
_STATE = "bilinear_rewrite.json"
_WEIGHTS_BEFORE = "before_bilinear_rewrite.weights.h5"


class BilinearRewrite(keras.callbacks.Callback):
    """Rewrites a model into a smaller one while `fit` trains it.

    Layers of the model become bilinear in place: the model, its history, metrics
    and optimizer are the same ones afterwards. The optimizer keeps what it knows
    of the variables that stay, and starts as usual with the new factors; but Adam
    and its kin begin with what they know of the kernel for the squares of their
    gradients, as the first steps would otherwise be several times too large. A
    schedule of several budgets makes the model smaller in steps, in which bilinear
    layers get lower ranks; each step plans and fits anew, so several take longer than
    one. What schedules bring is measured by `benchmarks/callback.py`.

    At the beginning of an epoch with a step, a full layer is fitted to its inputs,
    see `rewrite_model`. `EarlyStopping` and `ModelCheckpoint` beside it compare
    only models of one size: their best value starts anew with each step. In a
    `keras.distillation.Distiller` the student is rewritten. Each epoch's logs have
    the number of `parameters` of the model, and `TensorBoard` shows the predicted
    error of each layer at each step.

    Args:
        at_epoch: the epoch, counted from 0 as in `initial_epoch`, at whose
            beginning the model is rewritten.
        budget: the share of the parameters of the full model to keep; 0.1 by
            default.
        schedule: instead of both, a mapping from epochs to budgets, each smaller
            than the one before it.
        calibration_data: inputs of the model, see `plan_rewrite`. By default
            1024 examples, spread over the training data or the first of a data
            set.
        layers: see `plan_rewrite`.
        low_rank: see `plan_rewrite`.
        monitor: name of a metric in the logs, such as `"val_accuracy"`.
        mode: `"min"`, `"max"`, or `"auto"`, which knows the metrics of Keras.
        max_drop: how much worse than before the first step the metric may be. It
            is looked at before the next step, and at the end of the training.
        on_drop: what to do if it is worse: `"stop"` rewriting, or `"undo"`
            the last step as well, with all weights what they were before it.
        on_error: what to do if a step fails: `"raise"`, or `"continue"` training
            the model, which is as it was before the step either way.
        backup_dir: the folder of a `keras.callbacks.BackupAndRestore` beside this
            callback. A training that was killed then goes on with the model as it
            was rewritten. List this callback first.
        verbose: 1 prints a line for each step.

    Attributes:
        plan: the `RewritePlan` of the last step; `None` before the first.

    Raises:
        ValueError: if an argument is not valid; in `fit`, if the calibration data
            are missing and the training data can be read only once, or if the
            model has optimizers beside the one that it is compiled with.
        RuntimeError: if the version of Keras is not known to allow it; in `fit`,
            if a step fails.

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
        layers: Iterable[str] | Mapping[str, int | None] | None = None,
        low_rank: bool = True,
        monitor: str | None = None,
        mode: str = "auto",
        max_drop: float | None = None,
        on_drop: str = "stop",
        on_error: str = "raise",
        backup_dir: str | os.PathLike | None = None,
        verbose: int = 0,
    ):
        super().__init__()
        check_version()
        self.schedule = _schedule(at_epoch, budget, schedule)
        self.calibration_data = calibration_data
        self.layers, self.low_rank = layers, low_rank
        if (monitor is None) != (max_drop is None):
            raise ValueError(
                "`monitor` and `max_drop` belong together. "
                f"Received: monitor={monitor!r}, max_drop={max_drop!r}"
            )
        if monitor is not None and 0 in self.schedule:
            raise ValueError(
                "Before epoch 0 there is no metric to compare with. "
                f"Received: monitor={monitor!r}, schedule={self.schedule!r}"
            )
        if max_drop is not None and not 0 <= max_drop < math.inf:
            raise ValueError(f"`max_drop` must be 0 or more. Received: max_drop={max_drop!r}")
        _check_choice("mode", mode, ("auto", "min", "max"))
        _check_choice("on_drop", on_drop, ("stop", "undo"))
        _check_choice("on_error", on_error, ("raise", "continue"))
        self.monitor, self.mode, self.max_drop = monitor, mode, max_drop
        self.on_drop, self.on_error, self.verbose = on_drop, on_error, verbose
        self.backup_dir = None if backup_dir is None else _writable(backup_dir)
        self._temporary = None
        self._forget(None)

    @property
    def plan(self) -> RewritePlan | None:
        plans = self._steps[-1].plans if self._steps else 0
        return self._plans[plans - 1] if plans else None

    def set_model(self, model: keras.Model) -> None:
        """Called by Keras; takes a model to where a training that was killed had come."""
        super().set_model(model)
        if model is not None and model is not self._known:
            self._forget(model)
            if self.backup_dir is not None:
                self._resume()

    def on_train_begin(self, logs=None) -> None:
        del logs
        check_optimizer(self.model)
        self.calibration_data = model_batches(self.calibration_data, self._target)
        if not self._steps:
            limits = Limits(budget=min(self.schedule.values()))
            options = PlanOptions(limits, layers=self.layers, low_rank=self.low_rank)
            check_plan_exists(self._target, options)
        if self.calibration_data is None and isinstance(self._training_inputs(), Iterator):
            raise ValueError(
                "The training data can be read only once, so they are no calibration data: give "
                "`calibration_data` to BilinearRewrite."
            )

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        del logs
        last = self._steps[-1] if self._steps else _Step(-1, 0)
        due = [at for at in self.schedule if last.epoch < at <= epoch]
        if not due or last.stopped:
            return
        for callback in fit_arguments(self.model).get("callbacks", []):
            if isinstance(callback, keras.callbacks.SwapEMAWeights):
                # Takes the averages out of the model, which else it does after this callback.
                callback.on_epoch_begin(epoch)
        if self._has_dropped(epoch):
            self._stop(epoch)
        else:
            self._step(due[-1])

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        logs = {} if logs is None else logs
        validated = any(name.startswith("val_") for name in logs)
        logs["parameters"] = self._target.count_params()
        if self.monitor in logs:
            self._values[epoch] = float(logs[self.monitor])
            self._write()
        elif self.monitor is not None and (validated or not self.monitor.startswith("val_")):
            raise ValueError(
                f"The logs have no {self.monitor!r}, but {', '.join(map(repr, logs))}. "
                f"Received: monitor={self.monitor!r}"
            )

    def on_train_end(self, logs=None) -> None:
        del logs
        if self._steps and not self._steps[-1].stopped and self._has_dropped(math.inf):
            self._stop(max(self._values) + 1)

    def _forget(self, model):
        self._known = model
        # Plans of the steps that were made, what was done, and what `monitor` was
        # at the end of the epochs.
        self._plans, self._steps, self._values = [], [], {}

    @property
    def _target(self):
        if isinstance(self.model, keras.distillation.Distiller):
            return self.model.student
        return self.model

    def _step(self, epoch):
        """Makes the model smaller, or leaves it as it was."""
        target = self._target
        try:
            batches = self._batches()
            with self._keeping_weights(), self._changing() as before:
                plan = plan_rewrite(
                    target,
                    self.schedule[epoch],
                    calibration_data=batches,
                    layers=self.layers,
                    low_rank=self.low_rank,
                )
                self._put_back_unchanged(before, plan)
                full = [site for site in walk(target) if full_converter(type(site.layer))]
                rewrite_layers(target, full, plan, batches)
        except Exception as error:
            text = (
                f"The step of BilinearRewrite at epoch {epoch} failed, and {target.name!r} is what "
                f"it was before. {error}"
            )
            if self.on_error == "raise":
                raise RuntimeError(text) from error
            logging.error("%s", text)
            self._note(_Step(epoch, len(self._plans)))
        else:
            self._plans.append(plan)
            self._note(_Step(epoch, len(self._plans)))
            self._say(epoch, f"{plan.full_parameters:,} parameters become {plan.parameters:,}")
            self._show(epoch, plan)

    def _stop(self, epoch):
        """Makes no more steps, and undoes the last one if that is asked for."""
        plans, weights = len(self._plans), self._folder / _WEIGHTS_BEFORE
        # They are gone after a `fit` that ended well, as the backup is.
        undo = self.on_drop == "undo" and weights.exists()
        if undo:
            plans -= 1
            self._apply(self._plans[plans - 1] if plans else None)
            with iterations_kept(self.model.optimizer):
                self.model.load_weights(weights)
        self._note(_Step(epoch, plans, stopped=True))
        what = "; the last step is undone" if undo else "; no more steps are made"
        self._say(epoch, f"{self.monitor} has dropped by more than {self.max_drop}{what}")

    def _apply(self, plan):
        """Gives the model the layers of a plan, with any weights."""
        with self._changing():
            if plan is not None:
                rewrite_layers(self._target, walk(self._target), plan)

    @contextlib.contextmanager
    def _changing(self):
        """Gives a model of full layers to change; after an error it is what it was before."""
        model, target = self.model, self._target
        before = snapshot(all_layers(target))
        ours = [] if self.plan is None else [p for p, layer in self.plan.items() if layer.rank]
        try:
            with strategy_scope(model):
                known = adam.of_kernels(target, moments(model.optimizer))
                expand_layers(target, [site for site in walk(target) if site.path in ours])
                yield before
                refresh(target)
                if model.optimizer.built:
                    squares = adam.of_factors(target, known)
                    move_optimizer(model.optimizer, model.trainable_variables, squares)
        except BaseException:
            restore(before)
            refresh(target)
            raise
        retrace(model)
        forget_best(fit_arguments(model).get("callbacks", []))

    def _put_back_unchanged(self, before, plan):
        """Puts layers back that a plan makes what they were, so that training them goes on."""
        if self.plan is None:
            return
        unchanged = [
            site
            for site in walk(self._target)
            if plan[site.path].rank is not None
            and _shape(plan[site.path]) == _shape(self.plan[site.path])
        ]
        layers = {id(site.layer) for site in unchanged}
        restore(state for state in before if id(state[0]) in layers)
        store_replacement(unchanged)

    @contextlib.contextmanager
    def _keeping_weights(self):
        """Keeps all weights from before a step that goes well, where it may be undone."""
        if self.on_drop != "undo":
            yield
            return
        with staged(self._folder) as folder:
            self.model.save_weights(folder / _WEIGHTS_BEFORE)
            yield

    @property
    def _folder(self):
        if self.backup_dir is not None:
            return self.backup_dir
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory()
        return pathlib.Path(self._temporary.name)

    def _has_dropped(self, epoch):
        """Whether the metric is worse than it may be, from what is known at an epoch."""
        if not self._steps or self.plan is None:
            return False
        first, last = self._steps[0].epoch, self._steps[-1].epoch
        allowed = [value for at, value in sorted(self._values.items()) if at < first]
        now = [value for at, value in sorted(self._values.items()) if last <= at < epoch]
        if not allowed or not now:
            return False
        drop = allowed[-1] - now[-1]
        if not higher_is_better(self, self.monitor, self.mode):
            drop = -drop
        return not drop <= self.max_drop  # NaN has dropped

    def _batches(self):
        if self.calibration_data is not None:
            return self.calibration_data
        return list(_training_batches(self._training_inputs()))

    def _training_inputs(self):
        arguments = fit_arguments(self.model)
        if "x" not in arguments:
            raise ValueError(
                "The training data are known inside `fit` only: give `calibration_data` to "
                "BilinearRewrite."
            )
        return arguments["x"]

    def _show(self, epoch, plan):
        """Writes the errors of the layers for TensorBoard, where that is used."""
        for callback in fit_arguments(self.model).get("callbacks", []):
            if isinstance(callback, keras.callbacks.TensorBoard):
                import tensorflow as tf  # which TensorBoard needs

                folder = os.path.join(callback.log_dir, "train")
                with tf.summary.create_file_writer(folder).as_default(epoch):
                    for path, layer in plan.items():
                        if layer.error is not None:
                            tf.summary.scalar(f"rewrite_error/{path}", layer.error)

    def _say(self, epoch, text):
        logging.info("Epoch %d: %s", epoch, text)
        if self.verbose:
            print(f"\nEpoch {epoch + 1}: BilinearRewrite: {text}")

    # What a training that goes on after it was killed has to know.

    def _note(self, step):
        self._steps.append(step)
        self._write()

    def _write(self):
        if self.backup_dir is None:
            return
        state = {
            "plans": [json.loads(plan.to_json()) for plan in self._plans],
            "steps": [dataclasses.asdict(step) for step in self._steps],
            "values": list(self._values.items()),
        }
        with staged(self.backup_dir) as folder:
            (folder / _STATE).write_text(json.dumps(state))

    def _resume(self):
        """Makes the model the one whose weights are in the backup."""
        path, backup = self.backup_dir / _STATE, self._backup()
        if backup is None or not path.exists():
            return
        state = json.loads(path.read_text())
        plans = [RewritePlan.from_json(json.dumps(plan)) for plan in state["plans"]]
        steps = [_Step(**step) for step in state["steps"]]
        # The last steps may have come after the backup.
        for count in range(len(steps), -1, -1):
            now = steps[count - 1].plans if count else 0
            self._apply(plans[now - 1] if now else None)
            self._steps = steps[:count]
            self._plans = plans[: max((step.plans for step in self._steps), default=0)]
            if self._fits(backup):
                self._values = dict(map(tuple, state["values"]))
                return
        raise ValueError(
            f"The weights in {str(self.backup_dir)!r} fit the model {self._target.name!r} "
            "neither as it is nor as it was rewritten."
        )

    def _fits(self, backup):
        """Whether weights are those of the model as it is."""
        with tempfile.TemporaryDirectory() as folder:
            # Keras loads no file with the name that the older backup has.
            weights = shutil.copy(backup, pathlib.Path(folder, "backup.weights.h5"))
            try:
                self.model.load_weights(weights)
            except ValueError:
                return False
        return True

    def _backup(self):
        """The weights that BackupAndRestore is going to load, if there are any."""
        for name in BACKUPS:
            path = self.backup_dir / name
            with contextlib.suppress(OSError), h5py.File(path):  # absent, or half written
                return path
        return None


@dataclasses.dataclass(frozen=True)
class _Step:
    """What was done at an epoch.

    Attributes:
        epoch: its number.
        plans: how many of the plans made the model what it was then; 0 for none.
        stopped: whether it was the last step to make.
    """

    epoch: int
    plans: int
    stopped: bool = False


def _schedule(at_epoch, budget, schedule):
    """`{epoch: budget}` in the order of the epochs."""
    if (at_epoch is None) == (schedule is None) or (schedule is not None and budget is not None):
        raise ValueError(
            "Give either `at_epoch`, with a `budget`, or a `schedule`. "
            f"Received: at_epoch={at_epoch!r}, budget={budget!r}, schedule={schedule!r}"
        )
    if schedule is None:
        schedule = {at_epoch: 0.1 if budget is None else budget}
    if not isinstance(schedule, Mapping) or not schedule:
        raise ValueError(
            f"`schedule` must be a mapping from epochs to budgets. Received: schedule={schedule!r}"
        )
    for epoch, share in schedule.items():
        if not isinstance(epoch, numbers.Integral) or isinstance(epoch, bool) or epoch < 0:
            raise ValueError(
                f"An epoch must be an integer, 0 or more. Received: {epoch!r} in {schedule!r}"
            )
        if not isinstance(share, numbers.Real) or isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(
                f"`budget` must be above 0 and at most 1. Received: {share!r} for epoch {epoch}"
            )
    schedule = {int(epoch): float(schedule[epoch]) for epoch in sorted(schedule)}
    if any(later >= sooner for sooner, later in itertools.pairwise(schedule.values())):
        raise ValueError(
            f"The budgets of a `schedule` must get smaller. Received: schedule={schedule!r}"
        )
    return schedule


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}. Received: {name}={value!r}")


def _writable(backup_dir):
    """The folder as a path; a wrong one would else be noticed after an epoch of training."""
    folder = pathlib.Path(backup_dir)
    try:
        check_writable(folder)
    except OSError as error:
        raise ValueError(
            "`backup_dir` must be a folder that can be written, or that can be made. "
            f"Received: backup_dir={backup_dir!r}"
        ) from error
    return folder


def _training_batches(x):
    """Batches of training inputs, spread over the arrays, or the first of a data set."""
    leaves = keras.tree.flatten(x)
    if isinstance(x, keras.utils.PyDataset):
        count = x.num_batches
        indices = itertools.count() if count is None else range(count)
        yield from _enough(x[index] for index in indices)
    elif all(hasattr(leaf, "shape") for leaf in leaves):
        step = max(1, len(leaves[0]) // EXAMPLES)
        for start in range(0, min(len(leaves[0]), EXAMPLES * step), _BATCH * step):
            part = slice(start, start + _BATCH * step, step)
            # In a tuple, as inputs may be a list themselves.
            yield (keras.tree.map_structure(operator.itemgetter(part), x),)
    else:
        yield from _enough(x)


def _enough(batches):
    """The first batches with as many examples as are wanted."""
    count = 0
    for batch in batches:
        yield batch
        inputs, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        count += len(keras.tree.flatten(inputs)[0])
        if count >= EXAMPLES:
            break


def _shape(layer):
    """What a layer is made of, without the errors that were predicted."""
    return layer.rank, layer.factorizations
