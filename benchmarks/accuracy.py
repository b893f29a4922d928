"""Trains full, bilinear and narrower full networks alike, and tabulates how well they do.

    python benchmarks/accuracy.py --study=fashion_mnist --data_dir=DIR
    python benchmarks/accuracy.py --study=initialization --data_dir=DIR
    python benchmarks/accuracy.py --study=stability --data_dir=DIR
    python benchmarks/accuracy.py --study=cifar10 --data_dir=DIR

and so on for the studies `imdb_reviews`, `spoken_digit` and `tiny_shakespeare` of recurrent
networks, and for `cifar10_resnet` and `spoken_digit_conv`.

Each finished run becomes a row of `benchmarks/results/accuracy_STUDY.csv`. A run that has a row is
not done again, so a study can be stopped and continued. A table of the means over the rows is
written beside the rows, as Markdown.

A study makes every choice by the accuracy on held-out data: the last tenth of the training set. The
chosen networks are trained again on the whole training set, and only then tested on the test set.
"""

import dataclasses
import functools
import itertools
from ast import literal_eval

from absl import app, flags, logging
from networks import CONVOLUTIONAL
from tables import RESULTS, machine, read_rows, write_rows
from training import SEEDS, Run, load, train

from keras_bilinear.files import staged

# The columns that say what network a run trained.
STRUCTURE = (
    "dataset",
    "network",
    "hidden",
    "depth",
    "rank",
    "pattern",
    "recurrent",
    "architecture",
)
# What `accuracy_costs.py` finds of it, and how tables call that.
COSTS = {"bytes": ".tflite bytes", "latency_us": ".tflite µs", "epoch_s": "seconds for an epoch"}
REGIMES = (
    {"optimizer": "adam"},
    {"optimizer": "adamw", "weight_decay": 0.05, "dropout": 0.1},
    {"optimizer": "adamw", "weight_decay": 0.05, "dropout": 0.1, "label_smoothing": 0.1},
)
TUNING_SEEDS = 2
SHORT_RUN_SEEDS = 5  # Where a run takes less than a minute.
CIFAR10_EPOCHS, CIFAR10_LONG = 3, 20
PATTERNS = ("channel", "spatial")
# Ranks and scales of bilinear networks.
SHAPES = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (1, 3))
# What part of its widths narrower full networks have.
PARTS = (2, 4, 8)
BUDGET = 0.03  # Of networks that are rewritten, where a plan can leave so little.


def tune(run, accuracy, regimes=REGIMES, seeds=TUNING_SEEDS):
    """The regime and the learning rate of `run` that are best on held-out data.

    In each regime, the search doubles or halves the learning rate of `run` for as long as the
    accuracy rises. Every network is tuned in this way.
    """

    def mean(candidate):
        runs = (dataclasses.replace(candidate, seed=seed, tuning=True) for seed in range(seeds))
        return sum(map(accuracy, runs)) / seeds

    best = []
    for regime in regimes:
        start = dataclasses.replace(run, **regime)
        best.append((mean(start), start))
        for factor in (2.0, 0.5):
            rate = start.learning_rate * factor
            while mean(moved := dataclasses.replace(start, learning_rate=rate)) > best[-1][0]:
                best[-1] = mean(moved), moved
                rate *= factor
    return max(best, key=lambda pair: pair[0])[1]


def fashion_mnist(accuracy):
    """The MLP 784-1024-1024-10 against bilinear MLPs of at most 3% of its size.

    Every network is tuned, and then tested in its best setting and in the setting that is best for
    the full network. Then rank 3 is tested in the setting of rank 2 at scale 2 and at its own
    learning rate, and further bilinear networks are tested in the setting of the full network.
    """
    base = Run("fashion_mnist", "full", (1024, 1024), epochs=12)
    bilinear = dataclasses.replace(base, network="bilinear, rank 10", rank=10, kernels="gain")
    wide = _bilinear(base, 2, 2)
    narrower = dataclasses.replace(base, network="narrower full", hidden=(54, 54))
    names = ("optimizer", "learning_rate", "weight_decay", "dropout", "label_smoothing")
    settings = {}
    for network in (base, bilinear, wide, narrower):
        own = tune(network, accuracy)
        settings[network] = {name: getattr(own, name) for name in names}
        chosen = dict.fromkeys((own, dataclasses.replace(own, **settings[base])))
        _test(accuracy, chosen, SHORT_RUN_SEEDS)
    rank_3 = dataclasses.replace(_bilinear(base, 3, 2), **settings[wide])
    chosen = dict.fromkeys((rank_3, *_tuned(accuracy, (rank_3,), TUNING_SEEDS)))
    grid = _grid(dataclasses.replace(base, **settings[base]))
    _test(accuracy, (*chosen, *grid), SHORT_RUN_SEEDS)


