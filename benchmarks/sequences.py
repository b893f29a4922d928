"""The data of the recurrent studies, as `keras_bilinear.datasets.Dataset`."""

import dataclasses

import numpy as np

from keras_bilinear import datasets

SAMPLING_RATE = 8000
FRAMES = 62  # of 16 ms each: a second, which few recordings exceed
MELS = 40
CHARACTERS = 100  # in one sequence of tiny_shakespeare
TEST_TAKES = range(5)


def load_imdb_reviews(data_dir):
    """Ids of words, `(n, datasets.TOKENS)`, with the padding first.

    A recurrent layer then ends at the last word and needs no mask.
    """
    import keras

    dataset = datasets.load("imdb_reviews", data_dir)

    def padding_first(x):
        reviews = [review[review != 0] for review in x]
        return keras.utils.pad_sequences(reviews, datasets.TOKENS)

    return dataclasses.replace(
        dataset, x_train=padding_first(dataset.x_train), x_test=padding_first(dataset.x_test)
    )


def load_spoken_digit(data_dir):
    """Log-mel frames of `(n, FRAMES, MELS)`, with mean 0 and deviation 1 in the training set.

    Takes 0 to 4 of each speaker and digit are the test set, as the authors of the data define.
    Longer recordings are cut; silence follows shorter recordings.
    """
    import keras
    import tensorflow_datasets as tfds

    examples = list(tfds.load("spoken_digit", split="train", data_dir=data_dir).as_numpy_iterator())
    # A file's name is DIGIT_SPEAKER_TAKE.wav.
    names = [example["audio/filename"].decode() for example in examples]
    takes = np.array([int(name.removesuffix(".wav").rsplit("_", 1)[1]) for name in names])
    audio = np.zeros((len(examples), SAMPLING_RATE), "float32")
    for row, example in zip(audio, examples, strict=True):
        samples = example["audio"][:SAMPLING_RATE]
        row[: len(samples)] = samples / 2**15
    frames = keras.layers.MelSpectrogram(
        fft_length=256,
        sequence_stride=128,
        num_mel_bins=MELS,
        sampling_rate=SAMPLING_RATE,
        min_freq=20.0,
        max_freq=4000.0,
    )
    batches = [frames(audio[i : i + 100]) for i in range(0, len(audio), 100)]
    mels = np.concatenate([keras.ops.convert_to_numpy(batch) for batch in batches])
    x = np.swapaxes(mels, 1, 2)[:, :FRAMES]
    y = np.array([example["label"] for example in examples])
    test = np.isin(takes, TEST_TAKES)
    x = (x - x[~test].mean()) / x[~test].std()
    return datasets.Dataset("spoken_digit", "audio", 10, x[~test], y[~test], x[test], y[test])


def load_tiny_shakespeare(data_dir):
    """Ids of characters, and of the next character at each place, both of `(n, CHARACTERS)`."""
    import tensorflow_datasets as tfds

    def read(split):
        (example,) = tfds.load("tiny_shakespeare", split=split, data_dir=data_dir)
        return np.frombuffer(example["text"].numpy(), "uint8")

    train, test = read("train"), read("test")
    characters = np.unique(np.concatenate([train, test]))
    arrays = []
    for text in (train, test):
        ids = np.searchsorted(characters, text).astype("int32")
        count = (len(ids) - 1) // CHARACTERS * CHARACTERS
        arrays += [part.reshape(-1, CHARACTERS) for part in (ids[:count], ids[1 : count + 1])]
    return datasets.Dataset("tiny_shakespeare", "characters", len(characters), *arrays)
