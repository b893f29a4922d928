"""What TensorBoard shows of a step."""

import os
from collections.abc import Iterable

import keras

from keras_bilinear.rewriting.plan import RewritePlan


def show_errors(
    callbacks: Iterable[keras.callbacks.Callback], epoch: int, plan: RewritePlan
) -> None:
    """Writes the predicted errors of the layers for TensorBoard, where it is used.

    Args:
        callbacks: the callbacks of the training.
        epoch: the epoch of the step.
        plan: the plan of the step.
    """
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.TensorBoard):
            import tensorflow as tf  # which TensorBoard needs

            folder = os.path.join(callback.log_dir, "train")
            with tf.summary.create_file_writer(folder).as_default(epoch):
                for path, layer in plan.items():
                    if layer.error is not None:
                        tf.summary.scalar(f"rewrite_error/{path}", layer.error)
