"""The next character of a text: an embedding, two LSTMs, and attention over all of them."""

import json

import keras
import numpy as np
from keras import layers
from legacy import lstm_of_cudnn, read_weights

from real.case import Case

LENGTH = 40  # characters that the model reads


class TextGenRNN(Case):
    """The character model of textgenrnn, on text that it was not trained on: Shakespeare's."""

    name = "textgenrnn"
    requirement = "textgenrnn==2.0.0"
    metric = "bits for a character"
    lower_is_better = True
    also = "accuracy"

    def load(self):
        weights = read_weights(self._path("textgenrnn_weights.hdf5"))
        for name in ("rnn_1", "rnn_2"):
            weights[name] = lstm_of_cudnn(*weights[name])
        characters, width = weights["embedding"][0].shape
        inputs = keras.Input((LENGTH,), dtype="int32", name="characters")
        embedded = layers.Embedding(characters, width, name="embedding")(inputs)
        first = layers.LSTM(128, return_sequences=True, name="rnn_1")(embedded)
        second = layers.LSTM(128, return_sequences=True, name="rnn_2")(first)
        x = layers.Concatenate()([embedded, first, second])
        attention = layers.Dense(1, use_bias=False, name="attention")(x)
        mean = layers.Dot(axes=1)([layers.Softmax(axis=1)(attention), x])
        x = layers.Dense(characters, activation="softmax", name="output")(layers.Flatten()(mean))
        model = keras.Model(inputs, x)
        for layer in model.layers:
            if weights.get(layer.name):
                layer.set_weights(weights[layer.name])
        return model

    def training_inputs(self, count):
        inputs, _ = self._windows("train", count)
        return inputs

    def test(self):
        return self._windows("test", 4000)

    def scores(self, outputs, original, labels):
        likely = outputs[np.arange(len(labels)), labels]
        accuracy = np.mean(outputs.argmax(-1) == labels)
        return -np.mean(np.log2(np.maximum(likely, 1e-9))), accuracy

    def _path(self, name):
        return self.folder / "textgenrnn-2.0.0/textgenrnn" / name

    def _windows(self, part, count):
        """Ids of characters, from places spread over a part of the text, and of the next one."""
        import tensorflow_datasets as tfds

        (example,) = tfds.load("tiny_shakespeare", split=part, data_dir=self.sources.data_dir)
        text = example["text"].numpy().decode()
        ids = json.loads(self._path("textgenrnn_vocab.json").read_text(encoding="utf-8"))
        text = np.array([ids.get(character, 0) for character in text], "int32")
        starts = np.linspace(0, len(text) - LENGTH - 1, min(count, len(text) - LENGTH)).astype(int)
        windows = text[starts[:, None] + np.arange(LENGTH + 1)]
        return windows[:, :-1], windows[:, -1]
