"""The base of all policies: settings, memory, facts of the run, proposals.

One step of the fold is adopt -> observe -> propose (the policy) -> guard -> conclude. No policy is named here: each
declares in its own class what it needs, what it cannot steer, and what it proposes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from gns_controller.core.aggregation import Aggregation
from gns_controller.core.batch_arithmetic import BatchGrid, BatchRules, LearningRateCoupling
from gns_controller.core.contract import (
    BatchPlan,
    Count,
    Direction,
    Estimator,
    FiniteFloat,
    FrozenModel,
    Geometry,
    NoiseScaleMeasurement,
    PositiveCount,
    Reason,
    Span,
)
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.statistics import Judgement, SignedAverage, SmoothedNoiseScale

_OF_BEFORE = frozenset({"timed_steps", "timed_seconds"})


class Guards(FrozenModel):
    """What stands between any policy's wish and the batch. Unset guards do nothing; lengths are best in samples."""

    warmup: Span | None = None
    """Measured but not acted on; usually as long as the learning-rate warmup."""
    dwell: Span | None = None
    """Least distance between two batch changes."""
    deadband: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Changes of less than this share of the present batch are not worth it."""
    monotone: bool = False
    """Never shrink the batch."""
    hysteresis: Annotated[float, Field(ge=1, le=1e6)] = 1.0
    """Not monotone: shrink only once the wish is below the present batch divided by this."""
    growth_cap: Annotated[float, Field(gt=1)] | None = None
    """Largest factor of one growth."""
    samples_per_doubling: PositiveCount | None = None
    """Largest growth per sample: since the last change the batch may double once per so many samples."""
    integer_factors: bool = False
    """Change by whole factors only, for data loaders whose order depends on it."""
    min_steps_left: PositiveCount | None = None
    """Never grow to a batch that leaves fewer optimizer steps than this to the end of the budget."""
    minimum_batch_size: PositiveCount | None = None
    """Never below this many samples."""
    maximum_batch_size: PositiveCount | None = None
    """Never beyond this many samples."""
    decay: Literal["follow", "discount", "freeze"] = "follow"
    """Once the learning rate is below `decay_below` of its peak, noise scales rise although a larger batch does not
    pay more. follow: act on them all the same. discount: multiply what is asked for by rate / (decay_below * peak).
    freeze: do not grow."""
    decay_below: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the peak learning rate where the decay phase begins."""


IntervalUse = Literal["nothing", "resolution", "decision"]
"""Use that a policy makes of the interval around the averaged noise scale. resolution: without an interval nothing is
resolved, and the policy holds. decision: it also acts on one end of the interval."""


class PolicyNeeds(NamedTuple):
    """Measurements that a policy cannot do without, besides noise and signal."""

    progress_curve: bool = False
    """Progress at two sub-batch sizes: a quarter and a half of the batch."""
    inner_products: bool = False
    """Variance of the per-sample inner products with the mean gradient, in the euclidean norm."""


