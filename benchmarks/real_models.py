"""Rewrites trained models that people use, and compares the files with their int8 files.

    python benchmarks/real_models.py --packages_dir=DIR --real_data_dir=DIR --data_dir=DIR

The models come from Python packages, which pip downloads into `--packages_dir`; see `real/`.
Each becomes LiteRT files of three kinds (float32, dynamic int8, and all in int8) in these
variants:

- original: the model as it is;
- fitted: `rewrite_model` with a plan and a fit to training inputs, at each budget;
- svd: truncated singular value decompositions of the kernels, as many parameters as fitted;
- recovered: fitted, then trained by `recover` towards the outputs of the original.

All scores are measured on the files, which LiteRT runs on test inputs. Each finished row goes into
`benchmarks/results/real_models.csv`, and a row that is there is not done again: remove it to
measure anew. `--models`, `--variants`, `--budgets` and `--numbers` choose rows. Of the inputs that
no package has, `--real_data_dir` names the folder; models without inputs are skipped.
"""

import collections
import itertools
import math
import pathlib
import statistics
import tempfile
import time

import tables
from absl import app, flags, logging

VARIANTS = ("original", "fitted", "svd", "recovered")
NUMBERS = {"float32": None, "dynamic int8": "dynamic_int8", "int8": "int8"}
ROUNDS, SECONDS = 5, 0.5
# A file that takes longer than this many times the original's file counts as slower.
SLOWER = 1.05
# Of the original's int8 file: the share of its bytes, and of the metric that may be lost.
GOALS = {"half": (0.5, 0.01), "a quarter": (0.25, 0.03)}
KEY = ("model", "variant", "budget", "numbers")
FIELDS = (*KEY, "parameters", "bytes", "ratio", "metric", "also", "seconds", "note")

MODELS = flags.DEFINE_list("models", None, "models to measure; all by default")
CHOSEN = flags.DEFINE_list("variants", list(VARIANTS), "variants to measure")
BUDGETS = flags.DEFINE_list("budgets", ["0.5", "0.25", "0.1"], "shares of the parameters to keep")
KINDS = flags.DEFINE_list("numbers", list(NUMBERS), "kinds of files to measure")
EPOCHS = flags.DEFINE_integer("epochs", 4, "epochs of `recover`")
PACKAGES_DIR = flags.DEFINE_string(
    "packages_dir",
    str(pathlib.Path(tempfile.gettempdir(), "keras_bilinear_packages")),
    "where packages are kept once they are downloaded",
)
REAL_DATA_DIR = flags.DEFINE_string(
    "real_data_dir", None, "folder with chr10_50kb.fa.gz and peptides.csv.gz"
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "where tfds keeps its data")
RESULTS_DIR = flags.DEFINE_string("results_dir", str(tables.RESULTS), "where the results go")


