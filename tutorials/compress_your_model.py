# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Compress your own trained model
#
# You have a trained network and want to keep a tenth of its parameters. For each layer and each
# rank, `rewrite_model` predicts the error of a bilinear layer. It shares out the budget so that
# the sum of the squared errors is least. If you give it inputs of the model, it also *fits* the
# layers to them, one after the other: each layer learns to give the outputs of the full model,
# although its inputs come from the rewritten layers before it. The last plot shows what the fit
# gains here; it depends on the network.
#
# Replace the model and the data below by your own; nothing else changes.

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

from keras_bilinear import compare, expand_model, plan_rewrite, rewrite_model
from keras_bilinear.demo.tutorials import QUICK, load, set_up

set_up()
keras.utils.set_random_seed(0)
data = load("fashion_mnist")
test_set = data.x_test, data.y_test

# %% [markdown]
# ## The trained model
#
# The model has stock dense layers.

# %%
width = 32 if QUICK else 256
trained = keras.Sequential(
    [
        keras.Input((28, 28, 1)),
        keras.layers.Flatten(),
        keras.layers.Dense(width, activation="relu", name="hidden"),
        keras.layers.Dense(width, activation="relu", name="hidden_2"),
        keras.layers.Dense(10, dtype="float32", name="classes"),
    ],
    name="clothes",
)


def train(model, learning_rate, epochs):
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(data.x_train, data.y_train, 128, epochs, validation_data=test_set)


def accuracy(model):
    labels = model.predict(data.x_test, batch_size=1000, verbose=0).argmax(-1)
    return np.mean(labels == data.y_test)


train(trained, 1e-3, epochs=1 if QUICK else 6)

# %% [markdown]
# ## The plan
#
# A plan says what becomes of each layer, and why a layer is left alone. You can edit it
# (`plan["hidden"].rank = 6`) and store it (`plan.to_json()`). Calibration data are a few hundred
# to a few thousand *inputs*; labels are not needed.

# %%
inputs = data.x_train[:1024]
plan = plan_rewrite(trained, budget=0.1, calibration_data=inputs)
plan

# %% [markdown]
# ## The small model

# %%
small = rewrite_model(trained, plan, calibration_data=inputs)
comparison = compare(trained, small, test_set)
comparison

# %%
comparison.plot()

# %% [markdown]
# ## Smaller budgets
#
# For several budgets, the plot shows three models. The first takes the sum of Kronecker products
# that is nearest to each kernel, without data. The second is fitted to the calibration data. The
# third is fitted and then trained a little at a low learning rate.

# %%
budgets = (0.2,) if QUICK else (0.2, 0.1, 0.05)
curves = {"nearest, no data": [], "fitted to inputs": [], "fitted, then trained": []}
for budget in budgets:
    curves["nearest, no data"].append(accuracy(rewrite_model(trained, budget=budget)))
    small = rewrite_model(trained, budget=budget, calibration_data=inputs)
    curves["fitted to inputs"].append(accuracy(small))
    train(small, 3e-4, epochs=1 if QUICK else 2)
    curves["fitted, then trained"].append(accuracy(small))

# %%
plt.figure(figsize=(7, 4))
plt.axhline(accuracy(trained), color="gray", linestyle="dotted", label="the trained model")
for name, values in curves.items():
    plt.plot([100 * budget for budget in budgets], values, marker="o", label=name)
plt.xlabel("kept parameters, in percent")
plt.ylabel("accuracy on the test set")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Saving
#
# The small model is saved and loaded like any Keras model, after `import keras_bilinear`. To load
# it without this package, `expand_model` turns it into stock Keras layers, of full size and with
# the same outputs.

# %%
small.save("small.keras")
loaded = keras.models.load_model("small.keras")
stock = expand_model(loaded)
print({type(layer).__name__ for layer in stock.layers})
print(f"accuracy {accuracy(small):.4f}, {accuracy(loaded):.4f} and {accuracy(stock):.4f}")
