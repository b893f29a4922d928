"""Measures which LiteRT file of a model to ship: the original's or that of a smaller model."""

import dataclasses
import hashlib
import math
import numbers
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from keras_bilinear.data import describe, model_batches
from keras_bilinear.files import check_writable, staged
from keras_bilinear.kronecker.factorization import check_positive_int
from keras_bilinear.litert.export import check_packages, check_stateless, export_litert
from keras_bilinear.litert.held_out import HeldOut
from keras_bilinear.litert.inputs import input_specs, read_examples
from keras_bilinear.litert.tradeoff_report import Tradeoff, Variant
from keras_bilinear.messages import reason
from keras_bilinear.progress import check_verbose, shown, track, working
from keras_bilinear.rewriting.answers import read_inputs
from keras_bilinear.rewriting.limits import Limits
from keras_bilinear.rewriting.plan import LayerPlan, RewritePlan
from keras_bilinear.rewriting.planner import plan_rewrite
from keras_bilinear.rewriting.recovery import recover as recover_model
from keras_bilinear.rewriting.rewrite import rewrite_model
from keras_bilinear.rewriting.sites import check_built

# The kinds of files of the original, and of a smaller model.
_ORIGINAL_KINDS = (None, "dynamic_int8", "int8")
_SMALL_KINDS = (None, "dynamic_int8")
# A share of the data has at most so many held-out examples: each runs alone through every file.
_MOST_HELD_OUT = 2000
_BATCH = 128
# Each file is timed in so many processes, in turns with the other files, for so many seconds.
_ROUNDS, _SECONDS = 5, 0.2
_RESULT = "tradeoff.json"


def tradeoff(
    model: keras.Model,
    data: Any,
    output_dir: str | os.PathLike,
    budgets: Iterable[float] = (0.5, 0.25, 0.1),
    labels: Any = None,
    metric: Callable[[Any, Any], Any] | None = None,
    validation_data: Any = None,
    validation_split: float = 0.2,
    recover: int = 3,
    input_shapes: Any = None,
    verbose: int | str = "auto",
) -> Tradeoff:
    """Measures which LiteRT file of a model to ship: bytes and latency against quality.

    These files are written and run:

    - the original in float32, in dynamic int8 and in int8;
    - for each budget, the rewritten model in float32 and in dynamic int8, without training and
      with training by `recover`;
    - for each budget, truncated SVD: the rewritten layers get kernels of low rank and of the same
      size, without a look at data.

    The metric is measured on held-out examples, from which no layer, learning rate or range of
    integers was found. Where a file cannot be made, its row says why, and the other files are made.

    Args:
        model: a built model. It is left untouched.
        data: inputs of the model: an array, a dictionary of arrays, a list with an array for each
            of several inputs, or an iterable of batches, such as a `tf.data.Dataset`. Of a tuple
            of inputs and labels only the inputs count. All of them are kept in memory.
        output_dir: the folder for the files, the plans and `tradeoff.json`, which has the results.
            It is made if it does not exist. What is in it already from the same model,
            data and options is not made again: a call that was stopped goes on, and a call with
            other budgets adds these. Files that could not be made are tried again.
        budgets: shares of the parameters to keep, each above 0 and at most 1.
        labels: labels of `data`, an array with a label for each example, or arrays nested as the
            metric takes them. `None` measures the agreement with the original: the share of
            answers where the largest output is at the same place, if an output has
            probabilities, or logits as the compiled loss says; the share of numbers on the same
            side of one half for binary outputs. For other outputs it is 1 less the root mean square
            error relative to the standard deviation. Of several outputs the least counts.
        metric: a function of the labels and the outputs that returns a number, of which more is
            better. The outputs are an array; a dictionary of arrays by the names in the
            file if there are several. `None` measures the accuracy of a single output, whose
            labels are integers or one-hot vectors.
        validation_data: inputs to hold out, or a tuple of inputs and labels, in place of a part
            of `data`.
        validation_split: the share of `data` to hold out, above 0 and below 1, but no more than
            2,000 examples. They are drawn at random, always the same.
        recover: the number of epochs of `recover`; 0 leaves these files out.
        input_shapes: shapes of the inputs, as for `export_litert`.
        verbose: 1 shows on stderr, or in a notebook, how far the work is; 0 shows nothing.
            `"auto"` is 1 in a terminal and in a notebook, 0 elsewhere.

    Returns:
        A `Tradeoff`, which prints as a table. It marks the files that no other file beats, draws
        them with `plot` and says with `advice` what to ship.

    Raises:
        ValueError: if an argument is not valid, if the model is not built or has a size that is
            unknown, or if `output_dir` has the results of another model, data or options.
        TypeError: if the data are neither arrays nor an iterable of batches.
        ImportError: if TensorFlow or `ai-edge-litert` is missing.
        OSError: if `output_dir` cannot be written.

    Example:

    >>> import tempfile
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(64, "relu"),
    ...                           keras.layers.Dense(4, "softmax")])
    >>> x = np.random.rand(200, 16)
    >>> result = tradeoff(model, x, tempfile.mkdtemp(), budgets=[], recover=0)
    >>> [variant.quantize for variant in result.variants]
    [None, 'dynamic_int8', 'int8']
    >>> result.best(max_drop=0).metric
    1.0
    """
    check_verbose(verbose)
    check_built(model)
    check_stateless(model)
    check_packages()
    budgets = _check_budgets(budgets)
    if recover != 0:
        check_positive_int("recover", recover)
    folder = pathlib.Path(output_dir)
    check_writable(folder)
    arguments = input_specs(model, input_shapes)
    inputs, held_out = _split(model, data, labels, metric, validation_data, validation_split)
    options = [_digest_of(model.get_weights()), _digest_of([inputs, held_out]), recover]
    options += [input_shapes, getattr(metric, "__name__", metric and type(metric).__name__)]
    made_from = hashlib.sha256(repr(options).encode()).hexdigest()
    earlier = _read_earlier(folder, made_from)
    with shown(verbose):
        with working("running the model"):
            examples = read_examples(
                model, arguments, [(held_out[0],)], "validation_data", _count(held_out[0])
            )
            scorer = HeldOut(model, arguments, examples, held_out[1], metric)
        result = Tradeoff(scorer.metric, scorer.count, scorer.original, made_from=made_from)
        if earlier is not None:
            result = dataclasses.replace(result, variants=earlier.variants)
        batches = _batches(inputs)
        models = _Models(model, batches, folder, recover, resumed=earlier is not None)
        return _Measurement(folder, models, scorer, batches, input_shapes, result).run(budgets)


