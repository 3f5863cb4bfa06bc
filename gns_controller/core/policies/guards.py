"""Guards: what stands between any policy's wish and the batch, each with a reason of its own.

They are asked in one order, and the last one that changes the wish gives the reason: warmup, decay, monotone,
hysteresis, dwell; the lowest of growth cap, growth per sample and budget; minimum, maximum, whole factors, deadband.
Neither rounding nor the minimum lifts a growth above the caps, and where no batch is left between them the run holds.
A batch above the maximum is a wish for the maximum, whatever the policy has to say, unless it never shrinks.
"""

from __future__ import annotations

import math

from gns_controller.core.batch_arithmetic import BatchGrid
from gns_controller.core.contract import Reason
from gns_controller.core.policies.base import Guards, Proposal, Situation, hold

LARGEST_BATCH_SIZE = 2**40
"""A signal near zero asks for more samples than numbers can count; more than anybody has is enough."""

_MAX_PARTS = 64
"""Whole parts of the present batch that are tried when it shrinks."""


def guarded(guards: Guards, situation: Situation, proposal: Proposal) -> Proposal:
    """The proposal after all guards; its batch_size, if any, is reachable and differs from the present batch."""
    measurement = situation.measurement
    current, wish = situation.batch_size, proposal.requested_batch_size
    proposal = _below_maximum(guards, current, proposal)
    if proposal.reason in ("hold", "hold_no_reading", "hold_not_finite", "override") and proposal.batch_size is None:
        return proposal
    if guards.warmup and not guards.warmup.passed(steps=measurement.optimizer_step, samples=measurement.samples_seen):
        return hold("warmup", "warming up, measured but not acted on", wish)
    if proposal.batch_size is None:
        return proposal
    wanted, reason, because = proposal.batch_size, proposal.reason, proposal.because
    if not math.isfinite(wanted):
        return hold("hold_unresolved", "what the rule asks for is no number", wish)
    wanted = min(max(wanted, 0.0), float(LARGEST_BATCH_SIZE))

    if wanted > current and _decays(guards, situation):
        where = _where(situation.decay)
        if guards.decay == "freeze" or math.isnan(situation.decay):
            return hold("hold_decay", f"{because}, but {where}: noise scales rise there and growth pays no more", wish)
        wanted *= situation.decay / guards.decay_below
        because = f"{because}, discounted to {wanted:.4g} because {where}"
        if not wanted > current:
            return hold("hold_decay", because, wish)
    held = _held(guards, situation, wanted)
    if held is not None:
        return hold(held[0], f"{because}, {held[1]}", wish)

    limit, limited_by = _growth_limit(guards, situation)
    if wanted > limit:
        wanted, reason, because = limit, limited_by, f"{because}, {_limit_clause(guards, limit, limited_by)}"
    least, most = guards.minimum_batch_size or 0, guards.maximum_batch_size or LARGEST_BATCH_SIZE
    if wanted < least:
        wanted, reason, because = float(least), "raised_to_min", f"{because}, raised to the minimum of {least}"
    if wanted > most:
        if current == most or (current > most and guards.monotone):
            return hold("capped_max", f"{because}, and the maximum is reached", wish)
        wanted, reason, because = float(most), "capped_max", f"{because}, capped at the maximum of {most}"

    # To a reachable batch that keeps these limits, or none.
    grid = situation.grid
    highest = min(limit, most)
    batch_size = _rounded(wanted, grid, least=least, highest=highest, up=proposal.round_up)
    if guards.integer_factors:
        whole = _whole_factor(wanted, grid, current=current, least=least)
        if whole != batch_size:
            batch_size, reason, because = whole, "capped_integer_factor", f"{because}, and only whole factors are taken"
    if (batch_size - current) * (wanted - current) <= 0:  # rounded to the present batch, or to its other side
        kept = "hold_below_deadband" if reason in ("grow", "shrink", "capped_growth", "capped_rate") else reason
        return hold(kept, because, wish)
    if not least <= batch_size <= highest:
        if wanted > limit:
            return hold(limited_by, f"{because}, {_limit_clause(guards, limit, limited_by)}", wish)
        return hold("hold_below_deadband", f"{because}, and these ranks can make no batch in between", wish)
    if abs(batch_size - current) < guards.deadband * current:
        return hold("hold_below_deadband", f"{because}, a change of less than {guards.deadband:.0%}", wish)
    if reason in ("grow", "shrink"):
        reason = "grow" if batch_size > current else "shrink"
    return Proposal(batch_size, reason, because, wish)


def _below_maximum(guards: Guards, current: int, proposal: Proposal) -> Proposal:
    """A batch above the maximum is brought down to it, whether or not the policy has a wish; or stays if monotone."""
    most, wanted = guards.maximum_batch_size, proposal.batch_size
    if most is None or current <= most or guards.monotone:
        return proposal
    if wanted is not None and wanted < most and wanted * guards.hysteresis <= current:
        return proposal
    because = f"{proposal.because}, but {current} is above the maximum of {most}"
    return proposal._replace(batch_size=float(most), reason="capped_max", because=because)


