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

import math
import pathlib
import statistics
import tempfile
import time

import keras
import tables
from absl import app, flags, logging
from real.case import MissingData, Sources
from real.cases import CASES
from real.report import FIELDS, KEY, NUMBERS, VARIANTS, tabulate
from real.truncated_svd import truncated_svd_plan

import keras_bilinear
from keras_bilinear import export_litert, plan_rewrite, rewrite_model
from keras_bilinear.files import staged
from keras_bilinear.litert.inputs import input_specs
from keras_bilinear.litert.run import run_litert

ROUNDS, SECONDS = 5, 0.5

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
        self.expected = self.model.predict(self.inputs, verbose=0)
        self.seconds = {}  # that making a variant took

    def row(self, variant, budget, numbers):
        """A row of the table; where there is no such file, with the reason as its note."""
        row = dict.fromkeys(FIELDS, "") | {"model": self.case.name, "variant": variant}
        row |= {"budget": budget, "numbers": numbers}
        row["epochs"] = EPOCHS.value if variant == "recovered" else ""
        try:
            model = self._model(variant, budget)
            row["parameters"] = model.count_params()
            row["seconds"] = f"{self.seconds.get((variant, budget), 0.0):.1f}"
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
        if variant == "original":
            return self.model
        path = self._path(variant, budget, ".keras")
        if not path.exists():
            # All others begin with the fitted model, or have its size.
            fitted = None if variant == "fitted" else self._model("fitted", budget)
            data = self.case.training_inputs(self.case.training) if variant == "recovered" else None
            start = time.perf_counter()
            if variant == "fitted":
                model = self._fit(float(budget))
            elif variant == "svd":
                model = self._decompose(fitted.count_params())
            else:
                model = keras_bilinear.recover(fitted, self.model, data, epochs=EPOCHS.value)
            self.seconds[variant, budget] = time.perf_counter() - start
            model.save(path)
        return keras.models.load_model(path, compile=False)

    def _fit(self, budget):
        plan = plan_rewrite(self.model, budget=budget, calibration_data=self.calibration)
        logging.info("%s", plan)
        return rewrite_model(self.model, plan, self.calibration)

    def _decompose(self, parameters):
        return rewrite_model(self.model, truncated_svd_plan(self.model, parameters))

    def _file(self, variant, budget, numbers):
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

        specs = keras.tree.flatten(input_specs(self.model, self.case.input_shapes))
        arrays = keras.tree.flatten(self.inputs)
        return {
            spec.name: array[:count, None].astype(spec.dtype)
            for spec, array in zip(specs, arrays, strict=True)
        }

    def _outputs(self, path):
        """The outputs of a file for the test inputs, as `expected` has them."""
        outputs = run_litert(path, self._runs(), threads=2, seconds=0).outputs
        outputs = {name: values[:, 0] for name, values in outputs.items()}
        return outputs if isinstance(self.expected, dict) else next(iter(outputs.values()))

    def _latencies(self, paths):
        """Microseconds of one run of each file on one thread: medians, the files take turns."""
        times = [
            [run_litert(path, self._runs(1), seconds=SECONDS).latency_us for path in paths]
            for _ in range(ROUNDS)
        ]
        return [statistics.median(column) for column in zip(*times, strict=True)]


def chosen_rows(name):
    """The keys of the rows that the flags choose for a model, in the order to do them in."""
    variants = [("original", "1")] if "original" in CHOSEN.value else []
    for budget in BUDGETS.value:
        variants += [(variant, budget) for variant in VARIANTS[1:] if variant in CHOSEN.value]
    return [(name, *variant, numbers) for variant in variants for numbers in KINDS.value]


def main(argv):
    del argv
    real_data = REAL_DATA_DIR.value and pathlib.Path(REAL_DATA_DIR.value)
    sources = Sources(pathlib.Path(PACKAGES_DIR.value), real_data, DATA_DIR.value)
    cases = {name: case(sources) for name, case in CASES.items()}
    results = pathlib.Path(RESULTS_DIR.value)
    path = results / "real_models.csv"
    rows = tables.read_rows(path)

    def write_table():
        with staged(results) as folder:
            (folder / "real_models.md").write_text("\n".join(tabulate(rows, cases)) + "\n")

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
                write_table()
    write_table()


if __name__ == "__main__":
    app.run(main)
