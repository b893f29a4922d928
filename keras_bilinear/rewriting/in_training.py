"""Replacing the layers of a model while `fit` trains it."""

import contextlib
from collections.abc import Iterable
from typing import Any

import keras
from absl import logging

from keras_bilinear.keras_private.graph import all_layers
from keras_bilinear.keras_private.optimizer import moments, move_optimizer
from keras_bilinear.keras_private.surgery import refresh, replaced_since, restore, snapshot
from keras_bilinear.keras_private.training import (
    fit_arguments,
    forget_best,
    forget_functions,
    models_with,
    retrace,
    strategy_scope,
)
from keras_bilinear.layers.converter import full_converter
from keras_bilinear.rewriting import adam
from keras_bilinear.rewriting.layer_plan import LayerPlan
from keras_bilinear.rewriting.limits import PlanOptions
from keras_bilinear.rewriting.owners import store_replacement
from keras_bilinear.rewriting.plan import RewritePlan
from keras_bilinear.rewriting.planner import make_plan
from keras_bilinear.rewriting.rewrite import expand_layers, rewrite_layers
from keras_bilinear.rewriting.sites import walk


class ModelInTraining:
    """A model that `fit` trains. Its layers change; the model and its optimizer stay.

    Args:
        model: the model that `fit` was called on.
    """

    def __init__(self, model: keras.Model):
        self.model = model

    @property
    def target(self) -> keras.Model:
        """The model that is rewritten: the student of a distiller, or the model itself."""
        if isinstance(self.model, keras.distillation.Distiller):
            return self.model.student
        return self.model

    @property
    def inputs(self):
        """The training inputs.

        Raises:
            ValueError: if `fit` does not run.
        """
        inputs = self.inputs_or_none
        if inputs is None:
            raise ValueError(
                "The training data are known inside `fit` only: give `calibration_data` to "
                "BilinearRewrite."
            )
        return inputs

    @property
    def inputs_or_none(self):
        """The training inputs; `None` if `fit` does not run."""
        return fit_arguments(self.model).get("x")

    @property
    def callbacks(self) -> list[keras.callbacks.Callback]:
        """The callbacks of the call of `fit`; none if it does not run."""
        return fit_arguments(self.model).get("callbacks", [])

    def take_averages_out(self, epoch: int) -> None:
        """Makes `SwapEMAWeights` give the model its weights back, which it else does later."""
        for callback in self.callbacks:
            if isinstance(callback, keras.callbacks.SwapEMAWeights):
                callback.on_epoch_begin(epoch)

    def rewrite(
        self, options: PlanOptions, batches: Iterable | None, now: RewritePlan | None
    ) -> RewritePlan:
        """Plans and makes the model smaller. After an error it is what it was before.

        Args:
            options: what the plan is asked for.
            batches: calibration data, or `None`.
            now: the plan by which the model was made what it is; `None` for a full model.

        Returns:
            The new plan.

        Raises:
            Exception: whatever planning and fitting raise.
        """
        with self._full_layers(now) as before:
            plan = make_plan(self.target, options, batches)
            if now is not None:
                self._put_back_unchanged(before, plan, now)
            full = [site for site in walk(self.target) if full_converter(type(site.layer))]
            rewrite_layers(self.target, full, plan, batches)
        return plan

    def set_layers(self, plan: RewritePlan | None, now: RewritePlan | None) -> None:
        """Gives the model the layers of a plan, with any weights.

        Args:
            plan: the plan; `None` for full layers.
            now: the plan by which the model was made what it is; `None` for a full model.
        """
        with self._full_layers(now):
            if plan is not None:
                rewrite_layers(self.target, walk(self.target), plan)

    @contextlib.contextmanager
    def _full_layers(self, now):
        """Gives a model of full layers to change; after an error it is what it was before."""
        model, target = self.model, self.target
        before = snapshot(all_layers(target))
        ours = [] if now is None else [path for path, layer in now.items() if layer.rank]
        others = [
            _TrainedModel(other, target)
            for other in models_with(layer for layer, *_ in before)
            if other is not model
        ]
        try:
            with strategy_scope(model):
                known = _TrainedModel(model, target)
                expand_layers(target, [site for site in walk(target) if site.path in ours])
                yield before
                refresh(target)
                known.move_optimizer()
        except BaseException:
            restore(before)
            refresh(target)
            raise
        retrace(model)
        forget_best(self.callbacks)
        changed = {id(layer) for layer in replaced_since(before)}
        for other in others:
            if not changed.isdisjoint(map(id, all_layers(other.model))):
                other.follow(model)

    def _put_back_unchanged(self, before, plan, now):
        """Puts back the layers that a plan makes what they were, so that they are trained on."""
        unchanged = [
            site
            for site in walk(self.target)
            if plan[site.path].rank is not None and _same_layer(plan[site.path], now[site.path])
        ]
        layers = {id(site.layer) for site in unchanged}
        restore(state for state in before if id(state[0]) in layers)
        store_replacement(unchanged)


class _TrainedModel:
    """A model, and what its optimizer knows of layers before they change.

    Args:
        model: the model.
        target: the model whose layers change; `model` holds some of them.
    """

    def __init__(self, model: keras.Model, target: keras.Model):
        self.model, self._target = model, target
        optimizer: Any = getattr(model, "optimizer", None)
        known = isinstance(optimizer, keras.optimizers.Optimizer) and optimizer.built
        self._optimizer = optimizer if known else None
        if self._optimizer is not None:
            self._known = adam.of_kernels(target, moments(self._optimizer))

    def move_optimizer(self) -> None:
        """Gives the optimizer the variables that the model has now.

        Raises:
            ValueError: if it cannot have others.
        """
        if self._optimizer is not None:
            squares = adam.of_factors(self._target, self._known)
            move_optimizer(self._optimizer, self.model.trainable_variables, squares)

    def follow(self, trained: keras.Model) -> None:
        """Makes a model go on with the layers that changed in the model that `fit` trains."""
        forget_functions(self.model)
        refresh(self.model)
        if self._optimizer is trained.optimizer:
            return
        try:
            with strategy_scope(self.model):
                self.move_optimizer()
        except Exception as error:  # whatever optimizers of the user raise
            logging.warning(
                "The model %r holds layers of %r that BilinearRewrite has replaced, and its "
                "optimizer cannot train the new variables: compile it again. %s",
                self.model.name,
                trained.name,
                error,
            )


def _same_layer(plan: LayerPlan, other: LayerPlan) -> bool:
    """Whether two plans make the same layer, whatever errors they predict."""
    return (plan.rank, plan.factorizations) == (other.rank, other.factorizations)