def initialization(accuracy):
    """Ways to store factors, on three data sets, at the learning rates of the full networks."""
    tasks = (
        ("digits", (256, 256, 256), 30, {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.03}),
        ("fashion_mnist", (1024, 1024), 4, {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.03}),
        ("imdb_reviews", (128,), 4, {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.3}),
    )
    for dataset, hidden, epochs, learning_rates in tasks:
        for optimizer, learning_rate in learning_rates.items():
            # Dividing the gradients makes no difference to Adam and its kin.
            ways = ("gain", "plain", "undivided") if optimizer == "sgd" else ("gain", "plain")
            networks = [("full", 0), *itertools.product(ways, (1, 4))]
            for (kernels, rank), seed in itertools.product(networks, range(SEEDS.value)):
                run = Run(
                    dataset=dataset,
                    network=f"bilinear, rank {rank}" if rank else "full",
                    hidden=hidden,
                    rank=rank,
                    kernels=kernels,
                    optimizer=optimizer,
                    learning_rate=learning_rate,
                    weight_decay=0.004 if optimizer == "adamw" else 0.0,
                    epochs=epochs,
                    seed=seed,
                )
                accuracy(run)


def stability(accuracy):
    """Whether deep networks of high rank or wide layers begin to train, by the way of storing."""
    base = Run("cifar10", "full", (32, 64, 128, 1024), epochs=2, examples=10_000)
    shapes = ((rank, 1, "channel") for rank in (1, 8, 16, 32))
    shapes = (*shapes, (1, 2, "spatial"), (8, 2, "channel"))
    for seed in range(SEEDS.value):
        accuracy(dataclasses.replace(base, seed=seed))
        for (rank, scale, pattern), kernels in itertools.product(shapes, ("gain", "unbounded")):
            if (scale, kernels) == (1, "unbounded") and rank <= 8:
                continue  # The same.
            network = _bilinear(base, rank, scale, pattern, kernels)
            accuracy(dataclasses.replace(network, seed=seed))


def cifar10(accuracy):
    """The small VGG of the paper: full, narrower, shallower, bilinear and rewritten networks.

    The study has four parts:

    1. The full network and bilinear networks by rank, scale and pattern, all at one learning
       rate. The network of scale 1.5 has less than 1% of the parameters.
    2. Each network at its own learning rate: the full network, two narrower full networks, the
       full network with one convolution less in each block, and a bilinear network. The
       narrower networks are as small as the bilinear networks of just less than 1% and 3%.
       Then come bilinear networks of a larger scale, a rewritten network and smaller full
       networks, at the learning rate of the first part.
    3. The tuned networks, and the bilinear networks of just less than 1% and 3%, for more
       epochs.
    4. One network of each kind for as many epochs, with dropout, as nothing else regularizes
       it, and in mixed precision. The wider network with two convolutions in each block has
       as many multiplications as the bilinear network.
    """
    base = Run("cifar10", "full", (32, 64, 128, 1024), epochs=CIFAR10_EPOCHS)
    grid = itertools.product((1, 2), (1, 2, 4, 8), PATTERNS)
    grid = [_bilinear(base, rank, scale, pattern) for scale, rank, pattern in grid]
    one_percent = _bilinear(base, 1, 1.5, "channel")
    three_percent = _bilinear(base, 8, 1, "channel")
    _test(accuracy, (base, *grid, one_percent))
    narrower = [
        dataclasses.replace(base, network="narrower full", hidden=(8, 16, 32, 25)),
        dataclasses.replace(base, network="narrower full, 3%", hidden=(10, 20, 40, 46)),
    ]
    *_, shallower = _smaller(base)  # The last one is the deepest.
    tuned = _tuned(accuracy, (*narrower, base, _bilinear(base, 1, 2, "channel"), shallower))
    _test(accuracy, (*tuned, *_grid(base, PATTERNS)))
    longer = (*tuned, one_percent, three_percent)
    _test(accuracy, [dataclasses.replace(run, epochs=CIFAR10_LONG) for run in longer], seeds=3)
    narrower, _, base, bilinear, shallower = tuned
    wider = dataclasses.replace(
        shallower, network="shallower, wider full", hidden=(50, 100, 200, 1024)
    )
    regime = {"epochs": CIFAR10_LONG, "dropout": 0.25, "policy": "mixed_bfloat16"}
    kinds = (base, bilinear, shallower, wider, narrower)
    _test(accuracy, [dataclasses.replace(run, **regime) for run in kinds])


