"""Guards: what stands between any policy's wish and the batch, each with a reason of its own.

They are asked in one order, and the last one that changes the wish gives the reason: warmup, decay, monotone,
hysteresis, dwell, growth cap, growth per sample, budget, minimum, maximum, whole factors, deadband.
"""

from __future__ import annotations

import math

from gns_controller.core.batch_arithmetic import BatchRules, floor_to_reachable, next_reachable
from gns_controller.core.policies.frame import Guards, Proposal, Situation, hold

LARGEST_BATCH_SIZE = 2**40
"""A signal near zero asks for more samples than numbers can count; more than anybody has is enough."""


def guarded(guards: Guards, situation: Situation, proposal: Proposal) -> Proposal:
    """The proposal after all guards; its batch_size, if any, is reachable and differs from the present batch."""
    state, measurement, _, facts = situation
    current, wish = situation.batch_size, proposal.requested_batch_size
    if proposal.reason in ("hold", "hold_no_reading", "hold_not_finite", "override") and proposal.batch_size is None:
        return proposal
    if guards.warmup and not guards.warmup.passed(steps=measurement.optimizer_step, samples=measurement.samples_seen):
        return hold("warmup", "warming up, measured but not acted on", wish)
    if proposal.batch_size is None:
        return proposal
    wanted, reason, because = proposal.batch_size, proposal.reason, proposal.because
    if not math.isfinite(wanted):
        return hold("hold_unresolved", f"{because}, which is no number", wish)
    wanted = min(max(wanted, 0.0), float(LARGEST_BATCH_SIZE))

    if guards.decay != "follow" and situation.decay < guards.decay_below and wanted > current:
        where = f"the learning rate is at {situation.decay:.0%} of its peak"
        if guards.decay == "freeze":
            return hold("hold_decay", f"{because}, but {where}: noise scales rise there and growth pays no more", wish)
        wanted *= situation.decay / guards.decay_below
        because = f"{because}, discounted to {wanted:.4g} because {where}"
        if wanted <= current:
            return hold("hold_decay", because, wish)
    if wanted < current:
        if guards.monotone:
            return hold("hold_monotone", f"{because}, and this run never shrinks", wish)
        if wanted * guards.hysteresis > current:
            return hold("hold_hysteresis", f"{because}, not yet below {current} / {guards.hysteresis:g}", wish)
    if guards.dwell and not guards.dwell.passed(
        steps=measurement.optimizer_step - state.changed_at_step,
        samples=measurement.samples_seen - state.changed_at_samples,
    ):
        return hold("hold_dwell", f"{because}, too soon after the last change", wish)

    if guards.growth_cap is not None and wanted > guards.growth_cap * current:
        wanted, reason = guards.growth_cap * current, "capped_growth"
        because = f"{because}, capped at {guards.growth_cap:g} times the present batch"
    if guards.samples_per_doubling is not None:
        doublings = max(measurement.samples_seen - state.changed_at_samples, 0) / guards.samples_per_doubling
        limit = current * 2.0 ** min(doublings, 40.0)
        if wanted > limit:
            wanted, reason = limit, "capped_rate"
            because = f"{because}, capped at {limit:.4g}: one doubling per {guards.samples_per_doubling} samples"
    if guards.min_steps_left is not None and facts.budget_samples is not None and wanted > current:
        limit = max(facts.budget_samples - measurement.samples_seen, 0) / guards.min_steps_left
        if wanted > limit:
            wanted, reason = max(limit, float(current)), "capped_budget"
            because = f"{because}, capped at {limit:.4g} so that {guards.min_steps_left} steps are left"
    least, most = guards.minimum_batch_size or 0, guards.maximum_batch_size or LARGEST_BATCH_SIZE
    if wanted < least:
        wanted, reason = float(least), "raised_to_min"
        because = f"{because}, raised to the minimum of {least}"
    if wanted > most:
        if current >= most:
            return hold("capped_max", f"{because}, and the maximum is reached", wish)
        wanted, reason = float(most), "capped_max"
        because = f"{because}, capped at the maximum of {most}"

    rules, ranks = facts.rules, measurement.data_parallel_size
    if guards.integer_factors:
        batch_size = _whole_factor(wanted, current, rules, ranks)
        if batch_size != reachable(wanted, rules, ranks, up=proposal.round_up):
            reason, because = "capped_integer_factor", f"{because}, and only whole factors are taken"
    else:
        batch_size = reachable(wanted, rules, ranks, up=proposal.round_up or wanted == least)
    if not least <= batch_size <= most:
        batch_size = reachable(most, rules, ranks, up=False) if batch_size > most else batch_size
        if not least <= batch_size <= most:
            return hold("hold_below_deadband", f"{because}, and these ranks can make no batch in between", wish)
    if batch_size == current or (batch_size < current and guards.monotone):
        kept = "hold_below_deadband" if reason in ("grow", "shrink", "capped_growth", "capped_rate") else reason
        return hold(kept, because, wish)
    if abs(batch_size - current) < guards.deadband * current:
        return hold("hold_below_deadband", f"{because}, a change of less than {guards.deadband:.0%}", wish)
    return Proposal(batch_size, reason, because, wish)


def reachable(batch_size: float, rules: BatchRules, data_parallel_size: int, *, up: bool) -> int:
    """The nearest batch that these ranks can make, below or above."""
    bounded = min(max(batch_size, 0.0), LARGEST_BATCH_SIZE)
    below = floor_to_reachable(
        bounded,
        micro_batch_size=rules.micro_batch_size,
        data_parallel_size=data_parallel_size,
        micro_batch_granularity=rules.micro_batch_granularity,
    )
    if not up or below >= bounded:
        return below
    return next_reachable(
        below,
        micro_batch_size=rules.micro_batch_size,
        data_parallel_size=data_parallel_size,
        micro_batch_granularity=rules.micro_batch_granularity,
    )


def _whole_factor(wanted: float, current: int, rules: BatchRules, data_parallel_size: int) -> int:
    """The largest reachable whole multiple of the present batch up to `wanted`; below it, the largest whole part."""
    if wanted >= current:
        most = int(wanted // current)
        factors = range(most, max(most - 64, 1), -1)
        candidates = [factor * current for factor in factors]
    else:
        candidates = [current // part for part in range(2, 65) if current % part == 0 and current // part <= wanted]
    for candidate in candidates:
        if reachable(candidate, rules, data_parallel_size, up=False) == candidate:
            return candidate
    return current
