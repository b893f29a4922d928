"""LiteRT: writing a model as `.tflite`, and measuring what was written.

TensorFlow's converter does the work. Where Keras runs on another backend, a
second Python process with TensorFlow does it; running this module as a script
is that process.
"""

import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np

from keras_bilinear.layers.projection import BilinearLayer
from keras_bilinear.layers.rnn import BilinearRNN

WARM_UP_SECONDS, MEASURE_SECONDS = 0.1, 0.5


@dataclasses.dataclass(frozen=True)
class LiteRTMeasurement:
    """What `measure_litert` finds.

    Attributes:
        bytes: size of the file.
        latency_us: median microseconds for one example on one thread.
        difference: largest absolute difference from the Keras model's output,
            relative to the largest absolute value of that.
    """

    bytes: int
    latency_us: float
    difference: float


def export_litert(model: keras.Model, path: str | os.PathLike) -> None:
    """Writes a model as a `.tflite` file for LiteRT, in float32 and with builtin operations only.

    A model of another dtype policy is exported as its float32 twin, and every
    bilinear layer as its factors. The file appears under its name only when it
    is complete.

    Args:
        model: a built model.
        path: the file to write; one that is there is replaced.

    Raises:
        ValueError: if LiteRT has no builtin operation for a part of the model.
        OSError: if the file cannot be written.
    """
    path = pathlib.Path(path)
    model = inference_twin(model)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
        file = pathlib.Path(folder, "model.tflite")
        if keras.backend.backend() == "tensorflow":
            _convert(model, file)
        else:
            _convert_in_subprocess(model, file)
        os.replace(file, path)


def measure_litert(path: str | os.PathLike, model: keras.Model, inputs) -> LiteRTMeasurement:
    """Runs a `.tflite` file on one thread, one example at a time.

    Args:
        path: the file.
        model: the model that it was exported from, with one input and one output.
        inputs: examples to compare the outputs on, an array.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (source,) = interpreter.get_input_details()
    (target,) = interpreter.get_output_details()

    def run(example):
        interpreter.set_tensor(source["index"], example[None].astype(source["dtype"]))
        interpreter.invoke()
        return interpreter.get_tensor(target["index"])[0]

    expected = inference_twin(model).predict(inputs, verbose=0)
    outputs = np.stack([run(example) for example in inputs])
    return LiteRTMeasurement(
        bytes=os.path.getsize(path),
        latency_us=_median_seconds(interpreter.invoke) * 1e6,
        difference=float(np.abs(outputs - expected).max() / np.abs(expected).max()),
    )


def inference_twin(model: keras.Model) -> keras.Model:
    """A copy of the model, with its weights, as it is exported: in float32 and small.

    A kernel that is materialized would be stored in its full size, so the
    copy's bilinear layers apply their factors one after the other, unless the
    factors are the larger of the two. The model itself, if it is like that.
    """
    if not any(_changes(layer) for layer in model._flatten_layers()):
        return model
    twin = keras.models.clone_model(model, clone_function=_inference_layer, recursive=True)
    twin.set_weights(model.get_weights())
    return twin


def _changes(layer):
    changes = {}
    if layer.compute_dtype != "float32":
        changes["dtype"] = "float32"
    owner = layer.cell if isinstance(layer, BilinearRNN) else layer
    kernels = owner._kernels.values() if isinstance(owner, BilinearLayer) else ()
    plans = [kernel.factorization for kernel in kernels if kernel.materialized]
    if sum(plan.full_parameters - plan.parameters for plan in plans) > 0:
        changes["implementation"] = "factorized"
    return changes


def _inference_layer(layer):
    if not isinstance(layer, keras.Layer):
        return layer
    return type(layer).from_config({**layer.get_config(), **_changes(layer)})


def _convert(model, file):
    import tensorflow as tf

    try:
        model.export(
            str(file),
            format="litert",
            verbose=False,
            # Without this, operations that LiteRT cannot run pass silently.
            target_spec={"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]},
        )
    except Exception as error:  # the converter's own class has no public name
        # Its first line ends with the reason, after the place in the graph.
        reason = str(error).strip().split("\n")[0].rsplit(": ", 1)[-1]
        raise ValueError(
            f"The model cannot be exported with builtin LiteRT operations only: {reason}"
        ) from error


def _convert_in_subprocess(model, file):
    source = file.with_suffix(".keras")
    model.save(source)
    done = subprocess.run(
        [sys.executable, "-m", "keras_bilinear.export", str(source), str(file)],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("ValueError: "))


def _median_seconds(call):
    times = []
    start = time.perf_counter()
    while (begin := time.perf_counter()) < start + WARM_UP_SECONDS + MEASURE_SECONDS:
        call()
        if begin > start + WARM_UP_SECONDS:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    # `keras_bilinear` is imported, so its layers are known to `load_model`.
    _convert(keras.models.load_model(sys.argv[1], compile=False), pathlib.Path(sys.argv[2]))