def cifar10_resnet(accuracy):
    """ResNet-20. Rewritten to 4%: a plan can leave it 3.5% at the least."""
    base = Run("cifar10", "full", (16, 32, 64), epochs=CIFAR10_EPOCHS, architecture="resnet20")
    shapes = ((1, 1, "spatial"),)
    _convolutional_study(accuracy, base, (3, 5, 10), shapes, ("spatial",), budget=0.04)


def imdb_reviews(accuracy):
    """Embedding and LSTM, then embedding and GRU.

    First all networks train at one learning rate. Then they train longer, each at its own
    learning rate. In the end the largest networks of at most 1% join them, and each network
    has dropout if dropout helps it.
    """
    for recurrent, units, fewer_units in (("LSTM", 66, 26), ("GRU", 76, 30)):
        base = Run("imdb_reviews", "full", (64, 64), epochs=3, recurrent=recurrent)
        _recurrent_study(
            accuracy,
            base,
            bilinear=((1, 1), (4, 1), (8, 1), (4, 1.25)),
            narrower=(1, 32),
        )
        # A bag of words needs a table of words, so the parameters go there: into
        # near-square factors, which words share, or into a number for each word.
        base = dataclasses.replace(base, epochs=5)
        _recurrent_study(
            accuracy,
            base,
            bilinear=(((16, 2), 1), ((1, 8), 1, "low-rank"), ((1, 16), 1, "low-rank")),
            narrower=(1, units),
            tuned=True,
        )
        narrower = dataclasses.replace(base, network="narrower full", hidden=(1, units))
        networks = (
            base,
            _bilinear(base, (1, 8), 1, "low-rank"),
            narrower,
            # A number for each word is more than 1%: two share one, or rare ones have none.
            _bilinear(base, (1, 2), 1, "halves"),
            dataclasses.replace(
                narrower,
                network="narrower full, 1%",
                hidden=(1, fewer_units),
                pattern="frequent half",
            ),
            dataclasses.replace(
                _bilinear(base, (0, 4), 1), hidden=(1, 64), pattern="frequent half"
            ),
        )
        _test(accuracy, _tuned(accuracy, networks, regimes=({}, {"dropout": 0.2})))


def spoken_digit(accuracy):
    """A GRU over log-mel frames.

    First all networks train at one learning rate. Bilinear networks also train with recurrent
    factors that each step moves half as much. Then each network trains at its own learning
    rate. Then the test set judges networks without and with dropout, as 225 held-out recordings
    in two runs do not tell which is better. Wider bilinear networks do not stand the full
    network's learning rate for so long, so each is tuned as well. The wider network of 484
    units has just less than 3% of the parameters.
    """
    base = Run("spoken_digit", "full", (256,), epochs=30, recurrent="GRU")
    narrower = (27,)
    shapes = ((1, 1), (2, 1), (4, 1), (1, 1.25))
    _recurrent_study(accuracy, base, shapes, narrower)
    _test(accuracy, [_bilinear(base, *shape, kernels="calm") for shape in shapes])
    # Clipped, as without that high rates make the loss NaN by chance.
    base = dataclasses.replace(base, learning_rate=4e-3, clipnorm=1.0)
    _recurrent_study(accuracy, base, ((2, 1),), narrower, tuned=True)
    base = dataclasses.replace(base, learning_rate=2e-3)
    networks = (
        base,
        _bilinear(base, 2, 1),
        dataclasses.replace(base, network="narrower full", hidden=narrower),
    )
    for regime in ({}, {"dropout": 0.1}):
        _test(accuracy, _tuned(accuracy, networks, TUNING_SEEDS, (regime,)))
    wider = [_bilinear(base, *shape) for shape in ((1, 2), (2, 2), (1, 1.375))]
    _test(accuracy, _tuned(accuracy, wider))
    network = _bilinear(base, 2, 1, kernels="calm")
    for rate in (2e-3, 4e-3):
        accuracy(dataclasses.replace(network, learning_rate=rate, tuning=True))