class _Models:
    """Makes the smaller models.

    Args:
        model: the original.
        batches: the data that models are fitted to and trained on.
        folder: where the plans are kept.
        epochs: number of epochs to recover for; 0 for no recovered models.
        resumed: whether plans in the folder are plans of this model for these data.
    """

    def __init__(self, model, batches: list, folder: pathlib.Path, epochs: int, resumed: bool):
        self._model, self._batches, self._folder = model, batches, folder
        self._epochs, self._resumed = epochs, resumed
        self._plans: dict[float, RewritePlan] = {}
        self._rewritten: tuple[float, keras.Model] | None = None

    def all(self, budgets) -> Iterator[tuple[str, float | None, Callable[[], keras.Model]]]:
        """For each model what it is, its budget, and a function that makes it."""
        yield "original", None, lambda: self._model
        for budget in budgets:
            yield "rewritten", budget, lambda budget=budget: self._rewrite(budget)
            if self._epochs:
                yield "recovered", budget, lambda budget=budget: self._recover(budget)
            yield "truncated SVD", budget, lambda budget=budget: self._truncate(budget)

    def _rewrite(self, budget):
        if self._rewritten is None or self._rewritten[0] != budget:
            small = rewrite_model(self._model, self._plan(budget), self._batches)
            self._rewritten = budget, small
        return self._rewritten[1]

    def _recover(self, budget):
        small = self._rewrite(budget)
        self._rewritten = None  # as it is trained in place
        with working("recovering"):
            return recover_model(small, self._model, self._batches, self._epochs, verbose=0)

    def _truncate(self, budget):
        plan = RewritePlan.from_json(self._plan(budget).to_json())  # a copy
        for layer in plan.values():
            _make_low_rank(layer)
        return rewrite_model(self._model, plan)

    def _plan(self, budget: float) -> RewritePlan:
        """The plan for a budget, which an earlier call may have made."""
        if budget not in self._plans:
            path = self._folder / f"plan_{budget:g}.json"
            if self._resumed and path.exists():
                self._plans[budget] = RewritePlan.from_json(path.read_text())
            else:
                self._plans[budget] = self._make_plan(budget)
                with staged(self._folder) as folder:
                    (folder / path.name).write_text(self._plans[budget].to_json())
        return self._plans[budget]

    def _make_plan(self, budget):
        """A plan from what the plan of the next larger budget looked at, if there is one."""
        larger = [known for known in self._plans if known > budget]
        if larger:
            return self._plans[min(larger)].with_budget(budget)
        return plan_rewrite(self._model, budget=budget, calibration_data=self._batches)


