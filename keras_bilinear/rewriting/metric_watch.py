"""The watch of a metric: whether it got worse than it may since a model was rewritten."""

import math
from collections.abc import Mapping

import keras

from keras_bilinear.keras_private.training import higher_is_better
from keras_bilinear.messages import check_choice


class MetricWatch:
    """Notes a metric at the end of each epoch, and finds out whether it has dropped.

    Args:
        monitor: name of the metric in the logs; `None` to watch nothing.
        mode: `"min"`, `"max"` or `"auto"`, see `BilinearRewrite`.
        max_drop: how much worse than before the first step the metric may be.

    Attributes:
        values: the metric at the end of each epoch, by the number of the epoch.

    Raises:
        ValueError: if an argument is not valid.
    """

    def __init__(self, monitor: str | None, mode: str, max_drop: float | None):
        if (monitor is None) != (max_drop is None):
            raise ValueError(
                "`monitor` and `max_drop` belong together. "
                f"Received: monitor={monitor!r}, max_drop={max_drop!r}"
            )
        if max_drop is not None and not 0 <= max_drop < math.inf:
            raise ValueError(f"`max_drop` must be 0 or more. Received: max_drop={max_drop!r}")
        check_choice("mode", mode, ("auto", "min", "max"))
        self.monitor, self.mode, self.max_drop = monitor, mode, max_drop
        self.values: dict[int, float] = {}

    def note(self, epoch: int, logs: Mapping) -> bool:
        """Notes the metric at the end of an epoch.

        Returns:
            Whether there was something to note. A metric of a validation is missing in an
            epoch that was not validated.

        Raises:
            ValueError: if the logs do not have the metric.
        """
        if self.monitor is None:
            return False
        if self.monitor in logs:
            self.values[epoch] = float(logs[self.monitor])
            return True
        validated = any(name.startswith("val_") for name in logs)
        if validated or not self.monitor.startswith("val_"):
            raise ValueError(
                f"The logs have no {self.monitor!r}, but {', '.join(map(repr, logs))}. "
                f"Received: monitor={self.monitor!r}"
            )
        return False

    def has_dropped(
        self, first: int, last: int, until: float, callback: keras.callbacks.Callback
    ) -> bool:
        """Whether the last step made the metric worse than it may be.

        Args:
            first: the epoch of the first step. The metric before it is the measure.
            last: the epoch of the last step.
            until: the epoch before which values count; infinity for all of them.
            callback: a callback of the model, which knows the direction of its metrics.

        Raises:
            ValueError: if it is not known whether the metric is to become larger.
        """
        if self.monitor is None or self.max_drop is None:
            return False
        epochs = sorted(self.values)
        before = [self.values[epoch] for epoch in epochs if epoch < first]
        since = [self.values[epoch] for epoch in epochs if last <= epoch < until]
        if not before or not since:
            return False
        drop = before[-1] - since[-1]
        if not higher_is_better(callback, self.monitor, self.mode):
            drop = -drop
        return not drop <= self.max_drop  # NaN has dropped
