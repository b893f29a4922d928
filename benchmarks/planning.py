"""Measures how long plans and rewrites with calibration data take, and how much memory.

    python benchmarks/planning.py

Each model gets random weights and random inputs: what counts here is their size. Each runs in a
process of its own.
"""

import pathlib
import resource
import subprocess
import sys
import time

import tables
from absl import app, flags

MODEL = flags.DEFINE_string("model", None, "measures one model, in this process")
CHOSEN = flags.DEFINE_list("models", None, "models to measure; all by default")
BUDGET, EXAMPLES = 0.25, 1024


def vgg(keras):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            *(
                layer
                for filters in (32, 64, 128)
                for layer in (
                    layers.Conv2D(filters, 3, padding="same", activation="relu"),
                    layers.Conv2D(filters, 3, padding="same", activation="relu"),
                    layers.MaxPooling2D(),
                )
            ),
            layers.Flatten(),
            layers.Dense(1024, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def wide_cnn(keras):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(128, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),  # 6272
            layers.Dense(256, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def mobile_net(keras):
    return keras.applications.MobileNetV2(weights=None)


def res_net(keras):
    return keras.applications.ResNet50(weights=None)


def transformer(keras):
    """18 blocks of 512, with 8,192 words: 61 million parameters."""
    layers = keras.layers
    tokens = keras.Input((32,), dtype="int32")
    x = layers.Embedding(8192, 512)(tokens)
    for _ in range(18):
        normal = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(8, 64)(normal, normal, use_causal_mask=True)
        hidden = layers.Dense(2048, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(512)(hidden)
    return keras.Model(tokens, layers.Dense(8192, activation="softmax")(x))


MODELS = {
    "vgg": vgg,
    "wide_cnn": wide_cnn,
    "transformer": transformer,
    "mobile_net": mobile_net,
    "res_net": res_net,
}


def measure(name):
    """The row of a model."""
    import keras
    import numpy as np

    from keras_bilinear import plan_rewrite, rewrite_model

    keras.utils.set_random_seed(0)
    model = MODELS[name](keras)
    shape = (EXAMPLES, *model.input_shape[1:])
    rng = np.random.default_rng(0)
    if "int" in model.inputs[0].dtype:
        x = rng.integers(0, 8192, shape).astype("int32")
    else:
        x = rng.normal(size=shape).astype("float32")
    before = peak()
    start = time.perf_counter()
    plan = plan_rewrite(model, BUDGET, calibration_data=x, verbose=1)
    planned = time.perf_counter()
    rewrite_model(model, plan, calibration_data=x, verbose=1)
    seconds = planned - start, time.perf_counter() - planned
    return (
        f"| {name} | {model.count_params():,} | {seconds[0]:.1f} | {seconds[1]:.1f} | "
        f"{before:,.0f} | {peak():,.0f} |"
    )


def peak():
    """The most memory that the process has used so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv):
    del argv
    if MODEL.value:
        print(measure(MODEL.value))
        return
    rows, shown = [], "python benchmarks/planning.py"
    if CHOSEN.value:
        shown += f" --models={','.join(CHOSEN.value)}"
    for name in CHOSEN.value or MODELS:
        command = [sys.executable, str(pathlib.Path(__file__)), f"--model={name}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(done.stdout.splitlines()[-1])
        tables.write_lines(
            "planning.md",
            [
                "# planning",
                "",
                f"`{shown}`; {tables.machine()}, 2 cores. Budget {BUDGET}, "
                f"{EXAMPLES:,} examples; memory is the peak of the process, before the plan and "
                "in the end.",
                "",
                "| model | parameters | plan, s | rewrite, s | before, MB | peak, MB |",
                "|---|---|---|---|---|---|",
                *rows,
            ],
        )


if __name__ == "__main__":
    app.run(main)
