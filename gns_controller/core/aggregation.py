"""Several parameter groups, one noise scale: what a policy follows where a measurement holds more than one reading.

An optimizer whose groups move in norms of their own moves in the largest of them; the dual of that norm is the sum of
theirs. So norms are added, group by group, and squared once. Progress adds in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from gns_controller.core.contract import GroupReading, ProgressPoint

Aggregation = Literal["matrices_only", "sum_of_norms", "learning_rate_weighted", "max"]
"""Which groups count, and how much.

matrices_only: the first reading that matches, which is the optimizer's matrices (published for composite optimizers).
sum_of_norms: all that match, as one. learning_rate_weighted: the same, each group weighted with its learning rate.
max: the group with the largest averaged noise scale among those that are resolved; see policies/state_update.py.
"""


def summed(parts: Sequence[GroupReading], *, group: str, weights: Sequence[float] | None = None) -> GroupReading:
    """All parts as one reading, named `group`: norms, progress and standard errors are added, weighted.

        noise = sum w_g noise_g        signal = sum w_g signal_g        progress = sum w_g progress_g

    Standard errors add as if the errors of all groups went the same way, because groups share their sign patterns: on
    the large side. The pure-noise ceiling of the sum follows from those of the parts, whose pure-noise signals are
    noise_g / sqrt(ceiling_g):

        ceiling = (sum w_g noise_g)^2 / (sum w_g noise_g / sqrt(ceiling_g))^2

    Args:
        parts: at least one, of one estimator and direction. Geometry, sample groups and learning rate are the first's.
        group: name of the sum.
        weights: one per part; None: all 1.

    A part that is not finite makes a sum that is not finite.
    """
    first = parts[0]
    weights = [1.0] * len(parts) if weights is None else weights
    return GroupReading(
        group=group,
        geometry=first.geometry,
        estimator=first.estimator,
        direction=first.direction,
        noise=_sum(weights, [part.noise for part in parts]),
        signal=_sum(weights, [part.signal for part in parts]),
        progress=_sum_of_all(weights, [part.progress for part in parts]),
        num_sign_patterns=first.num_sign_patterns,
        noise_standard_error=_sum_of_all(weights, [part.noise_standard_error for part in parts]),
        progress_standard_error=_sum_of_all(weights, [part.progress_standard_error for part in parts]),
        progress_curve=_curve(weights, parts),
        ceiling_samples=_ceiling(weights, parts),
        num_groups=first.num_groups,
        samples_per_group=first.samples_per_group,
        learning_rate=first.learning_rate,
    )


def weighted_by_learning_rate(parts: Sequence[GroupReading], *, group: str) -> GroupReading | None:
    """`summed`, each part with its share of the learning rates; None if all are zero, and nothing moves.

    First-order progress per unit of the schedule adds over groups as lr_g * progress_g. Shares instead of rates leave
    every ratio alone, and keep a decaying schedule from weighing early measurements more than late ones in averages.
    """
    total = _sum([1.0] * len(parts), [part.learning_rate for part in parts])
    if total == 0:
        return None
    return summed(parts, group=group, weights=[part.learning_rate / total for part in parts])


def _sum(weights: Sequence[float], values: Sequence[float]) -> float:
    """From left to right: the built-in sum rounds differently from Python 3.12 on, and replay must not."""
    total = 0.0
    for weight, value in zip(weights, values, strict=True):
        total += weight * value
    return total


def _sum_of_all(weights: Sequence[float], values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _sum(weights, known) if len(known) == len(values) else None


def _curve(weights: Sequence[float], parts: Sequence[GroupReading]) -> tuple[ProgressPoint, ...]:
    """Progress adds, point by point, where all parts have the same sub-batches."""
    sizes = [point.samples for point in parts[0].progress_curve]
    if any([point.samples for point in part.progress_curve] != sizes for part in parts):
        return ()
    return tuple(
        ProgressPoint(samples=size, progress=_sum(weights, [part.progress_curve[index].progress for part in parts]))
        for index, size in enumerate(sizes)
    )


def _ceiling(weights: Sequence[float], parts: Sequence[GroupReading]) -> float | None:
    pure_noise_signals = []
    for part in parts:
        if part.ceiling_samples is None or not part.ceiling_samples > 0:
            return None
        pure_noise_signals.append(part.noise / math.sqrt(part.ceiling_samples))
    signal = _sum(weights, pure_noise_signals)
    ratio = _sum(weights, [part.noise for part in parts]) / signal if signal else 0.0
    return ratio * ratio or None
