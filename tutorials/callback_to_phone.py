# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a callback to a phone
#
# `BilinearRewrite` is a Keras callback that makes a network bilinear while it trains, inside one
# `fit`. The network begins full, as you have written it. After the first epochs, its layers show
# which rank each of them needs. The rest of the training makes up for the accuracy that the
# rewrite costs. Then the network is exported as a LiteRT (TensorFlow Lite) file, which a phone can
# run, and the file is tried out here. (If you know the ranks already, begin with a bilinear
# network: it takes less time.)

# %%
# Installs keras_bilinear where it is missing: from the clone that this notebook lies in, else from
# a repository. Fill in the address where the notebook was opened alone, as in Colab.
import importlib.util
import pathlib
import subprocess
import sys

REPOSITORY = ""  # what `git clone` takes, such as "https://github.com/OWNER/keras_bilinear"

if importlib.util.find_spec("keras_bilinear") is None:
    clone = pathlib.Path.cwd().parent
    if (clone / "keras_bilinear").is_dir():
        package = f"{clone}[tutorials]"
    elif REPOSITORY:
        package = f"keras-bilinear[tutorials] @ git+{REPOSITORY}"
    else:
        raise ValueError("`REPOSITORY` must be the address of keras_bilinear. Received: none")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np
from ai_edge_litert.interpreter import Interpreter

from keras_bilinear import BilinearRewrite, export_litert
from keras_bilinear.demo.tutorials import QUICK, load, set_up

set_up()
data = load("fashion_mnist")
epochs, batch_size, width = (2, 32, 64) if QUICK else (8, 128, 1024)

# %% [markdown]
# ## One `fit`
#
# Two networks are trained. The second network has the callback, which leaves it 5% of its
# parameters at the beginning of the second epoch and fits the layers to a sample of the training
# examples. The model and the optimizer stay the same objects. The optimizer keeps its statistics
# of the layers that are left alone.


# %%
def train(callbacks):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )
    steps = epochs * -(-len(data.x_train) // batch_size)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        data.x_train,
        data.y_train,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(data.x_test, data.y_test),
        callbacks=callbacks,
    )
    return model, history.history


rewrite = BilinearRewrite(at_epoch=1, budget=0.05, verbose=1)
full, full_history = train([])
small, small_history = train([rewrite])

# %%
rewrite.plan

# %%
plt.figure(figsize=(7, 4))
plt.plot(range(1, epochs + 1), full_history["val_accuracy"], marker="o", label="full")
plt.plot(range(1, epochs + 1), small_history["val_accuracy"], marker="o", label="rewritten")
plt.axvline(1.5, color="gray", linestyle="dotted")
plt.annotate("rewrite", (1.55, plt.ylim()[0]), color="gray", va="bottom")
plt.xlabel("epoch")
plt.ylabel("accuracy on the test set")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## LiteRT files
#
# Each network is written twice: with weights in float32, and with `dynamic_int8`, which stores
# weights as 8-bit integers and rounds the inputs of a layer as they come. `dynamic_int8` leaves
# weights of fewer than 1,024 numbers, such as small factors, in float32. The report says how large
# the file is, which operations it has, how long one example takes on this machine, and how far its
# outputs are from the outputs of the Keras model on these images.

# %%
reports = {}
for name, model in {"full": full, "bilinear": small}.items():
    for quantize in (None, "dynamic_int8"):
        label = f"{name}, {quantize or 'float32'}"
        reports[label] = export_litert(
            model, f"{label}.tflite", quantize, representative_data=data.x_test[:100]
        )
        print(label)
        print(reports[label])

# %% [markdown]
# ## Running the files
#
# An app does the same: it makes an interpreter, puts an image in and takes the answer out.


# %%
def answers(path, images):
    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    labels = []
    for image in images:
        interpreter.set_tensor(source["index"], image[None])
        interpreter.invoke()
        labels.append(interpreter.get_tensor(target["index"]).argmax())
    return np.array(labels)


accuracies = {
    label: np.mean(answers(f"{label}.tflite", data.x_test) == data.y_test) for label in reports
}

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3), sharey=True, layout="constrained")
for panel, title, form, values in zip(
    axes,
    ("kB", "microseconds", "accuracy on the test set"),
    ("{:,.0f}", "{:.1f}", "{:.3f}"),
    (
        [report.bytes / 1000 for report in reports.values()],
        [report.latency_us for report in reports.values()],
        list(accuracies.values()),
    ),
    strict=True,
):
    panel.bar_label(panel.barh(list(reports), values), fmt=form, padding=3)
    panel.set_title(title)
    panel.margins(x=0.2)
    panel.spines[:].set_visible(False)
axes[0].invert_yaxis()
plt.show()
