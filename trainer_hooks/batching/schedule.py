"""Learning-rate schedules over samples, so that they do not move when the batch grows."""

from __future__ import annotations

import math
from collections.abc import Callable

LearningRateSchedule = Callable[[int], float]
"""Samples seen before the step -> factor on the base learning rate."""


def warmup_cosine(*, budget_samples: int, warmup_samples: int, final_factor: float = 0.0) -> LearningRateSchedule:
    """Linear to 1 over the warmup, then half a cosine down to `final_factor` at the budget."""

    def factor(samples_seen: int) -> float:
        if samples_seen < warmup_samples:
            return (samples_seen + 1) / warmup_samples
        progress = min((samples_seen - warmup_samples) / max(budget_samples - warmup_samples, 1), 1.0)
        return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
