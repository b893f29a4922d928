# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fashion-MNIST: a bilinear MLP
#
# A dense layer with 1,024 inputs and 1,024 outputs stores a million numbers. A bilinear layer
# reshapes its input into a 32 x 32 matrix `X` and multiplies it from both sides, `Y = Lᵀ X R`. The
# two factors are 32 x 32 as well: 2,048 numbers. A single product makes a poor layer, as it treats
# all rows alike and all columns alike. A sum of a few products makes a good layer; their number is
# the `rank`.
#
# This notebook trains three networks in the same way: a full network, a bilinear network, and a
# full network that is so narrow that it is as small as the bilinear network. The narrow network is
# the fair rival: a bilinear network is worth it only if it beats a network with fewer units.

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

from keras_bilinear import BilinearDense
from keras_bilinear.demo.tutorials import QUICK, draw, load, set_up

set_up()
data = load("fashion_mnist")
epochs, batch_size = (1 if QUICK else 12), 128

# %% [markdown]
# ## Three networks
#
# `BilinearDense` takes the arguments of `Dense`, and `rank`. The last layer computes in float32,
# as the softmax of the loss needs that precision.


# %%
def network(width, dense=keras.layers.Dense, **options):
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Flatten(),
            dense(width, activation="relu", **options),
            dense(width, activation="relu", **options),
            dense(10, dtype="float32", **options),
        ]
    )


networks = {
    "full": (network(1024), 0.001),
    "bilinear, rank 10": (network(1024, BilinearDense, rank=10), 0.001),
    "narrower full": (network(51), 0.004),
}
for name, (model, _) in networks.items():
    print(f"{name}: {model.count_params():,} parameters")

# %% [markdown]
# ## Training
#
# The bilinear network gets the optimizer and the learning rate of the full network. This works for
# two reasons. The factors start so that their product has the variance of a full kernel. And their
# gradients are scaled so that the product moves as fast as a full kernel. The narrower network
# gets the learning rate that was best for it on held-out images.


# %%
def train(model, learning_rate):
    steps = epochs * -(-len(data.x_train) // batch_size)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model.fit(
        data.x_train,
        data.y_train,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(data.x_test, data.y_test),
    )


results = {}
for name, (model, learning_rate) in networks.items():
    print(name)
    keras.utils.set_random_seed(0)
    results[name] = model, train(model, learning_rate)

# %% [markdown]
# ## Results
#
# The narrower network has 51 units in each hidden layer. The bilinear network is as small and has
# 1,024 units: the width of a large network.

# %%
draw(results)
