"""The origin of a name: an embedding of letter pairs and an LSTM."""

import csv

import numpy as np
from legacy import drop_arguments, integer_inputs, load_legacy_h5

from real.case import Case, split

PAIRS = 25  # of letters, that the model reads


class Ethnicolr(Case):
    """The Wikipedia model for full names, on the names in its package.

    The model was trained on these names, so that its accuracy is that on training data.
    """

    name = "ethnicolr"
    requirement = "ethnicolr==0.9.6"
    metric = "agreement with the original"
    also = "accuracy"

    def load(self):
        path = self.folder / "ethnicolr/models/wiki/lstm/wiki_name_lstm.h5"
        return load_legacy_h5(path, [drop_arguments("time_major", "input_length"), integer_inputs])

    def training_inputs(self, count):
        names, _ = self._names()
        return self._ids([name for name, _ in names[:count]])

    def test(self):
        _, names = self._names()
        classes = self._column("models/wiki/lstm/wiki_name_race.csv", "race")
        labels = [classes.index(origin) for _, origin in names]
        return self._ids([name for name, _ in names]), np.array(labels)

    def scores(self, outputs, original, labels):
        chosen = outputs.argmax(-1)
        return np.mean(chosen == original.argmax(-1)), np.mean(chosen == labels)

    def _column(self, path, name):
        with (self.folder / "ethnicolr" / path).open(newline="", encoding="utf-8") as file:
            return [row[name] for row in csv.DictReader(file)]

    def _names(self):
        path = "data/wiki/wiki_name_race.csv"
        columns = [self._column(path, name) for name in ("name_last", "name_first", "race")]
        names = {
            f"{last.strip()} {first.strip()}".title(): origin
            for last, first, origin in zip(*columns, strict=True)
            if last.strip() and first.strip()
        }
        return split(list(names.items()), test=5000)

    def _ids(self, names):
        """The last pairs of letters in each name, after padding with 0."""
        vocabulary = self._column("models/wiki/lstm/wiki_name_vocab.csv", "vocab")
        index = {pair: number for number, pair in reversed([*enumerate(vocabulary)])}
        ids = np.zeros((len(names), PAIRS), "int32")
        for row, name in zip(ids, names, strict=True):
            pairs = [index.get(name[i : i + 2], 0) for i in range(len(name) - 1)][-PAIRS:]
            row[PAIRS - len(pairs) :] = pairs
        return ids