def spoken_digit_conv(accuracy):
    """The small VGG over log-mel frames."""
    base = Run("spoken_digit", "full", (16, 32, 64, 256), epochs=12)
    bilinear = (4, 1, "channel"), (1, 1, "channel")
    # Some runs at high rates do not begin to train.
    _convolutional_study(
        accuracy, base, (3, 6, 12, 30), bilinear, PATTERNS, TUNING_SEEDS, SHORT_RUN_SEEDS
    )


def tiny_shakespeare(accuracy):
    """Embedding and GRU over characters, at one learning rate and then each at its own."""
    base = Run("tiny_shakespeare", "full", (64, 512), epochs=4, recurrent="GRU")
    base = dataclasses.replace(base, learning_rate=2e-3)
    _recurrent_study(accuracy, base, ((1, 1), (2, 1), (4, 1), (1, 1.5)), (16, 64))
    # In so few steps the best rates are high: the search begins there. Clipped as above.
    base = dataclasses.replace(base, learning_rate=8e-3, clipnorm=1.0)
    _recurrent_study(accuracy, base, ((4, 1),), (16, 72), tuned=True)


def _recurrent_study(accuracy, base, bilinear, narrower, tuned=False):
    """Tests a full network, bilinear networks by rank, scale and pattern, and a narrower one.

    The networks train at the learning rate of `base`. If `tuned`, each trains at the learning
    rate that is best for it, and more bilinear networks at the full network's.
    """
    narrower = dataclasses.replace(base, network="narrower full", hidden=narrower)
    networks = (base, *(_bilinear(base, *shape) for shape in bilinear), narrower)
    networks = _tuned(accuracy, networks) if tuned else networks
    _test(accuracy, networks)
    if tuned:
        _test(accuracy, _grid(networks[0]))


def _convolutional_study(
    accuracy, base, narrower, bilinear, patterns, tuning_seeds=1, seeds=None, budget=BUDGET
):
    """Tests a full, a narrower and bilinear networks, each at its own learning rate.

    Then the narrower network, and bilinear networks by rank, scale and pattern, train at the
    learning rate of the full network.
    """
    narrower = dataclasses.replace(base, network="narrower full", hidden=narrower)
    networks = (base, narrower, *(_bilinear(base, *shape) for shape in bilinear))
    networks = _tuned(accuracy, networks, tuning_seeds)
    of_full = dataclasses.replace(narrower, learning_rate=networks[0].learning_rate)
    grid = _grid(networks[0], patterns, budget)
    _test(accuracy, dict.fromkeys((*networks, of_full, *grid)), seeds)


def _bilinear(base, rank, scale, pattern="", kernels="gain"):
    """The bilinear network with the layers of a full network."""
    return dataclasses.replace(
        base,
        network=f"bilinear, rank {rank}, scale {scale}",
        hidden=tuple(int(scale**2 * width) for width in base.hidden),
        rank=rank,
        pattern=pattern,
        kernels=kernels,
    )


def _grid(base, patterns=("",), budget=BUDGET):
    """Bilinear networks by rank, scale and pattern, a rewritten network, smaller full networks.

    Bilinear networks of a larger scale have the first pattern.
    """
    bilinear = [
        _bilinear(base, rank, scale, pattern)
        for rank, scale in SHAPES
        for pattern in (patterns if scale == 1 else patterns[:1])
    ]
    changes = {"network": "rewritten after a fifth", "kernels": "rewritten", "budget": budget}
    return [*bilinear, dataclasses.replace(base, **changes), *_smaller(base)]


