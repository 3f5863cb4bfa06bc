"""Statistics of readings: the correction for few groups, and moving averages with their standard errors.

Averages of noise and of signal are kept apart and signed, and the ratio is taken last. An average of ratios is biased
(1.23 for a true 1.00 in simulation); a clipped signal is biased too, so a negative one stays negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from gns_controller.core.contract import (
    RESOLVED_STANDARD_ERRORS,
    SATURATED_RESOLUTION,
    Count,
    Direction,
    Estimator,
    FiniteFloat,
    FrozenModel,
    Geometry,
    GroupReading,
    finite_ratio,
)

MIN_SPREAD_MEASUREMENTS = 5
"""A spread estimated from fewer measurements is not trusted."""

GROWTH = 3
"""Of a growing average: about the last quarter of the measurements so far count."""


@cache
def c4(degrees_of_freedom: int) -> float:
    """E[s] / sigma for the root s of an unbiased variance of normal numbers: sqrt(2/f) Gamma((f+1)/2) / Gamma(f/2)."""
    half = degrees_of_freedom / 2
    return math.exp(math.lgamma(half + 0.5) - math.lgamma(half)) / math.sqrt(half)


def few_groups_factor(reading: GroupReading) -> float:
    """E[noise]^2 / noise^2 for normal groups: c4(K-1)^2 for rank_variance in the sign geometry, else 1."""
    if reading.estimator == "rank_variance" and reading.geometry == "sign":
        return c4(reading.num_groups - 1) ** 2
    return 1.0


def corrected_for_few_groups(reading: GroupReading) -> GroupReading:
    """Return the reading with noise_sq / few_groups_factor for its noise_sq, and its ceiling to match.

    Another number of ranks then reads the same. Not to be applied twice.
    """
    factor = few_groups_factor(reading)
    if factor == 1:
        return reading
    ceiling = None if reading.ceiling_samples is None else reading.ceiling_samples / factor
    return reading.model_copy(update={"noise": reading.noise / math.sqrt(factor), "ceiling_samples": ceiling})


@dataclass(frozen=True, slots=True)
class SignedAverage:
    """Exponential average of a signed number, with the standard error of that average.

    mean_t = beta mean + (1 - beta) x, started by the first value. With weights w_i of the observations,
    Var(mean) = s^2 sum w_i^2 for independent observations of variance s^2, and the weighted spread around the mean
    estimates s^2 (1 - sum w_i^2). A drifting signal widens the spread, so the error errs on the large side.

    A growing average (`last` is kept) weighs its n-th value by (GROWTH + 1) / (n + GROWTH) until that falls to
    1 - beta: early values, made while the signal fell by orders of magnitude, are soon forgotten. It takes s^2 from
    half the squared difference of successive values, which a drift leaves alone.

    A dataclass: two are made per measurement, and a model would take twice as long.
    Source: polynomial-decay averaging, arXiv:1212.1824; successive differences, von Neumann 1941.
    """

    mean: FiniteFloat
    spread: FiniteFloat = 0.0
    """sum w_i (x_i - mean)^2"""
    sum_weights_sq: FiniteFloat = 1.0
    count: Count = 1
    last: FiniteFloat | None = None
    """Growing averages only: the last value; `spread` is then the average of s^2 itself."""

    @classmethod
    def started_by(cls, value: float, *, growing: bool = False) -> SignedAverage:
        """The average of one value."""
        return cls(mean=value, last=value if growing else None)

    def updated(self, value: float, *, beta: float) -> SignedAverage:
        """The average after one more value."""
        if self.last is not None:
            return self._grown(value, self.last, beta=beta)
        deviation = value - self.mean
        return SignedAverage(
            mean=self.mean + (1 - beta) * deviation,
            spread=beta * (self.spread + (1 - beta) * deviation * deviation),
            sum_weights_sq=beta * beta * self.sum_weights_sq + (1 - beta) * (1 - beta),
            count=self.count + 1,
        )

    def _grown(self, value: float, last: float, *, beta: float) -> SignedAverage:
        count = self.count + 1
        weight = max(1 - beta, (GROWTH + 1) / (count + GROWTH))
        weight_of_difference = max(1 - beta, (GROWTH + 1) / (count - 1 + GROWTH))
        half_square = (value - last) * (value - last) / 2
        return SignedAverage(
            mean=self.mean + weight * (value - self.mean),
            spread=self.spread + weight_of_difference * (half_square - self.spread),
            sum_weights_sq=(1 - weight) * (1 - weight) * self.sum_weights_sq + weight * weight,
            count=count,
            last=value,
        )

    @property
    def standard_error(self) -> float:
        """Standard deviation of `mean`; infinite as long as it rests on one value."""
        if self.count < 2:
            return math.inf
        if self.last is not None:
            return math.sqrt(self.spread * self.sum_weights_sq)
        effective = self.sum_weights_sq
        if effective >= 1:  # beta = 0: the average is the last value
            return math.inf
        return math.sqrt(self.spread * effective / (1 - effective))


class Judgement(NamedTuple):
    """What two averages say, and how far to believe it. All in samples, but for the resolution."""

    noise_scale: float | None
    """noise_sq / signal_sq; None while the averaged signal is not positive."""
    low: float | None
    """(noise_sq - 2 se) / (signal_sq + 2 se), se the standard error of each average; None while that is unknown."""
    high: float | None
    """(noise_sq + 2 se) / (signal_sq - 2 se); None also while the signal is within 2 se of zero: no upper end."""
    ceiling_samples: float | None
    """The largest noise scale that could be told from pure noise now. rank_variance: what pure noise reads. split:
    noise_sq over two standard errors of the averaged signal."""
    resolution: float | None
    """noise_scale over its ceiling. Above 1 (split) or near 1 (rank_variance) nothing was resolved."""
    unresolved: bool
    """Whether the honest answer is "at least about the present batch"."""


NOTHING_SEEN = Judgement(noise_scale=None, low=None, high=None, ceiling_samples=None, resolution=None, unresolved=True)
"""The judgement before the first reading."""


class SmoothedNoiseScale(FrozenModel):
    """Noise and signal of one parameter group, or of several taken together, averaged apart."""

    group: str
    geometry: Geometry
    estimator: Estimator
    direction: Direction = "gradient"
    corrected: bool = False
    """Whether the readings were corrected for few groups."""
    noise_sq: SignedAverage
    signal_sq: SignedAverage
    pure_noise_samples: FiniteFloat | None = None
    """rank_variance: the latest pure-noise reading, its ceiling."""

    @classmethod
    def started_by(cls, reading: GroupReading, *, corrected: bool = False, growing: bool = False) -> SmoothedNoiseScale:
        """The first reading starts both averages, as in the recorded runs of the published method."""
        return cls(
            group=reading.group,
            geometry=reading.geometry,
            estimator=reading.estimator,
            direction=reading.direction,
            corrected=corrected,
            noise_sq=SignedAverage.started_by(reading.noise_sq, growing=growing),
            signal_sq=SignedAverage.started_by(reading.signal_sq, growing=growing),
            pure_noise_samples=_finite(reading.ceiling_samples),
        )

    def continues_with(self, reading: GroupReading, *, corrected: bool = False, growing: bool = False) -> bool:
        """Whether the reading is one of those that were averaged so far, and not another quantity."""
        return (
            self.group == reading.group
            and self.geometry == reading.geometry
            and self.estimator == reading.estimator
            and self.direction == reading.direction
            and self.corrected == corrected
            and (self.noise_sq.last is not None) == growing
        )

    def updated(self, reading: GroupReading, *, noise_beta: float, signal_beta: float) -> SmoothedNoiseScale:
        """Both averages after one more reading of the same quantity."""
        return SmoothedNoiseScale(
            group=self.group,
            geometry=self.geometry,
            estimator=self.estimator,
            direction=self.direction,
            corrected=self.corrected,
            noise_sq=self.noise_sq.updated(reading.noise_sq, beta=noise_beta),
            signal_sq=self.signal_sq.updated(reading.signal_sq, beta=signal_beta),
            pure_noise_samples=_finite(reading.ceiling_samples),
        )

    def judged(self) -> Judgement:
        """The noise scale, its interval of two standard errors, its ceiling and whether it is resolved.

        The interval is what the spread of the measurements says, and nothing about bias: a rank_variance reading at
        its ceiling has a narrow one.
        """
        noise, signal = self.noise_sq, self.signal_sq
        noise_scale = finite_ratio(noise.mean, signal.mean)
        noise_error = RESOLVED_STANDARD_ERRORS * noise.standard_error
        signal_error = RESOLVED_STANDARD_ERRORS * signal.standard_error
        is_trusted = signal.count >= MIN_SPREAD_MEASUREMENTS
        low = high = None
        if is_trusted and noise_error + signal_error < math.inf:
            low = finite_ratio(max(noise.mean - noise_error, 0.0), signal.mean + signal_error)
            high = finite_ratio(noise.mean + noise_error, signal.mean - signal_error)
        if self.estimator == "rank_variance":
            ceiling = self.pure_noise_samples
            resolution = None if noise_scale is None or ceiling is None else finite_ratio(noise_scale, ceiling)
            unresolved = resolution is not None and resolution > SATURATED_RESOLUTION
        else:
            ceiling = finite_ratio(noise.mean, signal_error) if is_trusted else None
            resolution = None if noise_scale is None or ceiling is None else finite_ratio(noise_scale, ceiling)
            unresolved = not is_trusted or signal.mean < signal_error
        return Judgement(
            noise_scale=noise_scale,
            low=low,
            high=high,
            ceiling_samples=ceiling,
            resolution=resolution,
            unresolved=unresolved,
        )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
