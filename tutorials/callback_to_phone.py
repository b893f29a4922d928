# ---
# jupyter:
#   accelerator: GPU
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-bilinear/keras-bilinear/blob/main/tutorials/callback_to_phone.ipynb)
#
# # From a callback to a phone
#
# `BilinearRewrite` is a Keras callback that makes a network bilinear while it is trained, inside
# one `fit`. The network begins full, as you have written it; after the first epochs its layers
# show how much rank each of them needs, and the rest of the training gets over the rewrite. What
# comes out is written as a LiteRT (TensorFlow Lite) file with built-in operations only, as a phone
# runs it, and tried out here. (Where the ranks are known already, begin bilinear: that takes less
# time.)

# %% tags=["skip-execution"]
# %pip install -q "keras-bilinear[tutorials]"

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
# Two networks are trained, one of them with the callback: at the beginning of its second epoch it
# keeps 5% of its parameters. The layers are fitted to a sample of the training examples; model and
# optimizer stay the same objects, and what the optimizer knows of the layers that are left alone
# stays as well.


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
# Each network is written twice: with its weights in float32, and with `dynamic_int8`, where
# weights are stored as integers of eight bits and inputs are rounded as they come. It leaves alone
# what has fewer than 1,024 numbers, as small factors do. The report says how large the file is,
# which operations it has, how long one example takes on this machine, and how far its outputs are
# from those of the Keras model on the first of these images.

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
# ## Running them
#
# This is what an app does: make an interpreter, put an image in, take the answer out.


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
for one, title, form, values in zip(
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
    one.bar_label(one.barh(list(reports), values), fmt=form, padding=3)
    one.set_title(title)
    one.margins(x=0.2)
    one.spines[:].set_visible(False)
axes[0].invert_yaxis()
plt.show()