class Study:
    """One model: its variants, their files and the scores of these.

    Args:
        case: the `real.case.Case`.
        folder: an empty folder for models and files.
    """

    def __init__(self, case, folder):
        self.case, self.folder = case, folder
        self.model = case.load()
        self.inputs, self.labels = case.test()
        self.calibration = case.training_inputs(case.calibration)
        self.expected = self.model.predict(self.inputs, batch_size=8, verbose=0)
        self.seconds = collections.defaultdict(float)

    def row(self, variant, budget, numbers):
        """A row of the table; where there is no such file, with the reason as its note."""
        row = dict.fromkeys(FIELDS, "") | {"model": self.case.name, "variant": variant}
        row |= {"budget": budget, "numbers": numbers}
        try:
            model = self._model(variant, budget)
            row["parameters"] = model.count_params()
            row["seconds"] = f"{self.seconds[variant, budget]:.0f}"
            path = self._file(variant, budget, numbers)
            scores = self.case.scores(self._outputs(path), self.expected, self.labels)
            others = [] if variant == "original" else [self._file("original", "1", numbers)]
            latencies = self._latencies([path, *others])
        except (ValueError, RuntimeError) as error:
            logging.warning("%s", error)
            row["note"] = " ".join(str(error).split())[:200]
            return row
        row["bytes"] = path.stat().st_size
        row["ratio"] = f"{latencies[0] / latencies[-1]:.3f}"
        row["metric"], row["also"] = (f"{score:.5f}" for score in scores)
        return row

    def _model(self, variant, budget):
        import keras

        if variant == "original":
            return self.model
        path = self._path(variant, budget, ".keras")
        if not path.exists():
            make = {"fitted": self._fitted, "svd": self._svd, "recovered": self._recovered}
            start = time.perf_counter()
            model = make[variant](budget)
            self.seconds[variant, budget] += time.perf_counter() - start
            model.save(path)
        return keras.models.load_model(path, compile=False)

    def _fitted(self, budget):
        from keras_bilinear import plan_rewrite, rewrite_model

        plan = plan_rewrite(self.model, budget=float(budget), calibration_data=self.calibration)
        logging.info("%s", plan)
        return rewrite_model(self.model, plan, self.calibration)

    def _svd(self, budget):
        from keras_bilinear import rewrite_model

        parameters = self._model("fitted", budget).count_params()
        return rewrite_model(self.model, truncated_svd_plan(self.model, parameters))

    def _recovered(self, budget):
        from keras_bilinear import recover

        data = self.case.training_inputs(self.case.training)
        return recover(self._model("fitted", budget), self.model, data, epochs=EPOCHS.value)

    def _file(self, variant, budget, numbers):
        from keras_bilinear import export_litert

        path = self._path(variant, budget, f"_{numbers.replace(' ', '_')}.tflite")
        if not path.exists():
            export_litert(
                self._model(variant, budget),
                path,
                NUMBERS[numbers],
                representative_data=self.calibration,
                input_shapes=self.case.input_shapes,
                # What int8 numbers lose is what the scores tell.
                tolerance=math.inf if NUMBERS[numbers] else None,
            )
        return path

    def _path(self, variant, budget, end):
        return self.folder / f"{variant}_{budget}{end}"

    def _runs(self, count=None):
        """Test inputs by the names that they have in a file, for runs with one example each."""
        import keras

        from keras_bilinear.litert.inputs import input_specs

        specs = keras.tree.flatten(input_specs(self.model, self.case.input_shapes))
        arrays = keras.tree.flatten(self.inputs)
        return {
            spec.name: array[:count, None].astype(spec.dtype)
            for spec, array in zip(specs, arrays, strict=True)
        }

    def _outputs(self, path):
        """The outputs of a file for the test inputs, as `expected` has them."""
        from keras_bilinear.litert.run import run_litert

        outputs = run_litert(path, self._runs(), threads=2, seconds=0).outputs
        outputs = {name: values[:, 0] for name, values in outputs.items()}
        return outputs if isinstance(self.expected, dict) else next(iter(outputs.values()))

    def _latencies(self, paths):
        """Microseconds of one run of each file on one thread: medians, the files take turns."""
        from keras_bilinear.litert.run import run_litert

        times = [
            [run_litert(path, self._runs(1), seconds=SECONDS).latency_us for path in paths]
            for _ in range(ROUNDS)
        ]
        return [statistics.median(column) for column in zip(*times, strict=True)]


def truncated_svd_plan(model, parameters):
    """A plan of kernels that are products of two matrices, within a number of parameters.

    The ranks rise where a rank keeps most energy for its parameters. Without calibration data,
    `rewrite_model` makes such kernels by truncated singular value decompositions.
    """
    from keras_bilinear import plan_rewrite

    plan = plan_rewrite(model, max_params=parameters)
    ladders = {}  # of each layer: what it may become, from the smallest on
    for path, layer in plan.items():
        kernels = layer.factorizations
        factors = kernels[0].low_rank_factors if kernels else None
        ranks = sorted(rank for other, rank in layer.errors if other == factors)
        if ranks:
            layer.factors, layer.rank = factors, ranks[0]
            ladders[path] = [*ranks[1:], None]
        elif kernels:
            layer.skip()
    while ladders:
        gains = {}
        for path, ladder in ladders.items():
            layer = plan[path]
            error = 0.0 if ladder[0] is None else layer.errors[layer.factors, ladder[0]]
            added = layer.parameters_at(ladder[0]) - layer.parameters
            if plan.parameters + added <= parameters:
                gains[path] = (layer.error**2 - error**2) / added
        if not gains:
            break
        best = max(gains, key=gains.get)
        plan[best].rank = ladders[best].pop(0)
        if plan[best].rank is None:
            plan[best].skip("stays full")
            del ladders[best]
    return plan


def verdict(case, rows):
    """For each goal, a sentence that says whether a rewritten file reaches it."""
    measured = [row for row in rows if row["bytes"]]
    of = {(row["variant"], row["numbers"]): row for row in measured}
    sizes = [
        int(of["original", numbers]["bytes"])
        for numbers, quantize in NUMBERS.items()
        if quantize and ("original", numbers) in of
    ]
    if not sizes or ("original", "float32") not in of:
        return ["The original's files are not measured."]
    best = float(of["original", "float32"]["metric"])
    rewritten = [
        row
        for row in measured
        if row["variant"] in ("fitted", "recovered") and row["numbers"] != "float32"
    ]
    if not rewritten:
        return ["No rewritten int8 file is measured."]
    sentences = []
    for name, (share, allowed) in GOALS.items():
        goal = f"{name.capitalize()} of int8's bytes at {100 * allowed:g}% lost, not slower"
        small = [row for row in rewritten if int(row["bytes"]) <= share * min(sizes)]

        def distance(row, allowed=allowed):
            """What a file is above both limits by; 0 reaches the goal."""
            lost = max(0.0, case.lost(float(row["metric"]), best) - allowed)
            return lost + max(0.0, float(row["ratio"]) - SLOWER), int(row["bytes"])

        if not small:
            sentences.append(f"{goal}: **no**, no rewritten int8 file is so small.")
            continue
        row = min(small, key=distance)
        answer = "**no**, the nearest is" if distance(row)[0] else "**yes**,"
        sentences.append(
            f"{goal}: {answer} {row['variant']} at {row['budget']} in {row['numbers']}, with "
            f"{100 * int(row['bytes']) / min(sizes):.0f}% of the bytes, "
            f"{100 * case.lost(float(row['metric']), best):.1f}% lost, {row['ratio']}x the time."
        )
    return sentences


