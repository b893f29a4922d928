# ---
# jupyter:
#   accelerator: GPU
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Spoken digits: a bilinear GRU
#
# A watch or a headset runs a small network all day, which listens for a few words. Here it is a
# GRU over a second of sound. Three networks are trained: a full GRU of 256 units, a bilinear GRU
# of 256 units, and a full GRU with so few units that it is as small as the bilinear GRU.
#
# The recordings are split by take: takes 0 to 4 of each speaker and digit are the test set, and
# the other takes are the training set.

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

from keras_bilinear import BilinearDense, BilinearGRU
from keras_bilinear.demo.tutorials import QUICK, SAMPLING_RATE, draw, load, set_up

set_up()
data = load("spoken_digit")
epochs, batch_size = (2 if QUICK else 30), 32

# %% [markdown]
# ## From sound to frames
#
# The input of the network is a log-mel spectrogram: the loudness of the sound in 40 bands of
# pitch, every 16 milliseconds. The bands are narrow where the ear hears small differences.

# %%
spectrogram = keras.layers.MelSpectrogram(
    fft_length=256,
    sequence_stride=128,
    num_mel_bins=40,
    sampling_rate=SAMPLING_RATE,
    min_freq=20.0,
    max_freq=4000.0,
    dtype="float32",
)


def frames(waves):
    batches = [spectrogram(waves[i : i + 100]) for i in range(0, len(waves), 100)]
    bands = np.concatenate([keras.ops.convert_to_numpy(batch) for batch in batches])
    return np.swapaxes(bands, 1, 2)


x_train, x_test = frames(data.x_train), frames(data.x_test)
mean, deviation = x_train.mean(), x_train.std()
x_train, x_test = (x_train - mean) / deviation, (x_test - mean) / deviation

plt.figure(figsize=(8, 3))
plt.imshow(x_train[0].T, origin="lower", aspect="auto")
plt.title(f"A spoken {data.y_train[0]}")
plt.xlabel("frame")
plt.ylabel("band")
plt.show()

# %% [markdown]
# ## Three networks


# %%
def network(units, gru=keras.layers.GRU, dense=keras.layers.Dense, **options):
    return keras.Sequential(
        [
            keras.Input(x_train.shape[1:]),
            gru(units, **options),
            dense(10, dtype="float32", **options),
        ]
    )


networks = {
    "full": network(256),
    "bilinear, rank 2": network(256, BilinearGRU, BilinearDense, rank=2),
    "narrower full": network(28),
}
for name, model in networks.items():
    print(f"{name}: {model.count_params():,} parameters")

# %% [markdown]
# ## Training
#
# The memory of a GRU is its state. The narrower network is small because its state has few
# numbers. The bilinear network has a state of 256 numbers and saves parameters in the kernels.
# Each network trains at the learning rate that was best on held-out recordings, for the network
# itself or for a network of nearly its size. Gradients are clipped, as at high learning rates the
# loss of a recurrent network sometimes leaps.

# %%
learning_rates = {"full": 0.002, "bilinear, rank 2": 0.002, "narrower full": 0.008}


def train(model, learning_rate):
    steps = epochs * -(-len(x_train) // batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    model.compile(
        keras.optimizers.Adam(schedule, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model.fit(
        x_train,
        data.y_train,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(x_test, data.y_test),
        verbose=2,
    )


results = {}
for name, model in networks.items():
    print(name)
    keras.utils.set_random_seed(0)
    results[name] = model, train(model, learning_rates[name])

# %% [markdown]
# ## Results

# %%
draw(results)