def _smaller(base):
    """Narrower full networks, and then shallower full networks if the network allows."""
    for part in PARTS:
        hidden = tuple(width // part for width in base.hidden)
        yield dataclasses.replace(base, network=f"full, width 1/{part}", hidden=hidden)
    if base.recurrent:
        return
    if base.dataset in CONVOLUTIONAL:
        shallower = [{"depth": depth} for depth in range(1, base.depth)]
    else:
        shallower = [{"hidden": base.hidden[:depth]} for depth in range(1, len(base.hidden))]
    for depth, changes in enumerate(shallower, 1):
        yield dataclasses.replace(base, network=f"shallower full, depth {depth}", **changes)


def _tuned(accuracy, networks, seeds=1, regimes=({},)):
    """The networks, each in its best regime and at its best learning rate."""
    return [tune(network, accuracy, regimes, seeds) for network in networks]


def _test(accuracy, networks, seeds=None):
    for seed, network in itertools.product(range(seeds or SEEDS.value), networks):
        accuracy(dataclasses.replace(network, seed=seed))


def tabulate(rows, study):
    """Writes the means and standard deviations over the seeds as Markdown, beside the rows."""
    import numpy as np

    costs = read_costs(study)
    group = ("tuning", "dataset", "optimizer", "weight_decay", "dropout", "label_smoothing")
    group += ("recurrent", "network", "pattern", "kernels", "learning_rate", "epochs")
    group += ("examples", "clipnorm", "policy")
    groups, full_sizes = {}, {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in group), []).append(row)
        if row["network"] == "full":
            full_sizes[row["dataset"], row["recurrent"]] = int(row["parameters"])
    command = f"python benchmarks/accuracy.py --study={study}"
    backends = " and ".join(dict.fromkeys(row["backend"] for row in rows))
    lines = [
        f"# accuracy {study.replace('_', ' ')}",
        "",
        f"`{command}`; {machine(backends)}. Mean ± deviation over seeds.",
        "Bits: cross-entropy on the same data as the accuracy. MACs: of the exported file.",
    ]
    if costs:
        lines.append(f"LiteRT files and times: `{command.replace('.py', '_costs.py')}`.")
    for tuning, title in (("False", "Test set"), ("True", "Tuning, on held-out data")):
        members_of = {key[1:]: rows for key, rows in groups.items() if key[0] == tuning}
        if not members_of:
            continue
        header = (*group[1:], "seeds", "parameters", "share", "MACs", "train loss", "accuracy")
        header += ("bits", *(COSTS.values() if costs else ("seconds for an epoch",)))
        lines += ["", f"## {title}", "", "| " + " | ".join(header) + " |"]
        lines.append("|" + "---|" * len(header))
        for key, members in members_of.items():
            size = int(members[0]["parameters"])
            spread = []
            for column in ("train_loss", "accuracy", "bits"):
                values = np.array([float(row[column] or "nan") for row in members])
                spread.append(f"{values.mean():.4f} ± {values.std():.4f}")
            share = size / full_sizes[members[0]["dataset"], members[0]["recurrent"]]
            macs = f"{int(members[0]['macs']):,}"
            cells = (*key, len(members), f"{size:,}", f"{share:.2%}", macs, *spread)
            if costs:
                cost = costs.get(structure(members[0]), {})
                cells += tuple(f"{literal_eval(cost[name]):,}" if cost else "" for name in COSTS)
            else:
                epochs = [float(row["seconds"]) / float(row["epochs"]) for row in members]
                cells += (f"{np.mean(epochs):.1f}",)
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    with staged(RESULTS) as folder:
        (folder / f"accuracy_{study}.md").write_text("\n".join(lines) + "\n")


STUDIES = {
    study.__name__: study
    for study in (
        fashion_mnist,
        initialization,
        stability,
        cifar10,
        imdb_reviews,
        spoken_digit,
        spoken_digit_conv,
        cifar10_resnet,
        tiny_shakespeare,
    )
}
STUDY = flags.DEFINE_enum("study", None, list(STUDIES), "what to run")


def read_study(study):
    """The finished runs of a study; older rows lack the newer columns."""
    missing = {field.name: str(field.default) for field in dataclasses.fields(Run)}
    missing["bits"] = ""
    return [missing | row for row in read_rows(RESULTS / f"accuracy_{study}.csv")]


def structure(row):
    return tuple(row[name] for name in STRUCTURE)


def read_costs(study):
    """What `accuracy_costs.py` found of the networks of a study, by their structure."""
    rows = read_rows(RESULTS / f"accuracy_{study}_costs.csv")
    older = {"architecture": "", "depth": str(Run.depth)}
    return {structure(row): row for row in (older | row for row in rows)}


def main(argv):
    del argv
    fields = [field.name for field in dataclasses.fields(Run)]
    path = RESULTS / f"accuracy_{STUDY.value}.csv"
    rows = read_study(STUDY.value)
    finished = {tuple(row[name] for name in fields): row for row in rows}
    load_once = functools.cache(load)

    def accuracy(run):
        """The accuracy of a run, from its row, or by training if it has no row."""
        if run.key not in finished:
            row = dict(zip(fields, run.key, strict=True)) | train(
                run, load_once(run.dataset, run.examples)
            )
            row = {name: str(value) for name, value in row.items()}
            rows.append(row)
            write_rows(path, rows)
            finished[run.key] = row
            logging.info("%s", row)
            tabulate(rows, STUDY.value)
        return float(finished[run.key]["accuracy"])

    STUDIES[STUDY.value](accuracy)


if __name__ == "__main__":
    flags.mark_flag_as_required("study")
    app.run(main)
