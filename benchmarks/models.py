"""Rewrites well-known models on each backend, and expands them again.

    python benchmarks/models.py

`rewrite_model` rewrites each model of `keras.applications` (random weights, 224x224 images) to a
tenth of its parameters, and each Transformer of KerasHub (`pip install keras-hub`) to a quarter.
Then the model predicts, trains for a step, is saved, loaded in a new process and expanded. Each
backend has a process of its own. The table has the largest differences of outputs, relative to
their standard deviation. A row that is in `benchmarks/results/models.json` is not done again.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

import tables
from absl import app, flags

BACKENDS = ("tensorflow", "jax", "torch")
APPLICATIONS = (
    "VGG16",
    "ResNet50",
    "MobileNetV2",
    "EfficientNetB0",
    "DenseNet121",
    "ConvNeXtTiny",
)
SMALL = {"num_layers": 2, "hidden_dim": 256, "intermediate_dim": 1024}
HUB = {
    "BertBackbone": {"num_heads": 4, "vocabulary_size": 5000, **SMALL},
    "GPT2Backbone": {"num_heads": 4, "vocabulary_size": 5000, **SMALL},
    "RobertaBackbone": {"num_heads": 4, "vocabulary_size": 5000, **SMALL},
    "GemmaBackbone": {
        "num_query_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocabulary_size": 5000,
        **SMALL,
    },
    "LlamaBackbone": {
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "vocabulary_size": 5000,
        **SMALL,
    },
    "TransformerEncoder": {"intermediate_dim": 1024, "num_heads": 4},
    "TransformerDecoder": {"intermediate_dim": 1024, "num_heads": 4},
}
BUDGET = {"applications": 0.1, "hub": 0.25}
TOKENS, WIDTH = 16, 256


def build(name):
    """A model and inputs for it."""
    import keras
    import numpy as np

    rng = np.random.default_rng(0)
    if name in APPLICATIONS:
        model = getattr(keras.applications, name)(weights=None, classifier_activation=None)
        return model, rng.random((2, *model.input_shape[1:]), "float32")
    import keras_hub

    if name.startswith("Transformer"):
        inputs = keras.Input((TOKENS, WIDTH))
        layer = getattr(keras_hub.layers, name)(**HUB[name])
        x = rng.normal(size=(2, TOKENS, WIDTH)).astype("float32")
        return keras.Model(inputs, layer(inputs)), x
    model = getattr(keras_hub.models, name)(**HUB[name])
    x = {
        tensor.name: np.ones((2, TOKENS), "int32")
        if "mask" in tensor.name
        else rng.integers(2, size=(2, TOKENS)).astype("int32")
        for tensor in model.inputs
    }
    return model, x


def outputs(model, x):
    import keras
    import numpy as np

    return [
        np.asarray(keras.ops.convert_to_numpy(y), "float32")
        for y in keras.tree.flatten(model(x, training=False))
    ]


def difference(actual, expected):
    import numpy as np

    pairs = zip(actual, expected, strict=True)
    return max(float(np.abs(a - b).max() / b.std()) for a, b in pairs)


def check(name, folder):
    """Rewrites, runs, saves and expands a model; prints a JSON record."""
    import keras
    import numpy as np

    import keras_bilinear

    keras.utils.set_random_seed(0)
    model, x = build(name)
    before = outputs(model, x)
    start = time.perf_counter()
    plan = keras_bilinear.plan_rewrite(
        model, budget=BUDGET["applications" if name in APPLICATIONS else "hub"]
    )
    planned = time.perf_counter()
    small = keras_bilinear.rewrite_model(model, plan)
    rewritten = time.perf_counter()
    if difference(outputs(model, x), before):
        raise RuntimeError("the full model has changed")
    small.compile("sgd", keras.losses.MeanSquaredError())
    targets = keras.tree.map_structure(
        lambda y: keras.ops.convert_to_numpy(y) + 1, small(x, training=False)
    )
    small.train_on_batch(x, targets)
    trained = outputs(small, x)
    small.save(f"{folder}/small.keras")
    np.savez(f"{folder}/x.npz", **(x if isinstance(x, dict) else {"x": x}))
    subprocess.run([sys.executable, __file__, "load", folder], check=True)
    with np.load(f"{folder}/outputs.npz") as file:
        loaded = [file[key] for key in file]
    expanded = outputs(keras_bilinear.expand_model(small), x)
    record = {
        "parameters": model.count_params(),
        "small": small.count_params(),
        "layers": sum(layer.rank is not None for layer in plan.values()),
        "plan_seconds": planned - start,
        "rewrite_seconds": rewritten - planned,
        "loaded": difference(loaded, trained),
        "expanded": difference(expanded, trained),
    }
    print(json.dumps(record))


def load(folder):
    import keras
    import numpy as np

    import keras_bilinear  # noqa: F401

    with contextlib.suppress(ImportError):
        import keras_hub  # noqa: F401
    model = keras.models.load_model(f"{folder}/small.keras")
    with np.load(f"{folder}/x.npz") as file:
        x = dict(file)
    x = x["x"] if x.keys() == {"x"} else x
    np.savez(f"{folder}/outputs.npz", *outputs(model, x))


def tabulate(records):
    import keras

    lines = [
        "# models",
        "",
        f"`python benchmarks/models.py`; Python {platform.python_version()}, Keras "
        f"{keras.__version__}, {platform.machine()} CPU. Rewritten at "
        f"{BUDGET['applications']:.0%} (KerasHub: {BUDGET['hub']:.0%}) of the parameters without "
        "calibration, trained for a step, saved. Differences of the outputs of the model that a "
        "fresh process loads, and of the expanded one, relative to their deviation.",
        "",
        "| model | backend | parameters | small | bilinear layers | plan s | rewrite s | loaded | "
        "expanded |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, record in records.items():
        name, backend = key.split(" ")
        lines.append(
            f"| {name} | {backend} | {record['parameters']:,} | {record['small']:,} | "
            f"{record['layers']} | {record['plan_seconds']:.1f} | "
            f"{record['rewrite_seconds']:.1f} | "
            f"{record['loaded']:.1e} | {record['expanded']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main(argv):
    del argv
    from keras_bilinear.files import staged

    path = tables.RESULTS / "models.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    for name in NAMES.value:
        for backend in BACKENDS:
            if f"{name} {backend}" in records:
                continue
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(
                    [sys.executable, __file__, "check", name, folder],
                    env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
                    stdout=subprocess.PIPE,
                )
            if done.returncode:
                print(f"{name} on {backend} failed, see above", file=sys.stderr)
                continue
            records[f"{name} {backend}"] = json.loads(done.stdout.splitlines()[-1])
            with staged(tables.RESULTS) as folder:
                (folder / path.name).write_text(json.dumps(records, indent=1) + "\n")
                (folder / "models.md").write_text(tabulate(records))
    print(tabulate(records))


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        check(*sys.argv[2:])
    elif sys.argv[1:2] == ["load"]:
        load(*sys.argv[2:])
    else:
        NAMES = flags.DEFINE_list("names", [*APPLICATIONS, *HUB], "models to check")
        app.run(main)
