"""What a training that was killed has to know to go on: a file beside its backup."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping

import h5py
import keras

from keras_bilinear.files import check_writable, staged
from keras_bilinear.keras_private.training import BACKUPS
from keras_bilinear.rewriting.plan import RewritePlan

_FILE = "bilinear_rewrite.json"


@dataclasses.dataclass(frozen=True)
class Step:
    """What was done at an epoch.

    Attributes:
        epoch: the number of the epoch.
        plans: how many of the plans made the model what it was then; 0 for none.
        stopped: whether no step comes after it.
    """

    epoch: int
    plans: int
    stopped: bool = False


@dataclasses.dataclass
class History:
    """What was done to a model.

    Attributes:
        plans: the plans of the steps that went well.
        steps: all steps: also a step that failed, or that stopped the schedule.
    """

    plans: list[RewritePlan] = dataclasses.field(default_factory=list)
    steps: list[Step] = dataclasses.field(default_factory=list)

    @property
    def plan(self) -> RewritePlan | None:
        """The plan by which the model was made what it is; `None` if it is full."""
        plans = self.steps[-1].plans if self.steps else 0
        return self.plans[plans - 1] if plans else None

    @property
    def last_epoch(self) -> int:
        """The epoch of the last step; -1 if there was none."""
        return self.steps[-1].epoch if self.steps else -1

    @property
    def stopped(self) -> bool:
        """Whether no more steps are to be made."""
        return bool(self.steps) and self.steps[-1].stopped

    def shortened(self) -> Iterator["History"]:
        """The history, then the history without its last step, and so on until it is empty."""
        for count in range(len(self.steps), -1, -1):
            steps = self.steps[:count]
            plans = max((step.plans for step in steps), default=0)
            yield History(self.plans[:plans], steps)


class Journal:
    """Writes the history of a training beside its backup, and reads it again.

    Args:
        folder: the folder of a `keras.callbacks.BackupAndRestore`; `None` to write and to
            find nothing.
    """

    def __init__(self, folder: pathlib.Path | None):
        self.folder = folder

    def write(self, history: History, values: Mapping[int, float]) -> None:
        """Writes what was done, in place of what the journal had.

        Args:
            history: the history of the model.
            values: the metric that is watched, by epochs.

        Raises:
            OSError: if the file cannot be written.
        """
        if self.folder is None:
            return
        state = {
            "plans": [json.loads(plan.to_json()) for plan in history.plans],
            "steps": [dataclasses.asdict(step) for step in history.steps],
            "values": list(values.items()),
        }
        with staged(self.folder) as folder:
            (folder / _FILE).write_text(json.dumps(state))

    def read(self) -> tuple[History, dict[int, float]] | None:
        """The history and the values that were written; `None` if there is no backup for them.

        Raises:
            ValueError: if the file is no JSON, or has something else than plans.
        """
        if self.folder is None or self._backup() is None or not (self.folder / _FILE).exists():
            return None
        state = json.loads((self.folder / _FILE).read_text())
        history = History(
            plans=[RewritePlan.from_json(json.dumps(plan)) for plan in state["plans"]],
            steps=[Step(**step) for step in state["steps"]],
        )
        return history, {epoch: value for epoch, value in state["values"]}

    def backup_fits(self, model: keras.Model) -> bool:
        """Loads the weights of the backup into a model; whether they are weights of this model."""
        backup = self._backup()
        if backup is None:
            return False
        with tempfile.TemporaryDirectory() as folder:
            # Keras loads no file with the name that the older backup has.
            weights = shutil.copy(backup, pathlib.Path(folder, "backup.weights.h5"))
            try:
                model.load_weights(weights)
            except ValueError:
                return False
        return True

    def _backup(self) -> pathlib.Path | None:
        """The weights that BackupAndRestore is going to load, if there are any."""
        if self.folder is None:
            return None
        for name in BACKUPS:
            path = self.folder / name
            with contextlib.suppress(OSError), h5py.File(path):  # absent, or half written
                return path
        return None


def check_backup_dir(backup_dir: str | os.PathLike) -> pathlib.Path:
    """The folder as a path. A wrong folder would else be noticed after an epoch of training.

    Raises:
        ValueError: if the folder cannot be written or made.
    """
    folder = pathlib.Path(backup_dir)
    try:
        check_writable(folder)
    except OSError as error:
        raise ValueError(
            "`backup_dir` must be a folder that can be written, or that can be made. "
            f"Received: backup_dir={backup_dir!r}"
        ) from error
    return folder
