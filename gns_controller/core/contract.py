"""The nouns: frozen models that cross the wire, the store and the policies.

A measurement says what happened, so NaN and infinity are legal in it: the strings "NaN", "Infinity" and
"-Infinity" on the wire. A plan or a decision never holds one.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Geometry = Literal["euclidean", "sign", "spectral"]
"""The norm an optimizer descends in: l2 (SGD), l-infinity (Signum, AdamW), Schatten-infinity (Muon, Shampoo)."""

Estimator = Literal["rank_variance", "split"]
"""How noise and signal were obtained: spread over sample groups (published), or two halves (ours)."""

Reason = Literal[
    "warmup",
    "grow",
    "shrink",
    "hold",
    "hold_below_deadband",
    "hold_monotone",
    "hold_unresolved",
    "hold_dwell",
    "hold_not_finite",
    "hold_no_reading",
    "capped_growth",
    "capped_max",
    "stage",
    "override",
    "shadow",
]
"""Why a decision came out as it did. A closed list: dashboards and alerts may switch on it."""

RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
"""1 to 128 letters, digits, dots, underscores and hyphens; the first a letter or digit."""

SATURATED_RESOLUTION = 0.7
"""A rank_variance reading above this share of its ceiling says "at least", not "equal to"."""

_LARGEST_AVERAGED = 1e150
"""Squares of such readings, and differences of them, still fit a float64."""

Count = Annotated[int, Field(ge=0, le=2**62)]
PositiveCount = Annotated[int, Field(ge=1, le=2**62)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Label = Annotated[str, Field(min_length=1, max_length=200)]


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


class GroupReading(FrozenModel):
    """Noise and signal of one parameter group, measured once, as dual norms: raw, not squared.

    sign and spectral norms add over parameters and shards; euclidean ones add in quadrature.
    """

    group: Label
    geometry: Geometry
    estimator: Estimator
    noise: float
    """Dual norm of the per-sample spread: noise_sq = noise^2."""
    signal: float
    """rank_variance: ||gbar||_*. split: (||g_A||_* + ||g_B||_*) / 2."""
    progress: float | None = None
    """split only: (<p(g_A), g_B> + <p(g_B), g_A>) / 2, unbiased first-order progress at the half batch. Signed."""
    ceiling_samples: float | None = None
    """rank_variance only: what pure noise of these shapes reads at this batch. split readings get their ceiling from
    the spread of many measurements (smoothing.py)."""
    num_groups: Annotated[int, Field(ge=2)]
    """Sample groups whose mean gradients were seen apart."""
    samples_per_group: Annotated[float, Field(gt=0)]
    """Mean over the groups."""
    learning_rate: float

    @model_validator(mode="after")
    def _progress_belongs_to_split(self) -> Self:
        if (self.progress is not None) != (self.estimator == "split"):
            raise ValueError("progress is given by the split estimator, and only by it.")
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
    effective_step: Count
    """The first step run under this plan is the one that starts with this many completed steps."""


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
    ceiling_samples: FiniteFloat | None = None
    """The largest noise scale that this estimator can read now."""
    resolution: FiniteFloat | None = None
    """noise_scale over its ceiling."""
    unresolved: bool = False
    plan: BatchPlan
