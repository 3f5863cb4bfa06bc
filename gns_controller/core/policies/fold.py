"""The frame that all policies share: state, smoothing, limits of the hardware, and the decision's sentence.

One step of the fold is adopt -> observe -> propose (the policy) -> conclude. Nothing here knows a policy by name.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

from pydantic import Field

from gns_controller.core.aggregation import Aggregation, summed, weighted_by_learning_rate
from gns_controller.core.batch_arithmetic import BatchRules, factor_batch, floor_to_reachable
from gns_controller.core.contract import (
    BatchPlan,
    Count,
    Decision,
    Direction,
    Estimator,
    FrozenModel,
    Geometry,
    GroupReading,
    NoiseScaleMeasurement,
    Reason,
)
from gns_controller.core.coupling import learning_rate_factor
from gns_controller.core.smoothing import Judgement, SmoothedNoiseScale

LARGEST_BATCH_SIZE = 2**40
"""A signal near zero asks for more samples than numbers can count; more than anybody has is enough."""


class PolicyConfig(FrozenModel):
    """What every policy is told: which readings to average, and how. Also what the dashboards then show."""

    estimator: Estimator = "split"
    """Which estimator's readings to follow."""
    direction: Direction = "gradient"
    """Follow readings of the gradient, or of the update that momentum makes of it."""
    geometry: Geometry | None = None
    """Follow readings of this geometry only; None: any."""
    aggregation: Aggregation = "matrices_only"
    """What becomes of several matching readings. matrices_only takes the first, which is the optimizer's matrices."""
    correct_few_groups: bool = False
    """rank_variance in the sign geometry: take the bias out of the root of a variance of few groups, so that another
    number of ranks reads the same. False: as published."""
    noise_beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Weight of the past in the average of noise_sq, per measurement."""
    signal_beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Weight of the past in the average of signal_sq, per measurement."""


class PolicyState(FrozenModel):
    """Everything a policy remembers between two measurements."""

    plan: BatchPlan
    smoothed: SmoothedNoiseScale | None = None
    """What the policy follows."""
    groups: tuple[SmoothedNoiseScale, ...] = ()
    """aggregation "max" only: the averages of each group; `smoothed` is one of them."""
    num_measurements: Count = 0
    changed_at_step: Count = 0
    """optimizer_step of the last batch change."""
    changed_at_samples: Count = 0
    """samples_seen at the last batch change."""


class Proposal(NamedTuple):
    """What a policy wants, before the ranks' arithmetic."""

    batch_size: float | None
    """Samples asked for; None: keep the present batch."""
    reason: Reason
    """Why; for a batch_size, the reason if that batch is taken."""
    because: str
    """The numbers behind it, as a clause that follows a colon."""
    requested_batch_size: float | None = None
    """What the rule asked for before limits, where that is a number."""


def plan_for(
    rules: BatchRules, batch_size: int, *, data_parallel_size: int, version: int, effective_step: int
) -> BatchPlan:
    """A reachable batch as a plan: cut into micro-batches, coupled to the learning rate.

    Raises:
        BatchShapeError: these ranks cannot make that batch.
    """
    shape = factor_batch(
        batch_size,
        micro_batch_size=rules.micro_batch_size,
        data_parallel_size=data_parallel_size,
        micro_batch_granularity=rules.micro_batch_granularity,
    )
    return BatchPlan(
        version=version,
        global_batch_size=shape.global_batch_size,
        micro_batch_size=shape.micro_batch_size,
        gradient_accumulation_steps=shape.gradient_accumulation_steps,
        learning_rate_factor=learning_rate_factor(
            rules.learning_rate_coupling,
            global_batch_size=shape.global_batch_size,
            initial_batch_size=rules.global_batch_size,
        ),
        effective_step=effective_step,
    )


def initial_plan(rules: BatchRules, *, data_parallel_size: int) -> BatchPlan:
    """Version 0: the specification's batch, in force from the first step.

    Raises:
        BatchShapeError: these ranks cannot make that batch.
    """
    return plan_for(rules, rules.global_batch_size, data_parallel_size=data_parallel_size, version=0, effective_step=0)


def adopt(state: PolicyState, measurement: NoiseScaleMeasurement, *, rules: BatchRules) -> PolicyState:
    """Believe the trainer about the batch that is in force.

    The plan that should be in force by now may not be: the trainer decided alone during an outage, an operator
    pinned another batch, or the world size changed on a restart.
    """
    plan = state.plan
    in_force = (plan.global_batch_size, plan.micro_batch_size, plan.gradient_accumulation_steps)
    reported = (
        measurement.global_batch_size,
        measurement.micro_batch_size,
        measurement.gradient_accumulation_steps,
    )
    if measurement.optimizer_step < plan.effective_step or reported == in_force:
        return state
    measured = BatchPlan(
        version=max(plan.version, measurement.plan_version),
        global_batch_size=measurement.global_batch_size,
        micro_batch_size=measurement.micro_batch_size,
        gradient_accumulation_steps=measurement.gradient_accumulation_steps,
        learning_rate_factor=learning_rate_factor(
            rules.learning_rate_coupling,
            global_batch_size=measurement.global_batch_size,
            initial_batch_size=rules.global_batch_size,
        ),
        effective_step=measurement.optimizer_step,
    )
    if measurement.global_batch_size == plan.global_batch_size:
        return state.model_copy(update={"plan": measured})
    return state.model_copy(
        update={
            "plan": measured,
            "changed_at_step": measurement.optimizer_step,
            "changed_at_samples": measurement.samples_seen,
        }
    )