class PolicyConfig(Guards):
    """Base of all policies: guards, the readings to average, and what a policy declares about itself.

    A policy is one class derived from this one, with a field `policy` whose only value is its name, and `propose`.
    """

    if TYPE_CHECKING:  # each policy declares it, last, as a literal of its own name
        policy: str

    open_loop: ClassVar[bool] = False
    """True for a policy that proposes without readings, too; others hold after a measurement that has none for them."""
    needs: ClassVar[PolicyNeeds] = PolicyNeeds()
    """Measurements that the policy cannot do without."""

    estimator: Estimator = "split"
    """Which estimator's readings to follow."""
    direction: Direction = "gradient"
    """Follow readings of the gradient, or of the update that momentum makes of it."""
    geometry: Geometry | None = None
    """Follow readings of this geometry only; None: any, each group in its own."""
    aggregation: Aggregation = "matrices_only"
    """What becomes of several matching readings. matrices_only takes the first, which is the optimizer's matrices."""
    correct_few_groups: bool = False
    """rank_variance in the sign geometry: take the bias out of the root of a variance of few groups, so that another
    number of ranks reads the same. False: as published."""
    averaging: Literal["exponential", "growing"] = "exponential"
    """exponential: the first reading starts the averages and fades slowly, as in the recorded runs of the published
    method. growing: about the last quarter of the readings so far counts, until the betas allow no more."""
    noise_beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Weight of the past in the average of noise_sq, per measurement."""
    signal_beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Weight of the past in the average of signal_sq, per measurement."""

    @property
    def interval_use(self) -> IntervalUse:
        """Use that the policy, with these settings, makes of the interval around the noise scale."""
        return "nothing"

    @property
    def follows_schedule(self) -> bool:
        """True where decisions depend on the decay of the learning rate."""
        return self.decay != "follow"

    def check(self, facts: RunFacts) -> None:
        """Refuse a run that this policy cannot steer.

        Here the coupling "seesaw" is refused, which belongs to a policy that trades the decay of the learning rate for
        batch. A policy that makes this trade replaces the method; one with limits of its own extends it.

        Raises:
            InvalidInputError: the policy cannot steer the run; the message gives the reason and a way out.
        """
        for setting, coupling in facts.couplings.items():
            if coupling == "seesaw":
                raise InvalidInputError(
                    f"{setting}='seesaw' belongs to the policy decay_to_ramp; other ramps want 'sqrt'."
                )

    def propose(self, situation: Situation) -> Proposal:
        """Return the batch that the policy asks for after one measurement, before guards.

        Pure: no clock, no randomness, no files, no network, and nothing remembered but what `situation.state` holds.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement propose.")


class ProgressAverage(FrozenModel):
    """First-order progress of a batch of this size, averaged over measurements."""

    samples: Annotated[float, Field(gt=0)]
    progress: SignedAverage


@dataclass(frozen=True, slots=True)
class StepTiming:
    """How long an optimizer step takes at one batch. A dataclass: one is made per measurement, see SignedAverage."""

    global_batch_size: PositiveCount
    step_seconds: FiniteFloat
    """Average over the reports, the last ten or so weighing most."""
    num_reports: PositiveCount


class PolicyState(FrozenModel):
    """Everything a policy remembers between two measurements."""

    plan: BatchPlan
    smoothed: SmoothedNoiseScale | None = None
    """The averages that the policy follows."""
    groups: tuple[SmoothedNoiseScale, ...] = ()
    """aggregation "max" only: the averages of each group; `smoothed` is one of them."""
    curve: tuple[ProgressAverage, ...] = ()
    """Progress at sub-batches of the present batch, ascending in samples. Begins anew when the batch changes: at
    another batch nothing is known of it."""
    num_measurements: Count = 0
    changed_at_step: Count = 0
    """optimizer_step of the last batch change."""
    changed_at_samples: Count = 0
    """samples_seen at the last batch change."""
    peak_schedule_factor: FiniteFloat = 0.0
    """Largest schedule_factor so far."""
    timings: tuple[StepTiming, ...] = ()
    """Ascending in batch, the smallest 32."""
    last_step: Count = 0
    """optimizer_step of the last measurement."""
    data_parallel_size: PositiveCount | None = None
    """Ranks of the last measurement; `timings` are theirs."""
    seconds_saved: FiniteFloat | None = None
    """Time that the batch of the start would have taken for the same samples, less the time taken; measuring left out.
    None until a step of that batch was timed; where none was on the present ranks nothing is added."""

    @model_validator(mode="before")
    @classmethod
    def _without_the_times_of_before(cls, document: Any) -> Any:
        """States were stored with totals of all timed steps, from which no saving follows."""
        if isinstance(document, dict) and not _OF_BEFORE.isdisjoint(document):
            return {name: value for name, value in document.items() if name not in _OF_BEFORE}
        return document


class RunFacts(NamedTuple):
    """Facts of a run that no measurement holds."""

    rules: BatchRules
    budget_samples: int | None = None
    tokens_per_sample: int | None = None

    @property
    def couplings(self) -> dict[str, LearningRateCoupling]:
        """Setting -> coupling of the learning rate, the common one and those of single optimizers."""
        couplings = {"learning_rate_coupling": self.rules.learning_rate_coupling}
        for name, rule in self.rules.optimizer_couplings.items():
            couplings[f"optimizer_couplings[{name!r}]"] = rule
        return couplings


class Situation(NamedTuple):
    """Input of a policy's proposal: its memory, the measurement, the averages as judged, the facts of the run."""

    state: PolicyState
    measurement: NoiseScaleMeasurement
    judged: Judgement
    facts: RunFacts

    @property
    def batch_size(self) -> int:
        """The present batch, samples."""
        return self.state.plan.global_batch_size

    @property
    def grid(self) -> BatchGrid:
        """The batches that the present ranks can make."""
        return self.facts.rules.grid(data_parallel_size=self.measurement.data_parallel_size)

    @property
    def decay(self) -> float:
        """Scheduled learning rate over the largest it has been, 1 during the warmup; NaN where it is not finite."""
        peak, factor = self.state.peak_schedule_factor, self.measurement.schedule_factor
        if not math.isfinite(factor):
            return math.nan
        return min(max(factor / peak, 0.0), 1.0) if peak > 0 else 1.0


class Proposal(NamedTuple):
    """The batch that a policy asks for, before guards and the ranks' arithmetic."""

    batch_size: float | None
    """Samples asked for; None: keep the present batch."""
    reason: Reason
    """Why; for a batch_size, the reason if that batch is taken."""
    because: str
    """The numbers behind it, as a clause that follows a colon, without a full stop."""
    requested_batch_size: float | None = None
    """What the rule asked for before limits, where that is a number."""
    round_up: bool = False
    """To the next reachable batch above; else below."""


def hold(reason: Reason, because: str, requested_batch_size: float | None = None) -> Proposal:
    """Keep the present batch."""
    return Proposal(None, reason, because, requested_batch_size)
