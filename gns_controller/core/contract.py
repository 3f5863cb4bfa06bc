"""The nouns: frozen models that cross the wire, the store and the policies.

A measurement says what happened, so NaN and infinity are legal in it: the strings "NaN", "Infinity" and
"-Infinity" on the wire. A plan or a decision never holds one.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Geometry = Literal["euclidean", "sign", "spectral"]
"""The norm an optimizer descends in: l2 (SGD), l-infinity (Signum, AdamW), Schatten-infinity (Muon, Shampoo)."""

Estimator = Literal["rank_variance", "split"]
"""How noise and signal were obtained: spread over sample groups (published), or two halves (ours)."""

Direction = Literal["gradient", "update"]
"""What is measured: the gradient, or what the optimizer steps along, momentum included: beta m + (1 - beta) g."""

Reason = Literal[
    "warmup",
    "grow",
    "shrink",
    "stage",
    "hold",
    "hold_below_deadband",
    "hold_monotone",
    "hold_hysteresis",
    "hold_unresolved",
    "hold_dwell",
    "hold_decay",
    "hold_not_finite",
    "hold_no_reading",
    "capped_growth",
    "capped_rate",
    "capped_integer_factor",
    "capped_budget",
    "capped_max",
    "raised_to_min",
    "override",
]
"""Why a decision came out as it did. A closed list: dashboards and alerts may switch on it."""

RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
"""1 to 128 letters, digits, dots, underscores and hyphens; the first a letter or digit."""

SATURATED_RESOLUTION = 0.7
"""A rank_variance reading above this share of its ceiling says "at least", not "equal to"."""

RESOLVED_STANDARD_ERRORS = 2.0
"""A split signal counts as seen once it exceeds this many of its standard errors."""

_LARGEST_AVERAGED = 1e150
"""Squares of such readings, and differences of them, still fit a float64."""

Count = Annotated[int, Field(ge=0, le=2**62)]
PositiveCount = Annotated[int, Field(ge=1, le=2**62)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Label = Annotated[str, Field(min_length=1, max_length=200)]


def finite_ratio(numerator: float, denominator: float) -> float | None:
    """Their ratio; None where the denominator is not positive or the ratio not finite."""
    if not denominator > 0:
        return None
    ratio = numerator / denominator
    return ratio if math.isfinite(ratio) else None


class FrozenModel(BaseModel):
    """Immutable, closed to unknown fields, documented by the line under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class Span(FrozenModel):
    """A length of training, in optimizer steps or in samples. Samples do not move when the batch grows."""

    steps: PositiveCount | None = None
    samples: PositiveCount | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.steps is None) == (self.samples is None):
            raise ValueError("a span has either steps or samples, exactly one of them.")
        return self

    def passed(self, *, steps: int, samples: int) -> bool:
        """Whether this much training lies behind."""
        return steps >= self.steps if self.steps is not None else samples >= (self.samples or 0)


class ParameterGroup(FrozenModel):
    """One group of parameters that is measured with one norm."""

    name: Label
    geometry: Geometry
    optimizer: Label
    num_tensors: PositiveCount
    num_parameters: PositiveCount


class ProgressPoint(FrozenModel):
    """First-order progress that a batch of this size would make."""

    samples: Annotated[float, Field(gt=0)]
    progress: float
    """<p(g_S), g_rest>, unbiased: no sample is on both sides. Signed."""


