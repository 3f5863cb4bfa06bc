"""What branches from one checkpoint say: numbers to numbers, no files and no processes.

Branches start at one checkpoint with batch B and train the same further samples with batches k B. Losses are
validation losses, in nats.

Source: Merrill, Arora, Groeneveld, Hajishirzi 2025, arXiv:2505.23971, "local recovery".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from gns_controller.core.contract import Estimator, GroupReading
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies.rules.noise_scale import KAPPA
from gns_controller.core.statistics import SmoothedNoiseScale

SMOOTHING = 0.5
"""alpha of the published procedure: weight of the newest loss."""


class CriticalBatch(NamedTuple):
    """The largest batch that kept the loss, and how far the branches tell."""

    critical_batch_size: int
    """k* B, samples."""
    multiple: int
    """k*"""
    next_batch_size: int | None
    """The smallest batch tried beyond it, which did not keep the loss; None: nothing larger was tried."""

    @property
    def is_at_least(self) -> bool:
        """The largest batch tried kept the loss: the critical one may be larger."""
        return self.next_batch_size is None

    @property
    def is_at_most(self) -> bool:
        """Nothing larger than the checkpoint's batch kept the loss: the critical one may be smaller."""
        return self.multiple == 1 and not self.is_at_least


def smoothed_loss(losses: Sequence[float], *, alpha: float = SMOOTHING) -> float:
    """The last value of an exponential average over a branch's evaluations.

        s_1 = L_1        s_t = alpha L_t + (1 - alpha) s_(t-1)

    Args:
        losses: L_t, nats, in the order of training, at the same sample counts in every branch.
        alpha: weight of the newest loss, in (0, 1].

    Returns:
        s_n, nats. Lags behind a falling loss, by the same share in every branch. NaN where a loss is NaN.

    Raises:
        InvalidInputError: no losses, or another alpha.
    """
    if not losses:
        raise InvalidInputError("a branch without evaluations has no loss.")
    if not 0 < alpha <= 1:
        raise InvalidInputError(f"{alpha=} must be above 0 and at most 1.")
    average = losses[0]
    for loss in losses[1:]:
        average = alpha * loss + (1 - alpha) * average
    return average


def critical_multiple(losses: Mapping[int, float], *, tolerance: float) -> int:
    """Merrill's rule: the largest multiple of the batch that does not lose against any smaller one.

        k* = max { k : L_k <= L_j + eps for all j < k }

    A larger k may pass where a smaller one fails; the rule takes the larger. The smallest k always passes. A branch
    that diverged (L_k not finite) never passes and is no rival.

    Args:
        losses: k -> L_k, nats, smoothed.
        tolerance: eps, nats; published 0.01.

    Raises:
        InvalidInputError: no branches, a negative tolerance, or the smallest multiple diverged.
    """
    if not losses:
        raise InvalidInputError("no branches to compare.")
    if not tolerance >= 0:
        raise InvalidInputError(f"{tolerance=} must be 0 or more.")
    if not math.isfinite(losses[min(losses)]):
        raise InvalidInputError(f"the branch with multiple {min(losses)} diverged: there is nothing to compare with.")
    best, found = math.inf, min(losses)
    for multiple in sorted(losses):
        loss = losses[multiple]
        if not math.isfinite(loss):
            continue
        if loss <= best + tolerance:
            found = multiple
        best = min(best, loss)
    return found


def critical_batch(losses: Mapping[int, float], *, global_batch_size: int, tolerance: float) -> CriticalBatch:
    """`critical_multiple` in samples, with the next batch tried.

    Args:
        losses: k -> L_k, nats, smoothed; k = 1 among them.
        global_batch_size: B, samples, of the checkpoint.
        tolerance: eps, nats.

    Raises:
        InvalidInputError: as `critical_multiple`.
    """
    multiple = critical_multiple(losses, tolerance=tolerance)
    larger = [other * global_batch_size for other in losses if other > multiple]
    return CriticalBatch(multiple * global_batch_size, multiple, min(larger, default=None))


def noise_tolerance(*, estimator: Estimator, noise_scale: float, critical_batch_size: float) -> float:
    """theta with which the noise_scale policy asks for the measured critical batch.

        B_crit = kappa noise_scale / theta^2        theta = sqrt(kappa noise_scale / B_crit)

    Args:
        estimator: whose reading it is; kappa = 1 for rank_variance and pi / 2 for split, as in the policy.
        noise_scale: samples.
        critical_batch_size: B_crit, samples.

    Raises:
        InvalidInputError: a noise scale or a batch that is not positive and finite.
    """
    for name, value in (("noise_scale", noise_scale), ("critical_batch_size", critical_batch_size)):
        if not 0 < value < math.inf:
            raise InvalidInputError(f"{name}={value} must be positive and finite.")
    return math.sqrt(KAPPA[estimator] * noise_scale / critical_batch_size)


def growth_price(*, loss: float, loss_of_double: float, steps: int, steps_of_double: int) -> float:
    """What a saved optimizer step costs: branches at B and at 2 B over the same samples.

        price = (L_2B - L_B) / (steps_B - steps_2B)        nats per step

    Negative where the larger batch came out better, too.

    Args:
        loss: L_B, nats, smoothed.
        loss_of_double: L_2B, nats, smoothed.
        steps: optimizer steps of the branch at B.
        steps_of_double: of that at 2 B.

    Raises:
        InvalidInputError: no step was saved.
    """
    if steps_of_double >= steps:
        raise InvalidInputError(f"the larger batch took {steps_of_double} steps, the smaller {steps}: none was saved.")
    return (loss_of_double - loss) / (steps - steps_of_double)


def averaged(readings: Iterable[GroupReading]) -> SmoothedNoiseScale | None:
    """Noise and signal of one quantity, averaged apart with equal weights; `judged()` gives ratio and interval.

        noise_scale = mean(noise_sq) / mean(signal_sq)

    beta = n / (n + 1) turns the exponential average into the plain mean, and its standard error into s / sqrt(n).

    Args:
        readings: of one group and estimator. Those that are not finite are left out.
    """
    smoothed, count = None, 0
    for reading in readings:
        if not reading.is_finite:
            continue
        beta = count / (count + 1)
        if smoothed is None:
            smoothed = SmoothedNoiseScale.started_by(reading)
        else:
            smoothed = smoothed.updated(reading, noise_beta=beta, signal_beta=beta)
        count += 1
    return smoothed


def table_policy(points: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Measured critical batches as a `critical_batch_table` policy.

    Args:
        points: (samples, critical batch size), several at the same samples from several seeds: the lower median counts,
            which is a batch that was measured.
    """
    entries = [
        {
            "from_samples": samples,
            "critical_batch_size": statistics.median_low([critical for _, critical in at_samples]),
        }
        for samples, at_samples in groupby(sorted(points), key=lambda point: point[0])
    ]
    return {"policy": "critical_batch_table", "table": entries}
