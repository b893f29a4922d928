# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # An embedding of a billion rows
#
# "Not good" is two harmless words and one clear opinion. A network that takes the mean of the
# vectors of all words cannot see the opinion, unless *pairs* of words have vectors too. But 20,000
# words make 400 million pairs, and 1.2 billion if pairs with one or two words in between count as
# well. Usually pairs are hashed into a table that is far too small for them, and collide.
#
# `BilinearEmbedding` does not store its table. Row `i` is a sum of outer products. Each product
# takes a row of a first small table and a row of a second small table, chosen by the quotient and
# the remainder of `i`. With the factors below, this split has a meaning: the first table holds
# what a word adds to a pair as its first word, and the second table what it adds as its second
# word. Each of the 1.2 billion pairs has a row of its own.

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
import resource

import keras
import numpy as np

from keras_bilinear import BilinearEmbedding
from keras_bilinear.datasets import TOKENS, VOCABULARY
from keras_bilinear.demo.tutorials import QUICK, draw, load, set_up

set_up()
data = load("imdb_reviews")
epochs, batch_size = (1 if QUICK else 3), 128

# %% [markdown]
# ## From words to pairs
#
# The pair of words `a` and `b` at a distance of 1, 2 or 3 gets the number `((distance - 1) *
# VOCABULARY + a) * VOCABULARY + b`. Pairs with padding get 0, which is masked.

# %%
DISTANCES = (1, 2, 3)


def pairs(words):
    columns = []
    for distance in DISTANCES:
        first, second = words[:, :-distance], words[:, distance:]
        number = ((distance - 1) * VOCABULARY + first) * VOCABULARY + second
        columns.append(np.where((first > 0) & (second > 0), number, 0))
    return np.concatenate(columns, axis=1)


rows = len(DISTANCES) * VOCABULARY**2
x_train, x_test = pairs(data.x_train), pairs(data.x_test)
print(
    f"{rows:,} rows; {x_train.shape[1]} pairs in a review; the largest number is {x_train.max():,}"
)
print(f"{len(np.unique(x_train)):,} different pairs in the training reviews")

# %% [markdown]
# ## The table that is never formed

# %%
WIDTH = 64


def network(embedding, length):
    return keras.Sequential(
        [
            # int32, as float32 holds no integers of this size
            keras.Input((length,), dtype="int32"),
            embedding,
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(2, dtype="float32"),
        ]
    )


embedding = BilinearEmbedding(
    rows,
    WIDTH,
    mask_zero=True,
    rank=4,
    input_factors=(len(DISTANCES) * VOCABULARY, VOCABULARY),
)
networks = {
    "words, full": network(keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True), TOKENS),
    "pairs, bilinear": network(embedding, x_train.shape[1]),
}
print(f"a full table of pairs: {rows * WIDTH:,} parameters, {rows * WIDTH * 4 / 1e9:,.0f} GB")
print(f"its factors: {embedding.count_params():,}, {embedding.count_params() * 4 / 1e9:.3f} GB")

# %% [markdown]
# ## Training
#
# The optimizer also works on the factors only. For a full table, Adam would need three times the
# memory of the table.


# %%
def train(model, x, x_validation):
    steps = epochs * -(-len(x) // batch_size)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(2e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model.fit(
        x,
        data.y_train,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(x_validation, data.y_test),
    )


inputs = {"words, full": (data.x_train, data.x_test), "pairs, bilinear": (x_train, x_test)}
results = {}
for name, model in networks.items():
    print(name)
    keras.utils.set_random_seed(0)
    results[name] = model, train(model, *inputs[name])

# %% [markdown]
# ## Results

# %%
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in kB
print(f"the most memory that this whole process has used: {peak:.1f} GB")
draw(results)

# %% [markdown]
# Any row of the table can still be read. The network has a vector even for a pair that is in no
# training review: the row is computed from rows of the two small tables.

# %%
unseen = np.setdiff1d(np.unique(x_test), np.unique(x_train))[:1]
print(f"pair {unseen}: {np.asarray(embedding(unseen), 'float32')[0, :8]} ...")
