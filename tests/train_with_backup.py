"""Trains a small model with a backup, and may kill itself at a given moment.

    python train_with_backup.py FOLDER [--die=step | epoch_N | batch_N] [--width=N]

Appends what happens to `FOLDER/events`, a line for each, and writes the sizes and
losses of the epochs to `FOLDER/result.json`.
"""

import argparse
import json
import os
import pathlib
import signal

import keras
import numpy as np

from keras_bilinear import BilinearRewrite
from keras_bilinear.rewriting import in_training

EPOCHS = 6
SCHEDULE = {1: 0.6, 3: 0.3}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Events(keras.callbacks.Callback):
    def __init__(self, file, moment):
        super().__init__()
        self.file, self.moment, self.batches = file, moment, 0

    def note(self, *event):
        with self.file.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def on_train_begin(self, logs=None):
        self.note("begin")

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.moment == f"batch_{self.batches}":
            die()

    def on_epoch_end(self, epoch, logs=None):
        self.note("epoch", epoch, logs["loss"], self.model.count_params())
        if self.moment == f"epoch_{epoch}":
            die()


class Noted(BilinearRewrite):
    """Says when a step begins and ends."""

    events = None

    def _step(self, epoch):
        self.events.note("step", epoch)
        super()._step(epoch)
        self.events.note("step done", epoch)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--die")
    parser.add_argument("--width", type=int, default=64)
    flags = parser.parse_args()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4 * flags.width, 32)).astype("float32")
    y = (x[:, :8] ** 2).astype("float32")
    layers = [keras.layers.Dense(flags.width, "relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((32,)), *layers, keras.layers.Dense(8)])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    if flags.die == "step":
        in_training.rewrite_layers = lambda *_: die()
    backup, events = flags.folder / "backup", Events(flags.folder / "events", flags.die)
    rewrite = Noted(schedule=SCHEDULE, backup_dir=backup)
    rewrite.events = events
    restore = keras.callbacks.BackupAndRestore(backup, double_checkpoint=True)
    model.fit(x, y, epochs=EPOCHS, verbose=0, shuffle=False, callbacks=[rewrite, restore, events])
    lines = [json.loads(line) for line in (flags.folder / "events").open()]
    # Of an epoch that was done twice, the last counts.
    epochs = {line[1]: line[2:] for line in lines if line[0] == "epoch"}
    losses, sizes = zip(*(epochs[epoch] for epoch in range(EPOCHS)), strict=True)
    (flags.folder / "result.json").write_text(json.dumps({"losses": losses, "sizes": sizes}))


if __name__ == "__main__":
    main()
