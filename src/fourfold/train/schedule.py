"""The learning rate over a run: warm-up, stable, decay.

A stable phase knows nothing of the run's end, so one run gives as many lengths as decays are
branched from it.
"""

from __future__ import annotations

import math

from fourfold.train.config import ScheduleSection


def rate_at(step: int, schedule: ScheduleSection) -> float:
    """The share of the peak learning rate in a step, from 0; the first step has some already."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    decay = round(schedule.decay * schedule.steps)
    stable_until = schedule.steps - decay
    if step < stable_until:
        return 1.0
    gone = (step - stable_until + 1) / (decay + 1)
    return 1.0 - (1.0 - schedule.final) * math.sqrt(gone)


def bias_moves(step: int, schedule: ScheduleSection, frozen: float) -> bool:
    """Whether selection biases still move: not in the last share `frozen` of the steps."""
    return step < schedule.steps - round(frozen * schedule.steps)
