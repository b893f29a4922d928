# ---
# jupyter:
#   accelerator: GPU
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-bilinear/keras-bilinear/blob/main/tutorials/imdb_reviews.ipynb)
#
# # IMDB reviews: bilinear embedding, GRU and LSTM
#
# In a network that reads text the embedding table is the largest part: 20,000 words of 128 numbers
# are 2.6 million parameters. `BilinearEmbedding` stores two small tables instead. A word takes a
# row from each, and its vector is the outer product of both (a sum of `rank` such products). Rows
# are shared, but no two words share both. Or, with factors of other shapes, one table has a number
# of its own for each word, and the other a row that all words share.
#
# The recurrent layers are bilinear as well: each gate of `BilinearGRU` and `BilinearLSTM` has
# factors of its own for the input and for the state. On a GPU the kernels are formed once for each
# call, such that cuDNN does the work; gradients reach the factors.

# %% tags=["skip-execution"]
# %pip install -q "keras-bilinear[tutorials]"

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
# A review is a row of 200 numbers of words; 0 is padding, which the mask skips. The GRU gets a
# table of words that share rows, the LSTM one with a single number for each word.


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
# ## What came out
#
# Watch the accuracy on the test set from epoch to epoch. A full table has a row for each rare word
# and learns by heart in which training reviews it stood; words that share their factors cannot be
# learned by heart one by one. A number for each word is between both: it can tell how much a word
# speaks for a film or against it, and not much more.

# %%
draw(results)