class GroupReading(FrozenModel):
    """Noise and signal of one parameter group, measured once, as dual norms: raw, not squared.

    sign and spectral norms add over parameters and shards; euclidean ones add in quadrature.
    """

    group: Label
    geometry: Geometry
    estimator: Estimator
    direction: Direction = "gradient"
    noise: float
    """Dual norm of the per-sample spread: noise_sq = noise^2."""
    signal: float
    """rank_variance: ||gbar||_*. split: (||g_A||_* + ||g_B||_*) / 2."""
    progress: float | None = None
    """split only: (<p(g_A), g_B> + <p(g_B), g_A>) / 2, unbiased first-order progress at the half batch. Signed."""
    num_sign_patterns: Annotated[int, Field(ge=1)] | None = None
    """split only: pairs of halves that noise, signal and progress were averaged over."""
    noise_standard_error: float | None = None
    """split with two sign patterns or more: spread of the noise over the patterns / sqrt(patterns)."""
    progress_standard_error: float | None = None
    """split of the gradient with two sign patterns or more: from the spread of the progress over the patterns, and what
    all patterns share, the noise of the mean gradient (docs/reference/estimators.md)."""
    progress_curve: Annotated[tuple[ProgressPoint, ...], Field(max_length=16)] = ()
    """Progress at several sub-batch sizes, from the same sample groups."""
    inner_product_variance: Annotated[float, Field(ge=0)] | None = None
    """euclidean rank_variance only: per-sample variance of <g_i, gbar>, for the inner-product test."""
    ceiling_samples: float | None = None
    """rank_variance only: what pure noise of these shapes reads at this batch. split readings get their ceiling from
    their standard error: `ceiling`, and after many measurements statistics.py."""
    num_groups: Annotated[int, Field(ge=2)]
    """Sample groups whose mean gradients were seen apart."""
    samples_per_group: Annotated[float, Field(gt=0)]
    """Mean over the groups."""
    learning_rate: float
    repeats: Label | None = None
    """The group whose parameters are measured here once more, in another norm than their own."""

    @model_validator(mode="after")
    def _what_belongs_to_split(self) -> Self:
        if (self.progress is not None) != (self.estimator == "split"):
            raise ValueError("progress is given by the split estimator, and only by it.")
        if self.progress is None and not (
            self.num_sign_patterns is self.noise_standard_error is self.progress_standard_error is None
        ):
            raise ValueError("sign patterns and their standard errors are given by the split estimator only.")
        if self.inner_product_variance is not None and (self.estimator, self.geometry) != (
            "rank_variance",
            "euclidean",
        ):
            raise ValueError("inner_product_variance is given by rank_variance in the euclidean geometry only.")
        return self

    @property
    def noise_sq(self) -> float:
        """Squared dual norm of the per-sample spread."""
        return self.noise * self.noise

    @property
    def signal_sq(self) -> float:
        """rank_variance: signal^2, biased up by noise. split: signal * progress, debiased and signed."""
        return self.signal * (self.signal if self.progress is None else self.progress)

    @property
    def signal_sq_bracket(self) -> tuple[float, float] | None:
        """split: max(progress, 0)^2 and signal^2; E progress <= ||grad L||_* <= E signal."""
        if self.progress is None:
            return None
        low = max(self.progress, 0.0)
        return low * low, self.signal * self.signal

    @property
    def signal_sq_standard_error(self) -> float | None:
        """split with sign patterns: |signal| * progress_standard_error. The norms hardly spread beside the progress."""
        if self.progress_standard_error is None:
            return None
        return abs(self.signal) * self.progress_standard_error

    @property
    def noise_scale(self) -> float | None:
        """noise_sq / signal_sq of this one reading, in samples; None where that is no finite positive number."""
        return finite_ratio(self.noise_sq, self.signal_sq)

    @property
    def ceiling(self) -> float | None:
        """The largest noise scale that this one reading could show, in samples.

        rank_variance: ceiling_samples. split: noise_sq over two standard errors of signal_sq, where there is one.
        """
        if self.progress is None:
            return self.ceiling_samples
        standard_error = self.signal_sq_standard_error
        return (
            None if standard_error is None else finite_ratio(self.noise_sq, RESOLVED_STANDARD_ERRORS * standard_error)
        )

    @property
    def resolution(self) -> float | None:
        """noise_scale over its ceiling. A correction for few groups changes both alike, so it drops out here."""
        noise_scale, ceiling = self.noise_scale, self.ceiling
        return None if noise_scale is None or ceiling is None else finite_ratio(noise_scale, ceiling)

    @property
    def unresolved(self) -> bool:
        """Whether this one reading cannot be told from pure noise. Policies judge averages of many instead."""
        if self.progress is None:
            ceiling = self.ceiling_samples
            return ceiling is not None and self.noise_sq > SATURATED_RESOLUTION * ceiling * self.signal_sq
        standard_error = self.signal_sq_standard_error
        return standard_error is None or not self.signal_sq >= RESOLVED_STANDARD_ERRORS * standard_error

    @property
    def is_finite(self) -> bool:
        """Whether a policy may look at it: a number whose square is one, too, because averages keep their spread."""
        return abs(self.noise_sq) < _LARGEST_AVERAGED and abs(self.signal_sq) < _LARGEST_AVERAGED


