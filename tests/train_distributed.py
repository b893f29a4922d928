"""Trains a model on two devices, which becomes smaller meanwhile; fails if it does not.

python train_distributed.py FOLDER
"""

import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
import numpy as np

from keras_bilinear import BilinearRewrite

DATA = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")


def train(path):
    layers = [keras.layers.Dense(64, "relu", name=name) for name in ("first", "second")]
    model = keras.Sequential([keras.Input((32,)), *layers, keras.layers.Dense(8)])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    x, y = DATA, DATA[:, :8]
    callback = BilinearRewrite(schedule={1: 0.5, 3: 0.25})
    history = model.fit(x, y, batch_size=16, epochs=5, verbose=0, callbacks=[callback]).history
    sizes = history["parameters"]
    assert sizes[0] > 2 * sizes[1] == 2 * sizes[2] > 2 * sizes[3] == 2 * sizes[4], sizes
    assert history["loss"][-1] < history["loss"][0], history["loss"]
    model.save(path)
    loaded = keras.models.load_model(path)
    outputs = model.predict(x, verbose=0)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), outputs, rtol=1e-5, atol=1e-5)
    return model


def main(folder):
    path = pathlib.Path(folder, "model.keras")
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        cpus = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        assert strategy.num_replicas_in_sync == 2
        with strategy.scope():
            train(path)
        return
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    train(path)
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout["second/kernel"] = (None, "model")
    layout["second/right_kernel"] = (None, None, "model")
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    )
    variables = {variable.name: variable for variable in train(path).get_layer("second").variables}
    assert "model" in variables["right_kernel"].value.sharding.spec


if __name__ == "__main__":
    main(*sys.argv[1:])