def _decays(guards: Guards, situation: Situation) -> bool:
    # A schedule factor that is no number counts as decay: there is no growing on what is not known.
    return guards.decay != "follow" and not situation.decay >= guards.decay_below


def _where(decay: float) -> str:
    if math.isnan(decay):
        return "the schedule's factor is no number and may have decayed"
    return f"the learning rate is at {decay:.0%} of its peak"


def _held(guards: Guards, situation: Situation, wanted: float) -> tuple[Reason, str] | None:
    state, measurement, current = situation.state, situation.measurement, situation.batch_size
    raised = max(wanted, float(guards.minimum_batch_size or 0))
    if raised < current:
        if guards.monotone:
            return "hold_monotone", "and this run never shrinks"
        if wanted * guards.hysteresis > current and current <= (guards.maximum_batch_size or current):
            return "hold_hysteresis", f"not yet below {current} / {guards.hysteresis:g}"
    bounded = min(raised, float(guards.maximum_batch_size or LARGEST_BATCH_SIZE))
    if (
        guards.dwell
        and (wanted != current or bounded != current)  # a bound changes the batch of a wish that does not
        and not guards.dwell.passed(
            steps=measurement.optimizer_step - state.changed_at_step,
            samples=measurement.samples_seen - state.changed_at_samples,
        )
    ):
        return "hold_dwell", "too soon after the last change"
    return None


def _growth_limit(guards: Guards, situation: Situation) -> tuple[float, Reason]:
    """The largest batch that growth may reach now, no less than the present one, and which guard says so."""
    state, measurement, _, facts = situation
    current = situation.batch_size
    if guards.decay == "freeze" and _decays(guards, situation):
        return float(current), "hold_decay"
    limit: float = math.inf
    limited_by: Reason = "capped_growth"
    if guards.growth_cap is not None:
        limit = guards.growth_cap * current
    if guards.samples_per_doubling is not None:
        doublings = max(measurement.samples_seen - state.changed_at_samples, 0) / guards.samples_per_doubling
        rate = current * 2.0 ** min(doublings, 40.0)
        if rate < limit:
            limit, limited_by = rate, "capped_rate"
    if guards.min_steps_left is not None and facts.budget_samples is not None:
        step = measurement.optimizer_step
        seen_there = measurement.samples_seen + (facts.rules.effective_step(step) - step) * current
        budget = float(max(facts.budget_samples - seen_there, 0) // guards.min_steps_left)
        if budget < limit:
            limit, limited_by = budget, "capped_budget"
    return max(limit, float(current)), limited_by


def _limit_clause(guards: Guards, limit: float, limited_by: Reason) -> str:
    if limited_by == "capped_growth":
        return f"capped at {guards.growth_cap:g} times the present batch"
    if limited_by == "capped_rate":
        return f"capped at {limit:.4g}: one doubling per {guards.samples_per_doubling} samples"
    if limited_by == "capped_budget":
        return f"capped at {limit:.4g} so that {guards.min_steps_left} steps are left"
    return "not while the learning rate decays"


def reachable(batch_size: float, grid: BatchGrid, *, up: bool) -> int:
    """Return the nearest batch that the ranks can make, below or above."""
    bounded = min(max(batch_size, 0.0), LARGEST_BATCH_SIZE)
    below = grid.floor(bounded)
    return below if not up or below >= bounded else grid.next(below)


def _rounded(wanted: float, grid: BatchGrid, *, least: float, highest: float, up: bool) -> int:
    """Return a reachable batch, between the two limits where such a batch exists."""
    # The small term keeps a wish that a batch meets exactly, but for its last bits, from asking for the next one.
    batch_size = reachable(wanted * (1 - 1e-13) if up else wanted, grid, up=up)
    if batch_size > highest:
        batch_size = reachable(highest, grid, up=False)
    return reachable(least, grid, up=True) if batch_size < least else batch_size


def _whole_factor(wanted: float, grid: BatchGrid, *, current: int, least: int) -> int:
    """Return the largest reachable whole multiple of the present batch up to `wanted`, or the first from `least` on.

    Below the present batch, the largest reachable whole part of it.
    """
    full_pass, finest = grid.full_pass, grid.finest
    if wanted >= current:
        coarse, fine = math.lcm(current, full_pass), math.lcm(current, finest)
        largest = max(int(wanted // coarse) * coarse, int(min(wanted, full_pass - 1) // fine) * fine, current)
        if largest >= least:
            return largest
        above = -(-least // fine) * fine
        return above if above < full_pass else -(-least // coarse) * coarse
    first = max(math.ceil(current / max(wanted, finest)), 2)
    for part in range(first, first + _MAX_PARTS):
        candidate = current // part
        if current % part == 0 and reachable(candidate, grid, up=False) == candidate:
            return candidate
    return current
