# ---
# jupyter:
#   accelerator: GPU
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CIFAR-10: bilinear convolutions
#
# A 3x3 convolution from 128 to 128 channels is a projection at every pixel, from 9 x 128 numbers
# to 128 numbers. `BilinearConv2D` splits the channels into two axes, 128 = 8 x 16. Each of its two
# factors is a small convolution over one of these axes, and they run one after the other. The
# layer extracts no patches: every operation is a stock convolution or matrix product.
#
# The network is a small VGG: three blocks of three 3x3 convolutions with 32, 64 and 128 filters,
# and a dense layer of 1,024 units. The last convolution of each block halves the image. Three
# networks are trained: a full network, a bilinear network, and a full network with so few filters
# that it is as small as the bilinear network.

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

from keras_bilinear import BilinearConv2D, BilinearDense, compare
from keras_bilinear.demo.tutorials import QUICK, draw, load, set_up

set_up()
data = load("cifar10")
epochs, batch_size = (1 if QUICK else 3), 128

# %% [markdown]
# ## Three networks


# %%
def vgg(blocks, units, conv=keras.layers.Conv2D, dense=keras.layers.Dense, **options):
    layers = [keras.Input((32, 32, 3))]
    for filters in blocks:
        for strides in (1, 1, 2):
            layers.append(conv(filters, 3, strides, padding="same", activation="relu", **options))
    layers += [
        keras.layers.Flatten(),
        dense(units, activation="relu", **options),
        dense(10, dtype="float32", **options),
    ]
    return keras.Sequential(layers)


networks = {
    "full": vgg((32, 64, 128), 1024),
    "bilinear, rank 4": vgg((32, 64, 128), 1024, BilinearConv2D, BilinearDense, rank=4),
    "narrower full": vgg((8, 16, 32), 24),
}
for name, model in networks.items():
    print(f"{name}: {model.count_params():,} parameters")

# %% [markdown]
# `compare` shows where the parameters are. In the full network, the dense layer behind the
# convolutions has 2.1 of 2.6 million; its factors have 13 thousand. Most of the other parameters
# are in the last block.

# %%
compare(networks["full"], networks["bilinear, rank 4"])

# %% [markdown]
# ## Training
#
# All networks are trained with Adam at the same learning rate, which falls to zero along a cosine.


# %%
def train(model):
    steps = epochs * -(-len(data.x_train) // batch_size)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps)),
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
for name, model in networks.items():
    print(name)
    keras.utils.set_random_seed(0)
    results[name] = model, train(model)

# %% [markdown]
# ## Results
#
# Three epochs show which network learns fastest, not how accurate each network gets. After twenty
# epochs, look at the gap between the accuracy on the training data, in the log above, and the
# accuracy on the test set, below: a network with few parameters memorizes less.

# %%
draw(results)