class NoiseScaleMeasurement(FrozenModel):
    """What one run reports about one optimizer step. Empty readings report progress only."""

    run_id: RunId
    attempt: Count
    """Incarnation of the run: a restart begins the next."""
    optimizer_step: Count
    """Optimizer steps completed, this one included."""
    samples_seen: Count
    """Samples consumed by those steps."""
    plan_version: Count
    global_batch_size: PositiveCount
    micro_batch_size: PositiveCount
    gradient_accumulation_steps: PositiveCount
    data_parallel_size: PositiveCount
    schedule_factor: float = 1.0
    """Learning rate over its peak, coupling to the batch taken out."""
    step_seconds: float | None = None
    """Median of the unmeasured steps since the last report."""
    samples_per_second: float | None = None
    measurement_seconds: float | None = None
    """What measuring this step cost, beyond an unmeasured step; mean over ranks."""
    loss: float | None = None
    """Mean training loss since the last report."""
    validation_loss: float | None = None
    readings: Annotated[tuple[GroupReading, ...], Field(max_length=256)] = ()


class BatchPlan(FrozenModel):
    """What every rank obeys from `effective_step` on."""

    version: Count
    global_batch_size: PositiveCount
    micro_batch_size: PositiveCount
    """Samples per rank per backward pass."""
    gradient_accumulation_steps: PositiveCount
    learning_rate_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Multiplies the scheduled base learning rate, once."""
    optimizer_factors: dict[Label, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    """Optimizer class name -> factor, for optimizers that are coupled by another rule than the rest."""
    beta_exponent: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Every beta of the optimizers is its value at the start to this power."""
    effective_step: Count
    """The first step run under this plan is the one that starts with this many completed steps."""


class Override(FrozenModel):
    """A batch that an operator has put above the policy, until it is released."""

    kind: Literal["pin", "hold"]
    """pin: this batch. hold: whatever batch is in force."""
    global_batch_size: PositiveCount | None = None
    """pin only. Rounded down to a reachable batch."""
    note: Annotated[str, Field(max_length=500)] = ""
    """Why, for the next person who looks."""

    @model_validator(mode="after")
    def _pin_names_a_batch(self) -> Self:
        if (self.kind == "pin") != (self.global_batch_size is not None):
            raise ValueError("a pin names a global_batch_size, a hold does not.")
        return self


class Decision(FrozenModel):
    """What the policy made of one measurement, and why."""

    attempt: Count
    optimizer_step: Count
    samples_seen: Count
    policy: Label
    policy_revision: Count
    reason: Reason
    explanation: str
    """One sentence for people, with the numbers in it."""
    previous_batch_size: PositiveCount
    requested_batch_size: FiniteFloat | None = None
    """What the rule asked for, before quantisation and limits."""
    noise_sq: FiniteFloat | None = None
    """Smoothed, like signal_sq and noise_scale."""
    signal_sq: FiniteFloat | None = None
    noise_scale: FiniteFloat | None = None
    """Samples. None while the smoothed signal is not positive."""
    noise_scale_low: FiniteFloat | None = None
    """Two standard errors of the averages of noise and signal below noise_scale; None while they are unknown. What the
    measurements' spread says, nothing about bias."""
    noise_scale_high: FiniteFloat | None = None
    """The same above; None also while the signal is within two standard errors of zero: no upper end."""
    ceiling_samples: FiniteFloat | None = None
    """The largest noise scale that this estimator can read now."""
    resolution: FiniteFloat | None = None
    """noise_scale over its ceiling."""
    unresolved: bool = False
    plan: BatchPlan
