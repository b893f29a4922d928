"""Where Thai words begin: parallel convolutions over the characters around a place."""

import keras
import numpy as np
from keras import layers

from real.case import Case, constant, correlation, f1, split

AROUND = 10  # characters on each side
WINDOW = 2 * AROUND + 1
# Filters of the convolutions over 1 to 12 characters.
FILTERS = 8 * (200,) + 3 * (150,) + (100,)


class Deepcut(Case):
    """The tokenizer, on titles of the Thai Wikipedia, which PyThaiNLP brings.

    An example is one character with the characters around it.
    """

    name = "deepcut"
    requirement = "deepcut==0.7.0.0"
    metric = "F1 against the original's words"
    also = "correlation with the original"

    def load(self):
        characters, _ = self._tables()
        inputs = [keras.Input((WINDOW,), dtype="int32", name=name) for name in ("chars", "types")]
        x = layers.Embedding(len(characters), 32, name="embedding_1")(inputs[0])
        x = layers.BatchNormalization(name="batch_normalization_1")(x)
        found = []
        for width, filters in enumerate(FILTERS, 1):
            y = layers.Conv1D(filters, width, activation="relu", name=f"conv1d_{width}")(x)
            y = layers.Dense(5, name=f"time_distributed_{width}")(y)
            found.append(layers.ZeroPadding1D((0, width - 1))(y))
        kind = layers.Embedding(12, 12, name="embedding_2")(inputs[1])
        x = layers.Concatenate()([x, layers.Maximum()(found), kind])
        x = layers.BatchNormalization(name="batch_normalization_2")(x)
        x = layers.Dense(100, activation="relu", name="dense_13")(layers.Flatten()(x))
        x = layers.Dense(1, activation="sigmoid", name="dense_14")(x)
        model = keras.Model(inputs, x)
        model.load_weights(self.folder / "deepcut/weight/cnn_without_ne_ab.h5", by_name=True)
        return model

    def training_inputs(self, count):
        titles, _ = self._titles()
        lengths = np.cumsum([len(title) for title in titles])
        titles = titles[: 1 + np.searchsorted(lengths, count)]
        return [ids[:count] for ids in self._windows(titles)]

    def test(self):
        _, titles = self._titles()
        return self._windows(titles), None

    def scores(self, outputs, original, labels):
        return f1(outputs > 0.5, original > 0.5), correlation(outputs, original)

    def _tables(self):
        """The ids of characters, and the id of the type of each character."""
        source = self.folder / "deepcut/utils.py"
        characters = {name: id for id, name in enumerate(constant(source, "CHARS"))}
        names = constant(source, "CHAR_TYPES")
        types = {
            character: names.index(name)
            for members, name in constant(source, "CHAR_TYPE").items()
            for character in members
        }
        return characters, types

    def _titles(self):
        folder = self.sources.package("pythainlp==5.4.0")
        path = folder / "pythainlp/corpus/wikipedia_titles_th.txt"
        lines = path.read_text(encoding="utf-8").splitlines()
        return split([line for line in lines if line and not line.startswith("#")], test=500)

    def _windows(self, titles):
        """For each character, the ids and types of those after it, before it, and its own."""
        characters, types = self._tables()
        place = np.arange(WINDOW) - AROUND
        order = np.concatenate([place[place > 0], place[place < 0][::-1], [0]]) + AROUND
        chars, kinds = [], []
        for title in titles:
            padded = [" "] * AROUND + [*title] + [" "] * AROUND
            chars.append([characters.get(one, characters["other"]) for one in padded])
            kinds.append([types.get(one, 4) for one in padded])  # 4 is the type of all others

        def windows(texts):
            views = (np.lib.stride_tricks.sliding_window_view(text, WINDOW) for text in texts)
            return np.concatenate([*views])[:, order].astype("int32")

        return [windows(chars), windows(kinds)]