def tabulate(rows, cases):
    """The table as Markdown."""
    import keras_bilinear

    lines = [
        "# real models",
        "",
        f"`python benchmarks/real_models.py --epochs={EPOCHS.value}`; keras-bilinear "
        f"{keras_bilinear.__version__}, {tables.machine()}, one thread, XNNPACK on. All scores are "
        "of the LiteRT files, on test inputs. Time: as many times the original's file of the same "
        "kind takes, both timed by turns. Lost: the share of the metric of the original's float32 "
        f"file. The goals compare with the smaller int8 file of the original; {SLOWER:g} times the "
        "time is not slower. Seconds: for the plan and the fit, or `recover` after them.",
    ]
    for case, case_rows in cases_of(rows, cases):
        (best,) = [
            float(row["metric"])
            for row in case_rows
            if (row["variant"], row["numbers"]) == ("original", "float32") and row["metric"]
        ] or [math.nan]
        header = f"| variant | budget | numbers | parameters | bytes | time | {case.metric} | lost "
        lines += ["", f"## {case.requirement}", "", *verdict(case, case_rows), ""]
        lines += [header + f"| {case.also} | seconds |", "|" + "---|" * 10]
        for row in case_rows:
            lines.append(_line(case, row, best))
    return lines


def cases_of(rows, cases):
    """`(case, its rows)`, in the order of `cases` and of the flags."""
    order = itertools.product(VARIANTS, NUMBERS)
    order = {key: number for number, key in enumerate(order)}
    for name, case in cases.items():
        found = [row for row in rows if row["model"] == name]
        found.sort(key=lambda row: (-float(row["budget"]), order[row["variant"], row["numbers"]]))
        if found:
            yield case, found


def _line(case, row, best):
    start = f"| {row['variant']} | {row['budget']} | {row['numbers']} | "
    if row["note"]:
        return f"{start}{row['parameters']} | {row['note'].replace('|', '/')} | | | | | |"
    lost = 100 * case.lost(float(row["metric"]), best)
    return (
        f"{start}{int(row['parameters']):,} | {int(row['bytes']):,} | {float(row['ratio']):.2f}x | "
        f"{float(row['metric']):.4f} | {lost:.1f}% | {float(row['also']):.4f} | {row['seconds']} |"
    )


def chosen_rows(name):
    """The keys of the rows that the flags choose for a model, in the order to do them in."""
    variants = [("original", "1")] if "original" in CHOSEN.value else []
    for budget in BUDGETS.value:
        variants += [(variant, budget) for variant in VARIANTS[1:] if variant in CHOSEN.value]
    return [(name, *variant, numbers) for variant in variants for numbers in KINDS.value]


def main(argv):
    del argv
    from real import CASES
    from real.case import MissingData, Sources

    import keras_bilinear
    from keras_bilinear.files import staged

    real_data = REAL_DATA_DIR.value and pathlib.Path(REAL_DATA_DIR.value)
    sources = Sources(pathlib.Path(PACKAGES_DIR.value), real_data, DATA_DIR.value)
    cases = {name: case(sources) for name, case in CASES.items()}
    results = pathlib.Path(RESULTS_DIR.value)
    path = results / "real_models.csv"
    rows = tables.read_rows(path)
    for name in MODELS.value or CASES:
        done = {tuple(row[field] for field in KEY) for row in rows}
        keys = [key for key in chosen_rows(name) if key not in done]
        if not hasattr(keras_bilinear, "recover"):
            keys = [key for key in keys if "recovered" not in key]
        if not keys:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                study = Study(cases[name], pathlib.Path(folder))
            except MissingData as error:
                logging.warning("%s is skipped: %s", name, error)
                continue
            for _, variant, budget, numbers in keys:
                rows.append({k: str(v) for k, v in study.row(variant, budget, numbers).items()})
                logging.info("%s", rows[-1])
                tables.write_rows(path, rows)
    with staged(results) as folder:
        (folder / "real_models.md").write_text("\n".join(tabulate(rows, cases)) + "\n")


if __name__ == "__main__":
    app.run(main)