def _make_low_rank(layer: LayerPlan) -> None:
    """Plans a kernel of low rank of at most the same size, where there is such a kernel."""
    factors = layer.factorizations[0].low_rank_factors if layer.factorizations else None
    if layer.rank is None or factors is None:
        return
    rank = 0
    while layer.parameters_at(rank + 1, factors) <= layer.parameters:
        rank += 1
    if rank:
        layer.factors, layer.rank = factors, rank


class _Measurement:
    """Makes and measures the files that a folder does not have.

    Args:
        folder: the folder.
        models: makes the models.
        held_out: measures the files.
        batches: the data from which the ranges of integers are found.
        input_shapes: as for `export_litert`.
        result: the result so far.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        models: _Models,
        held_out: HeldOut,
        batches: list,
        input_shapes: Any,
        result: Tradeoff,
    ):
        self._folder, self._models, self._held_out = folder, models, held_out
        self._batches, self._input_shapes = batches, input_shapes
        self._result = result
        self._variants = {_key(variant): variant for variant in result.variants}

    def run(self, budgets) -> Tradeoff:
        """Makes and measures the files of the original and of these budgets."""
        self._write()
        for name, budget, make in track([*self._models.all(budgets)], "measuring", _label):
            kinds = _SMALL_KINDS if budget is not None else _ORIGINAL_KINDS
            missing = [kind for kind in kinds if not self._has(Variant(name, budget, kind))]
            if not missing:
                continue
            try:
                model = make()
            except Exception as error:  # a model of the user's may raise anything
                self._add(Variant(name, budget, None, error=_why(error)))
                continue
            for kind in missing:
                self._add(self._measure(model, Variant(name, budget, kind, model.count_params())))
        self._time()
        return self._result

    def _has(self, variant: Variant) -> bool:
        """Whether the folder has the file of a variant, measured."""
        found = self._variants.get(_key(variant))
        return found is not None and not found.error and (self._folder / str(found.file)).exists()

    def _measure(self, model, variant: Variant) -> Variant:
        """Exports a model and measures the file."""
        name = "_".join([variant.model_name.replace(" ", "_"), *filter(None, [variant.quantize])])
        path = self._folder / f"{name}.tflite"
        try:
            report = export_litert(
                model,
                path,
                variant.quantize,
                self._batches,
                self._input_shapes,
                # How far integers are from the model is what is measured.
                tolerance=None if variant.quantize is None else math.inf,
            )
            with working("running the file"):
                metric = self._held_out.measure(path)
        except Exception as error:  # so may the converter
            return dataclasses.replace(variant, error=_why(error))
        return dataclasses.replace(variant, file=path.name, bytes=report.bytes, metric=metric)

    def _time(self) -> None:
        """Times all files in turns, so that a machine whose speed drifts treats them alike."""
        files = {key: str(one.file) for key, one in self._variants.items() if not one.error}
        if all(self._variants[key].latency_us is not None for key in files):
            return
        times: dict[tuple, list[float]] = {key: [] for key in files}
        for _ in track(range(_ROUNDS), "timing the files"):
            for key, file in files.items():
                times[key].append(self._held_out.latency(self._folder / file, _SECONDS))
        for key, found in times.items():
            latency = statistics.median(found)
            self._variants[key] = dataclasses.replace(self._variants[key], latency_us=latency)
        self._write()

    def _add(self, variant: Variant) -> None:
        self._variants[_key(variant)] = variant
        self._write()

    def _write(self) -> None:
        """Keeps the result so far in the folder."""
        self._result = dataclasses.replace(self._result, variants=tuple(self._variants.values()))
        with staged(self._folder) as folder:
            (folder / _RESULT).write_text(self._result.to_json())


def _key(variant: Variant) -> tuple:
    return variant.model, variant.budget, variant.quantize


def _why(error: Exception) -> str:
    """Why there is no file, without the argument that nobody gave to `tradeoff`."""
    return reason(error).partition(" Received: ")[0]


def _label(step) -> str:
    name, budget, _ = step
    return Variant(name, budget, None).model_name


def _check_budgets(budgets: Iterable[float]) -> list[float]:
    """The budgets, the largest first.

    Raises:
        ValueError: if a budget is not valid.
    """
    if not isinstance(budgets, Iterable):
        raise ValueError(f"`budgets` must be numbers in a list. Received: {describe(budgets)}")
    budgets = [*budgets]
    for budget in budgets:
        if not isinstance(budget, numbers.Real):
            raise ValueError(f"`budgets` must be numbers. Received: {describe(budget)}")
        Limits(float(budget))
    return sorted({*map(float, budgets)}, reverse=True)


def _read_earlier(folder: pathlib.Path, made_from: str) -> Tradeoff | None:
    """The result in a folder; `None` if there is none.

    Raises:
        ValueError: if it is no result, or that of something else.
    """
    path = folder / _RESULT
    if not path.exists():
        return None
    earlier = Tradeoff.from_json(path.read_text())
    if earlier.made_from != made_from:
        raise ValueError(
            "`output_dir` has the results of another model, of other data or of other options: "
            f"give another folder. Received: output_dir={str(folder)!r}"
        )
    return earlier


def _split(model, data, labels, metric, validation_data, validation_split) -> tuple[Any, tuple]:
    """The inputs to fit to, and a tuple of held-out inputs and their labels or `None`.

    Raises:
        ValueError: if an argument is not valid.
        TypeError: if data are neither arrays nor an iterable of batches.
    """
    if metric is not None and not callable(metric):
        raise ValueError(
            f"`metric` must be a function of labels and outputs. Received: {describe(metric)}"
        )
    if not isinstance(validation_split, numbers.Real) or not 0 < float(validation_split) < 1:
        raise ValueError(
            "`validation_split` must be above 0 and below 1. "
            f"Received: validation_split={validation_split!r}"
        )
    inputs = _read(model, data, "data")
    if validation_data is None:
        labels = _read_labels(labels, _count(inputs), "labels")
        inputs, held_out = _hold_out(inputs, labels, float(validation_split))
    else:
        if labels is not None:
            raise ValueError(
                "`labels` are those of `data`: give those of `validation_data` in a tuple with it."
            )
        if not isinstance(validation_data, tuple):
            validation_data = validation_data, None
        x, labels, _ = keras.utils.unpack_x_y_sample_weight(validation_data)
        x = _read(model, x, "validation_data")
        held_out = x, _read_labels(labels, _count(x), "validation_data")
    if metric is not None and held_out[1] is None:
        raise ValueError("`metric` needs labels. Received: none")
    return inputs, held_out


def _read(model, data, name) -> Any:
    """All inputs in memory, as arrays nested as the model takes them."""
    batches = model_batches(data, model, name)
    if batches is None:
        raise ValueError(f"`{name}` must be inputs of the model. Received: None")
    each = [read_inputs(batch) for batch in batches]
    try:
        return keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *each)
    except ValueError as error:
        raise ValueError(
            f"The batches of `{name}` must have examples of the same shape. {error}"
        ) from error


def _read_labels(labels, count, name) -> Any:
    """Labels as arrays.

    Raises:
        ValueError: if there are not as many as examples.
    """
    if labels is None:
        return None
    if isinstance(labels, list) and not any(hasattr(values, "shape") for values in labels):
        labels = np.asarray(labels)
    labels = keras.tree.map_structure(
        lambda values: np.asarray(keras.ops.convert_to_numpy(values)), labels
    )
    for values in keras.tree.flatten(labels):
        if values.ndim == 0 or len(values) != count:
            raise ValueError(
                f"`{name}` must have as many labels as examples. "
                f"Received: labels of shape {values.shape} for {count} examples"
            )
    return labels


def _hold_out(inputs, labels, share) -> tuple[Any, tuple]:
    """Inputs without the held-out examples, and a tuple of held-out inputs and labels."""
    count = _count(inputs)
    if count < 2:
        raise ValueError(
            f"`data` must have two examples at least, to hold out a share. Received: {count}"
        )
    order = np.random.default_rng(0).permutation(count)
    held_out = min(max(1, round(share * count)), count - 1, _MOST_HELD_OUT)
    first, rest = np.sort(order[:held_out]), order[held_out:]
    held_out_labels = None if labels is None else _take(labels, first)
    return _take(inputs, rest), (_take(inputs, first), held_out_labels)


def _take(arrays, places) -> Any:
    """Some examples of nested arrays."""
    return keras.tree.map_structure(lambda values: values[places], arrays)


def _count(inputs) -> int:
    return len(keras.tree.flatten(inputs)[0])


def _batches(inputs) -> list:
    """Inputs as batches, each in a tuple, as a batch that is a list would have labels."""
    return [
        (_take(inputs, slice(start, start + _BATCH)),) for start in range(0, _count(inputs), _BATCH)
    ]


def _digest_of(arrays: Any) -> str:
    """A digest of nested arrays."""
    digest = hashlib.sha256()
    for values in keras.tree.flatten(arrays):
        values = np.asarray(values)
        digest.update(f"{values.dtype}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
