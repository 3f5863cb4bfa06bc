"""From a guarded proposal to a plan, and to a decision that explains itself."""

from __future__ import annotations

import math

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import BatchPlan, Decision
from gns_controller.core.coupling import coupled
from gns_controller.core.policies.base import PolicyState, Proposal, Situation


def plan_for(
    rules: BatchRules,
    batch_size: int,
    *,
    data_parallel_size: int,
    version: int,
    effective_step: int,
    noise_scale: float | None = None,
    previous: BatchPlan | None = None,
) -> BatchPlan:
    """A reachable batch as a plan: cut into micro-batches, coupled to learning rates and betas.

    Args:
        rules: of the run.
        batch_size: samples per optimizer step.
        data_parallel_size: ranks that share it.
        version: of the plan.
        effective_step: where it comes into force.
        noise_scale: what couplings that measure go by, samples.
        previous: the plan before; such couplings keep its factors while noise_scale is None.

    Raises:
        BatchShapeError: these ranks cannot make that batch.
    """
    shape = rules.grid(data_parallel_size=data_parallel_size).factor(batch_size)
    factor, factors, exponent = coupled(
        rules, global_batch_size=shape.global_batch_size, noise_scale=noise_scale, previous=previous
    )
    return BatchPlan(
        version=version,
        global_batch_size=shape.global_batch_size,
        micro_batch_size=shape.micro_batch_size,
        gradient_accumulation_steps=shape.gradient_accumulation_steps,
        learning_rate_factor=factor,
        optimizer_factors=factors,
        beta_exponent=exponent,
        effective_step=effective_step,
    )


def initial_plan(rules: BatchRules, *, data_parallel_size: int) -> BatchPlan:
    """Version 0: the specification's batch, in force from the first step.

    Raises:
        BatchShapeError: these ranks cannot make that batch.
    """
    return plan_for(rules, rules.global_batch_size, data_parallel_size=data_parallel_size, version=0, effective_step=0)


def conclude(
    situation: Situation, proposal: Proposal, *, policy: str, policy_revision: int
) -> tuple[PolicyState, Decision]:
    """Turn a guarded proposal into a plan and a decision."""
    state, measurement, judged, facts = situation
    previous = plan = state.plan
    if proposal.batch_size is not None:
        plan = plan_for(
            facts.rules,
            int(proposal.batch_size),
            data_parallel_size=measurement.data_parallel_size,
            version=max(previous.version, measurement.plan_version) + 1,
            effective_step=facts.rules.effective_step(measurement.optimizer_step),
            noise_scale=None if judged.unresolved else judged.noise_scale,
            previous=previous,
        )
        state = state.model_copy(
            update={
                "plan": plan,
                "changed_at_step": plan.effective_step,
                "changed_at_samples": measurement.samples_seen,
                "curve": (),
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
        reason=proposal.reason,
        explanation=f"{outcome}: {proposal.because}.",
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
