"""At which epochs a training makes its model smaller, and to which budgets."""

import itertools
from collections.abc import Mapping
from numbers import Integral, Real
from typing import cast

from keras_bilinear.rewriting.limits import DEFAULT_BUDGET


def parse_schedule(
    at_epoch: int | None, budget: float | None, schedule: Mapping[int, float] | None
) -> dict[int, float]:
    """The schedule that the arguments of `BilinearRewrite` ask for.

    Args:
        at_epoch: the epoch of the only step.
        budget: the share of the parameters to keep in it; `None` for 0.1.
        schedule: instead of both, a mapping from epochs to budgets.

    Returns:
        `{epoch: budget}` in the order of the epochs.

    Raises:
        ValueError: if an argument is not valid.
    """
    if (at_epoch is None) == (schedule is None) or (schedule is not None and budget is not None):
        raise ValueError(
            "Give either `at_epoch`, with a `budget`, or a `schedule`. "
            f"Received: at_epoch={at_epoch!r}, budget={budget!r}, schedule={schedule!r}"
        )
    if at_epoch is not None:
        schedule = {at_epoch: DEFAULT_BUDGET if budget is None else budget}
    if not isinstance(schedule, Mapping) or not schedule:
        raise ValueError(
            f"`schedule` must be a mapping from epochs to budgets. Received: schedule={schedule!r}"
        )
    for epoch, share in schedule.items():
        if not isinstance(epoch, Integral) or isinstance(epoch, bool) or epoch < 0:
            raise ValueError(
                f"An epoch must be an integer, 0 or more. Received: {epoch!r} in {schedule!r}"
            )
        number = isinstance(share, Real) and not isinstance(share, bool)
        if not number or not 0 < cast(float, share) <= 1:
            raise ValueError(
                f"`budget` must be above 0 and at most 1. Received: {share!r} for epoch {epoch}"
            )
    schedule = {int(epoch): float(schedule[epoch]) for epoch in sorted(schedule)}
    if any(later >= sooner for sooner, later in itertools.pairwise(schedule.values())):
        raise ValueError(
            f"The budgets of a `schedule` must get smaller. Received: schedule={schedule!r}"
        )
    return schedule


def due_epoch(schedule: Mapping[int, float], last: int, epoch: int) -> int | None:
    """The epoch of the step to make now. Steps that were missed are left out.

    Args:
        schedule: `{epoch: budget}` in the order of the epochs.
        last: the epoch of the step that was made last; -1 if none was.
        epoch: the epoch that begins.

    Returns:
        The epoch as the schedule has it; `None` if no step is due.

    >>> due_epoch({1: 0.5, 3: 0.3, 4: 0.2}, last=1, epoch=2)
    >>> due_epoch({1: 0.5, 3: 0.3, 4: 0.2}, last=1, epoch=5)
    4
    """
    return max((planned for planned in schedule if last < planned <= epoch), default=None)
