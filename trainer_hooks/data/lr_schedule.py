"""Learning-rate schedules over samples, so that they do not move when the batch grows."""

from __future__ import annotations

import math
from collections.abc import Callable

from gns_controller.core.errors import InvalidInputError

NUM_SAMPLED_POINTS = 65
"""Points of a schedule that a run is registered with: every 64th of the budget, both ends included."""

LearningRateSchedule = Callable[[int], float]
"""Samples seen before the step -> factor on the base learning rate."""


def warmup_cosine(*, budget_samples: int, warmup_samples: int, final_factor: float = 0.0) -> LearningRateSchedule:
    """Return a schedule: linear to 1 over the warmup, then half a cosine down to `final_factor` at the budget."""

    def factor(samples_seen: int) -> float:
        if samples_seen < warmup_samples:
            return (samples_seen + 1) / warmup_samples
        progress = min((samples_seen - warmup_samples) / max(budget_samples - warmup_samples, 1), 1.0)
        return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def sampled(schedule: LearningRateSchedule, *, budget_samples: int) -> tuple[float, ...]:
    """Sample a schedule at evenly spaced points of the budget, both ends included. The same floats at every call.

    Raises:
        InvalidInputError: the schedule raises there, or is not finite.
    """
    points = []
    for index in range(NUM_SAMPLED_POINTS):
        samples = budget_samples * index // (NUM_SAMPLED_POINTS - 1)
        try:
            factor = float(schedule(samples))
        except Exception as error:
            raise InvalidInputError(
                f"learning_rate_schedule({samples}) raised {type(error).__name__}: {error}; it has to answer from 0 to "
                f"{budget_samples} samples."
            ) from error
        if not math.isfinite(factor):
            raise InvalidInputError(f"learning_rate_schedule({samples}) is {factor}; it has to be a finite number.")
        points.append(factor)
    return tuple(points)
