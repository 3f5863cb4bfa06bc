"""Moving averages of noise and of signal, kept apart and signed; the ratio is taken last.

An average of ratios is biased (1.23 for a true 1.00 in simulation); a clipped signal is biased too, so a negative one
stays negative until the averages have made up their mind.
"""

from __future__ import annotations

import math
from typing import Self

from gns_controller.core.contract import (
    SATURATED_RESOLUTION,
    Count,
    Estimator,
    FiniteFloat,
    FrozenModel,
    Geometry,
    GroupReading,
)

RESOLVED_STANDARD_ERRORS = 2.0
"""A split signal counts as seen once its average exceeds this many standard errors."""

MIN_SPLIT_MEASUREMENTS = 5
"""A spread estimated from fewer measurements is not trusted."""


class SignedAverage(FrozenModel):
    """Exponential average of a signed number, with the standard error of that average.

    mean_t = beta mean + (1 - beta) x, started by the first value. With weights w_i of the observations,
    Var(mean) = s^2 sum w_i^2 for independent observations of variance s^2, and the weighted spread around the mean
    estimates s^2 (1 - sum w_i^2). A drifting signal widens the spread, so the error errs on the large side.
    """

    mean: FiniteFloat
    spread: FiniteFloat = 0.0
    """sum w_i (x_i - mean)^2"""
    sum_weights_sq: FiniteFloat = 1.0
    count: Count = 1

    def updated(self, value: float, *, beta: float) -> Self:
        """The average after one more value."""
        deviation = value - self.mean
        return self.model_copy(
            update={
                "mean": self.mean + (1 - beta) * deviation,
                "spread": beta * (self.spread + (1 - beta) * deviation * deviation),
                "sum_weights_sq": beta * beta * self.sum_weights_sq + (1 - beta) * (1 - beta),
                "count": self.count + 1,
            }
        )

    @property
    def standard_error(self) -> float:
        """Standard deviation of `mean`; infinite as long as it rests on one value."""
        if self.count < 2:
            return math.inf
        effective = self.sum_weights_sq
        if effective >= 1:  # beta = 0: the average is the last value
            return math.inf
        return math.sqrt(self.spread * effective / (1 - effective))


class SmoothedNoiseScale(FrozenModel):
    """Noise and signal of one parameter group, averaged apart."""

    group: str
    geometry: Geometry
    estimator: Estimator
    noise_sq: SignedAverage
    signal_sq: SignedAverage
    pure_noise_samples: FiniteFloat | None = None
    """rank_variance: the latest pure-noise reading, its ceiling."""

    @classmethod
    def started_by(cls, reading: GroupReading) -> Self:
        """The first reading starts both averages, as in the recorded runs of the published method."""
        return cls(
            group=reading.group,
            geometry=reading.geometry,
            estimator=reading.estimator,
            noise_sq=SignedAverage(mean=reading.noise_sq),
            signal_sq=SignedAverage(mean=reading.signal_sq),
            pure_noise_samples=_finite(reading.ceiling_samples),
        )

    def updated(self, reading: GroupReading, *, noise_beta: float, signal_beta: float) -> Self:
        """Both averages after one more reading of the same group by the same estimator."""
        return self.model_copy(
            update={
                "noise_sq": self.noise_sq.updated(reading.noise_sq, beta=noise_beta),
                "signal_sq": self.signal_sq.updated(reading.signal_sq, beta=signal_beta),
                "pure_noise_samples": _finite(reading.ceiling_samples),
            }
        )

    @property
    def noise_scale(self) -> float | None:
        """noise_sq / signal_sq in samples; None while the averaged signal is not positive."""
        if self.signal_sq.mean <= 0:
            return None
        return _finite(self.noise_sq.mean / self.signal_sq.mean)

    @property
    def ceiling_samples(self) -> float | None:
        """The largest noise scale that could be told from pure noise now.

        rank_variance: what pure noise reads. split: noise_sq over two standard errors of the averaged signal.
        """
        if self.estimator == "rank_variance":
            return self.pure_noise_samples
        standard_error = self.signal_sq.standard_error
        if self.signal_sq.count < MIN_SPLIT_MEASUREMENTS or standard_error == 0:
            return None
        return _finite(self.noise_sq.mean / (RESOLVED_STANDARD_ERRORS * standard_error))

    @property
    def resolution(self) -> float | None:
        """noise_scale over its ceiling. Above 1 (split) or near 1 (rank_variance) nothing was resolved."""
        noise_scale, ceiling = self.noise_scale, self.ceiling_samples
        if noise_scale is None or not ceiling:
            return None
        return _finite(noise_scale / ceiling)

    @property
    def unresolved(self) -> bool:
        """Whether the honest answer is "at least about the present batch"."""
        if self.estimator == "rank_variance":
            resolution = self.resolution
            return resolution is not None and resolution > SATURATED_RESOLUTION
        if self.signal_sq.count < MIN_SPLIT_MEASUREMENTS:
            return True
        return self.signal_sq.mean < RESOLVED_STANDARD_ERRORS * self.signal_sq.standard_error


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
