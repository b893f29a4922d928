"""Measures what the networks of a study cost: their LiteRT files and their training.

    python benchmarks/accuracy_costs.py --study=cifar10 --data_dir=DIR

Exports each network of `benchmarks/results/accuracy_STUDY.csv` in float32, with random weights, as
neither size nor speed depends on the weights. Processes that take turns run the files, one example
at a time, on one thread; the medians over the rounds count. Training steps, with Adam on one batch,
take turns as well. The seconds of an epoch are the median of a step times the number of steps.
Unlike the seconds in the rows of the study, all costs are measured on the same machine. They become
`benchmarks/results/accuracy_STUDY_costs.csv` and columns of the table of the study.
"""

import ast
import functools
import pathlib
import statistics
import tempfile

import accuracy
import networks
import tables
import training
from absl import app, flags, logging

ROUNDS = 3
SECONDS = 0.3
TRAINING_ROUNDS = 5
TRAINING_SECONDS = 2.0  # Seconds for which a network trains until the next network has its turn.


def trainer(run, dataset):
    """A new network, and a function that trains it for a step."""
    import keras

    model = networks.build(run, dataset)
    training.compile_model(model, run, steps=1000)
    x = dataset.x_train[: run.batch_size]
    y = keras.utils.to_categorical(dataset.y_train[: run.batch_size], dataset.classes)
    return model, lambda: model.train_on_batch(x, y)


def main(argv):
    del argv
    from keras_bilinear import export_litert
    from keras_bilinear.litert.run import run_litert
    from keras_bilinear.reports.timing import median_seconds

    study = accuracy.STUDY.value
    rows = accuracy.read_study(study)
    load_once = functools.cache(training.load)
    # What is rewritten cannot be told from its row.
    built = [row for row in rows if row["kernels"] != "rewritten"]
    structures = list(dict.fromkeys(map(accuracy.structure, built)))
    costs = [dict(zip(accuracy.STRUCTURE, network, strict=True)) for network in structures]
    files, steps, counts = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, cost in enumerate(costs):
            numbers = {name: ast.literal_eval(cost[name]) for name in ("hidden", "rank", "depth")}
            run = training.Run(**cost | numbers)
            dataset = load_once(run.dataset)
            model, step = trainer(run, dataset)
            file = pathlib.Path(folder, f"{number}.tflite")
            report = export_litert(model, file)
            logging.info("%s: %d bytes", structures[number], report.bytes)
            cost["bytes"] = report.bytes
            files.append((file, {"input_1": dataset.x_train[:1, None]}))
            steps.append(step)
            counts.append(-(-len(dataset.x_train) // run.batch_size))
        latencies = [
            [run_litert(*file, seconds=SECONDS).latency_us for file in files] for _ in range(ROUNDS)
        ]
    seconds = median_seconds(steps, TRAINING_ROUNDS, TRAINING_SECONDS)
    for cost, *latency, step, count in zip(costs, *latencies, seconds, counts, strict=True):
        cost["latency_us"] = f"{statistics.median(latency):.0f}"
        cost["epoch_s"] = f"{count * step:.1f}"
    tables.write_rows(tables.RESULTS / f"accuracy_{study}_costs.csv", costs)
    accuracy.tabulate(rows, study)


if __name__ == "__main__":
    flags.mark_flag_as_required("study")
    app.run(main)