def followed_readings(config: PolicyConfig, measurement: NoiseScaleMeasurement) -> list[GroupReading]:
    """What this policy's averages are made of: one reading, after aggregation; one of each group for "max"; or none."""
    found = []
    for reading in measurement.readings:
        if reading.estimator != config.estimator or reading.direction != config.direction:
            continue
        if config.geometry is not None and reading.geometry != config.geometry:
            continue
        found.append(reading.corrected_for_few_groups() if config.correct_few_groups else reading)
        if config.aggregation == "matrices_only":
            break
    if not found or config.aggregation in ("matrices_only", "max"):
        return found
    # With the parts' names: where another set of layers is measured, averages start again.
    name = f"{config.aggregation}: {' + '.join(reading.group for reading in found)}"[:200]
    if config.aggregation == "sum_of_norms":
        return [summed(found, group=name)]
    weighted = weighted_by_learning_rate(found, group=name)
    return [] if weighted is None else [weighted]


def observe(config: PolicyConfig, state: PolicyState, measurement: NoiseScaleMeasurement) -> tuple[PolicyState, Reason]:
    """Update the averages. The reason is "hold" where there was something to learn, else why there was not."""
    readings = followed_readings(config, measurement)
    if not readings:
        return state, "hold_no_reading"
    if not all(reading.is_finite for reading in readings):
        return state, "hold_not_finite"
    groups: tuple[SmoothedNoiseScale, ...] = ()
    if config.aggregation == "max":
        before = {average.group: average for average in state.groups}
        groups = tuple(_averaged(config, before.get(reading.group), reading) for reading in readings)
        smoothed = _largest(groups)
    else:
        smoothed = _averaged(config, state.smoothed, readings[0])
    learned = {"smoothed": smoothed, "groups": groups, "num_measurements": state.num_measurements + 1}
    return state.model_copy(update=learned), "hold"


def _averaged(config: PolicyConfig, before: SmoothedNoiseScale | None, reading: GroupReading) -> SmoothedNoiseScale:
    if before is None or not before.continues_with(reading, corrected=config.correct_few_groups):
        return SmoothedNoiseScale.started_by(reading, corrected=config.correct_few_groups)
    return before.updated(reading, noise_beta=config.noise_beta, signal_beta=config.signal_beta)


def _largest(groups: tuple[SmoothedNoiseScale, ...]) -> SmoothedNoiseScale:
    """The largest noise scale of those resolved, else of those unresolved; the first of equals."""

    def rank(average: SmoothedNoiseScale) -> tuple[bool, float]:
        judged = average.judged()
        return not judged.unresolved, judged.noise_scale or 0.0

    return max(groups, key=rank)


def conclude(
    state: PolicyState,
    measurement: NoiseScaleMeasurement,
    proposal: Proposal,
    judged: Judgement,
    *,
    rules: BatchRules,
    policy: str,
    policy_revision: int,
) -> tuple[PolicyState, Decision]:
    """Turn a proposal into a reachable plan and a decision that explains itself."""
    previous = state.plan
    reason, plan = proposal.reason, previous
    if proposal.batch_size is not None and math.isfinite(proposal.batch_size):
        reachable = floor_to_reachable(
            min(max(proposal.batch_size, 0.0), LARGEST_BATCH_SIZE),
            micro_batch_size=rules.micro_batch_size,
            data_parallel_size=measurement.data_parallel_size,
            micro_batch_granularity=rules.micro_batch_granularity,
        )
        if reachable == previous.global_batch_size:
            reason = "hold_below_deadband" if reason in ("grow", "shrink", "capped_growth") else reason
        else:
            plan = plan_for(
                rules,
                reachable,
                data_parallel_size=measurement.data_parallel_size,
                version=max(previous.version, measurement.plan_version) + 1,
                effective_step=measurement.optimizer_step + rules.decision_delay_steps,
            )
            state = state.model_copy(
                update={
                    "plan": plan,
                    "changed_at_step": plan.effective_step,
                    "changed_at_samples": measurement.samples_seen,
                }
            )
    before, after = previous.global_batch_size, plan.global_batch_size
    outcome = f"Keep {before} samples" if after == before else f"{before} -> {after} samples"
    smoothed = state.smoothed
    decision = Decision(
        attempt=measurement.attempt,
        optimizer_step=measurement.optimizer_step,
        samples_seen=measurement.samples_seen,
        policy=policy,
        policy_revision=policy_revision,
        reason=reason,
        explanation=f"{outcome}: {proposal.because}",
        previous_batch_size=before,
        requested_batch_size=_finite_or_none(proposal.requested_batch_size),
        noise_sq=smoothed.noise_sq.mean if smoothed else None,
        signal_sq=smoothed.signal_sq.mean if smoothed else None,
        noise_scale=judged.noise_scale,
        noise_scale_low=judged.low,
        noise_scale_high=judged.high,
        ceiling_samples=judged.ceiling_samples,
        resolution=judged.resolution,
        unresolved=judged.unresolved,
        plan=plan,
    )
    return state, decision


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
