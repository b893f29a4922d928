"""Size and speed of the LiteRT files of the networks of a study.

    python benchmarks/accuracy_files.py --study=cifar10 --data_dir=DIR

Each network of `benchmarks/results/accuracy_STUDY.csv` is exported in float32, with
random weights, as neither its size nor its speed depends on them. The files are run
for one example at a time, on one thread, by processes that take turns; the medians of
the rounds count. They become `benchmarks/results/accuracy_STUDY_files.csv`, and columns
of the study's table.
"""

import ast
import functools
import pathlib
import statistics
import tempfile

import accuracy
import tables
import training
from absl import app, flags, logging

ROUNDS = 3
SECONDS = 0.3


def main(argv):
    del argv
    from keras_bilinear import export_litert
    from keras_bilinear.litert import run_litert

    study = accuracy.STUDY.value
    rows = accuracy.read_study(study)
    load_once = functools.cache(training.load)
    found = dict.fromkeys(map(accuracy.structure, rows))
    with tempfile.TemporaryDirectory() as folder:
        for number, key in enumerate(found):
            texts = dict(zip(accuracy.STRUCTURE, key, strict=True))
            numbers = {name: ast.literal_eval(texts[name]) for name in ("hidden", "rank")}
            run = training.Run(**texts | numbers)
            dataset = load_once(run.dataset)
            file = pathlib.Path(folder, f"{number}.tflite")
            report = export_litert(training.build(run, dataset), file)
            logging.info("%s: %d bytes", key, report.bytes)
            found[key] = file, dataset.x_train[:1, None], report.bytes, []
        for _ in range(ROUNDS):
            for file, inputs, _, times in found.values():
                times.append(run_litert(file, {"input_1": inputs}, seconds=SECONDS).latency_us)
    measured = [
        dict(zip(accuracy.STRUCTURE, key, strict=True))
        | {"bytes": size, "latency_us": f"{statistics.median(times):.0f}"}
        for key, (*_, size, times) in found.items()
    ]
    tables.write_rows(tables.RESULTS / f"accuracy_{study}_files.csv", measured)
    accuracy.tabulate(rows, study)


if __name__ == "__main__":
    flags.mark_flag_as_required("study")
    app.run(main)
