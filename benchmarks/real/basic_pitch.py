"""Which notes a recording has: 2-D convolutions over its harmonics."""

import functools

import keras
import numpy as np
from keras import layers

from real.case import Case, correlation, f1

RATE, SAMPLES = 22_050, 43_844  # of one input, nearly two seconds
FRAMES, PITCHES, NEEDED = 172, 309, 264  # three pitches in a semitone
# How much higher the harmonics are than the note, in pitches: the octave below, the note itself,
# and 2 to 7 times its frequency.
SHIFTS = tuple(round(36 * np.log2(times)) for times in (0.5, 1, 2, 3, 4, 5, 6, 7))
AUDIBLE = 0.3  # the score from which a frame has a note, as in the package


class BasicPitch(Case):
    """The model behind its constant-Q transform, on chords and melodies that are made up here.

    The transform itself has no trained weights. The package's own LiteRT file makes it: the inputs
    are what that file has before its first convolution. The package's `UnitNorm` constraints,
    which only matter in training, are left out.
    """

    name = "basic_pitch"
    requirement = "basic-pitch==0.4.0"
    metric = "F1 against the original's notes"
    also = "correlation with the original"
    calibration = 64
    training = 512

    def load(self):
        inputs = keras.Input((FRAMES, PITCHES, 1), name="pitches")
        x = layers.BatchNormalization(name="0")(inputs)
        stacked = layers.Concatenate()([_shifted(x, shift) for shift in SHIFTS])
        convolution = functools.partial(layers.Conv2D, padding="same")
        # The names are the numbers in the package's checkpoint.
        x = convolution(8, (3, 39), name="1")(stacked)
        x = layers.ReLU()(layers.BatchNormalization(name="2")(x))
        contour = convolution(1, 5, activation="sigmoid", name="3")(x)
        x = convolution(32, 7, strides=(1, 3), activation="relu", name="4")(contour)
        note = convolution(1, (7, 3), activation="sigmoid", name="7")(x)
        x = convolution(32, 5, strides=(1, 3), name="5")(stacked)
        x = layers.ReLU()(layers.BatchNormalization(name="6")(x))
        x = layers.Concatenate()([note, x])
        onset = convolution(1, 3, activation="sigmoid", name="8")(x)
        outputs = {"contour": contour, "note": note, "onset": onset}
        model = keras.Model(
            inputs,
            {name: layers.Reshape(x.shape[1:3], name=name)(x) for name, x in outputs.items()},
        )
        self._set_weights(model)
        return model

    def training_inputs(self, count):
        return self._pitches(np.random.default_rng(0), count)

    def test(self):
        return self._pitches(np.random.default_rng(1), 32), None

    def scores(self, outputs, original, labels):
        notes = [found["note"] > AUDIBLE for found in (outputs, original)]
        values = [
            np.concatenate([np.ravel(found[name]) for name in sorted(original)])
            for found in (outputs, original)
        ]
        return f1(*notes), correlation(*values)

    def _path(self, name):
        return self.folder / "basic_pitch/saved_models/icassp_2022" / name

    def _set_weights(self, model):
        import tensorflow as tf

        checkpoint = tf.train.load_checkpoint(str(self._path("nmp/variables/variables")))
        for layer in model.layers:
            for weight in layer.weights:
                key = f"layer_with_weights-{layer.name}/{weight.name}/.ATTRIBUTES/VARIABLE_VALUE"
                weight.assign(checkpoint.get_tensor(key))

    def _pitches(self, rng, count):
        """What the package's file has of recordings before its first trained layer."""
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        interpreter = Interpreter(
            str(self._path("nmp.tflite")),
            experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
        interpreter.allocate_tensors()
        (source,) = interpreter.get_input_details()
        (target,) = (
            tensor["index"]
            for tensor in interpreter.get_tensor_details()
            if tensor["name"].startswith("model_1/tf.expand_dims_1/")
        )
        pitches = np.zeros((count, FRAMES, PITCHES, 1), "float32")
        for row in pitches:
            interpreter.set_tensor(source["index"], _recording(rng).reshape(source["shape"]))
            interpreter.invoke()
            row[:] = interpreter.get_tensor(target)[0]
        return pitches


def _shifted(x, shift):
    """The first `NEEDED` pitches of those that are `shift` higher, with zeros for none."""
    beyond = max(0, PITCHES - NEEDED - shift)
    x = layers.Cropping2D(((0, 0), (max(0, shift), beyond)))(x)
    missing = NEEDED - x.shape[2]
    return layers.ZeroPadding2D(((0, 0), (missing, 0) if shift < 0 else (0, missing)))(x)


def _recording(rng):
    """A few voices of plucked notes with harmonics, and noise: `SAMPLES` samples."""
    sound = rng.normal(scale=rng.uniform(0.0001, 0.003), size=SAMPLES)
    for _ in range(rng.integers(1, 5)):
        begin, middle = rng.integers(0, RATE // 3), rng.integers(40, 80)
        while begin < SAMPLES:
            frequency = 440 * 2 ** ((middle + rng.integers(-7, 8) - 69) / 12)
            end = min(SAMPLES, begin + int(RATE * rng.choice([0.15, 0.3, 0.6, 1.2])))
            time = np.arange(end - begin) / RATE
            envelope = np.minimum(time / 0.005, 1) * np.exp(-time * rng.uniform(1, 6))
            for harmonic in range(1, 9):
                if harmonic * frequency < RATE / 2:
                    strength = 0.15 * rng.uniform(0.3, 1) / harmonic ** rng.uniform(0.8, 1.6)
                    angle = 2 * np.pi * (harmonic * frequency * time + rng.uniform())
                    sound[begin:end] += strength * envelope * np.sin(angle)
            begin = end
    return np.clip(sound, -1, 1).astype("float32")
