# ---
# jupyter:
#   accelerator: GPU
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # IMDB reviews: bilinear embedding, GRU and LSTM
#
# In a network that reads text, the embedding table is the largest part: 20,000 words of 128
# numbers are 2.6 million parameters. `BilinearEmbedding` stores two small tables instead. A word
# takes a row from each table, and its vector is the outer product of both rows, or a sum of `rank`
# products. Words share rows, but no two words share both rows. With factors of other shapes, the
# first table has a number for each word, and the second table has a single row for all words.
#
# The recurrent layers are bilinear as well: each gate of `BilinearGRU` and `BilinearLSTM` has
# factors for the input and for the state. On a GPU, each call forms the kernels once and then runs
# cuDNN; gradients reach the factors.

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

from keras_bilinear import BilinearDense, BilinearEmbedding, BilinearGRU, BilinearLSTM
from keras_bilinear.datasets import TOKENS, VOCABULARY
from keras_bilinear.demo.tutorials import QUICK, draw, load, set_up

set_up()
data = load("imdb_reviews")
epochs, batch_size = (1 if QUICK else 3), 128

# %% [markdown]
# ## Four networks
#
# A review is a row of 200 word ids; 0 is padding, which the mask skips. The bilinear GRU gets a
# table in which words share rows. The bilinear LSTM gets a table with a number for each word.


# %%
def full(recurrent):
    return keras.Sequential(
        [
            keras.Input((TOKENS,), dtype="int32"),
            keras.layers.Embedding(VOCABULARY, 128, mask_zero=True),
            recurrent(64),
            keras.layers.Dense(2, dtype="float32"),
        ]
    )


def bilinear(recurrent, rank, table):
    return keras.Sequential(
        [
            keras.Input((TOKENS,), dtype="int32"),
            BilinearEmbedding(VOCABULARY, 128, mask_zero=True, **table),
            recurrent(64, rank=rank),
            BilinearDense(2, rank=rank, dtype="float32"),
        ]
    )


own_numbers = {"input_factors": (VOCABULARY, 1), "output_factors": (1, 128)}
networks = {
    "GRU, full": full(keras.layers.GRU),
    "GRU, bilinear, shared rows": bilinear(BilinearGRU, rank=4, table={"rank": 4}),
    "LSTM, full": full(keras.layers.LSTM),
    "LSTM, bilinear, a number for each word": bilinear(BilinearLSTM, rank=8, table=own_numbers),
}
for name, model in networks.items():
    print(f"{name}: {model.count_params():,} parameters")

# %% [markdown]
# ## Training


# %%
def train(model):
    model.compile(
        keras.optimizers.Adam(1e-3),
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
# Watch the accuracy on the test set from epoch to epoch. A full table has a row for each rare
# word, so it can memorize the training reviews in which the word occurs. A table with shared rows
# cannot memorize a single word. A table with a number for each word is in between: the number can
# say how much the word speaks for or against a film, and little more.

# %%
draw(results)
