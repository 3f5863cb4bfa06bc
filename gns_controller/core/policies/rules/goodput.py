"""The batch that makes the most progress for its price: measured speed times statistical efficiency.

    seconds of a step      t(B) = t0 + t1 B                      fitted to the step times at the batches so far
    steps needed           ~ 1 + phi / B                         phi = kappa * noise scale in the optimizer's norm
    price of the run       ~ (1 + phi / B) (t0 + (t1 + c) B)     c: what a sample is worth, in seconds
    optimum                B = sqrt(phi t0 / (t1 + c))

Progress of a step goes like ||grad L||^2 / (1 + phi / B) in every norm. kappa = pi / 2 for debiased readings where a
step follows signs or orthogonal factors, because E|<p(g), G>| of a noisy p holds it; 1 in the euclidean norm, and for
rank_variance. With c = 0 wall time alone counts; a large c counts samples alone, and never grows. The optimum over
reachable batches is taken, and only if it is better than the present batch by `min_improvement`, as AdaptDL does.
Source: Pollux (OSDI 2021) equations 4 and 6; arXiv:1812.06162. Ours: the norm, the price, holding while unresolved.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from gns_controller.core.policies.base import IntervalUse, PolicyConfig, Proposal, Situation, StepTiming, hold
from gns_controller.core.policies.guards import LARGEST_BATCH_SIZE, reachable
from gns_controller.core.policies.rules.noise_scale import KAPPA, unresolved_clause


class GoodputPolicyConfig(PolicyConfig):
    """The cheapest reachable batch at the stated price."""

    policy: Literal["goodput"] = "goodput"
    sample_price_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """c: what one training sample is worth, in seconds of the whole job, besides the time it takes."""
    step_overhead_samples: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """t0 / (t1 + c), stated instead of measured: how many samples cost as much as the fixed part of a step."""
    explore_factor: Annotated[float, Field(gt=1, le=16)] | None = 2.0
    """While only one batch was timed, grow once by this factor to learn t0, if the noise scale is above the batch.
    None: hold."""
    min_improvement: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Least predicted saving of price that is worth a change."""
    monotone: bool = True
    growth_cap: Annotated[float, Field(gt=1)] | None = 4.0

    @property
    def interval_use(self) -> IntervalUse:
        """Split readings are resolved by the interval, rank_variance readings by their ceiling."""
        return "resolution" if self.estimator == "split" else "nothing"

    def propose(self, situation: Situation) -> Proposal:
        """Return the cheapest reachable batch, or one exploring growth."""
        # Noise scale in the optimizer's norm.
        state, judged, current = situation.state, situation.judged, situation.batch_size
        if state.smoothed is None:
            return hold("hold_no_reading", f"no {self.estimator} reading yet")
        if judged.unresolved or judged.noise_scale is None:
            return hold("hold_unresolved", unresolved_clause(state))
        kappa = 1.0 if state.smoothed.geometry == "euclidean" else KAPPA[self.estimator]
        phi = min(kappa * judged.noise_scale, float(LARGEST_BATCH_SIZE))
        # Fixed part of a step: stated, or fitted to the step times so far, or explored once.
        overhead = self.step_overhead_samples
        if overhead is None:
            cost = fitted_cost(state.timings)
            if cost is None:
                # Once: after an exploring growth nothing happens until steps are timed there.
                is_timed = any(timing.global_batch_size == current for timing in state.timings)
                if self.explore_factor is None or not is_timed or phi <= current:
                    return hold("hold", "steps were not timed at two batches yet, their fixed part is not known")
                wanted = self.explore_factor * current
                return Proposal(wanted, "grow", f"one growth by {self.explore_factor:g} to time steps there", wanted)
            per_sample = cost.per_sample_seconds + self.sample_price_seconds
            overhead = cost.fixed_seconds / per_sample if per_sample > 0 else math.inf
        if overhead == math.inf:
            return hold(
                "hold", "steps take the same time at every batch, and samples cost nothing: there is no optimum"
            )
        # The cheapest of the reachable batches beside the optimum, where it is worth a change.
        overhead = min(overhead, float(LARGEST_BATCH_SIZE))
        optimum = math.sqrt(phi * overhead)
        candidates = {reachable(optimum, situation.grid, up=up) for up in (False, True)}
        best = min(candidates, key=lambda batch: price(batch, noise_scale=phi, overhead_samples=overhead))
        saving = 1 - price(best, noise_scale=phi, overhead_samples=overhead) / price(
            current, noise_scale=phi, overhead_samples=overhead
        )
        because = (
            f"sqrt(noise scale {phi:.4g} * step overhead {overhead:.4g} samples) = {optimum:.4g}, {saving:.1%} cheaper"
        )
        if best != current and saving < self.min_improvement:
            return hold("hold_below_deadband", f"{because}, less than {self.min_improvement:.0%}", optimum)
        return Proposal(float(best), "grow" if best >= current else "shrink", because, optimum)


class StepCost(NamedTuple):
    """Seconds of a step: fixed + per_sample * batch."""

    fixed_seconds: float
    per_sample_seconds: float


def fitted_cost(timings: tuple[StepTiming, ...]) -> StepCost | None:
    """Least squares of relative errors over the batches that were timed; None with fewer than two.

    Weighted by 1 / t^2, so that 5 % of a short step counts as much as 5 % of a long one. Neither part is negative.
    """
    if len(timings) < 2:
        return None
    # minimise sum ((t0 + t1 B) / t - 1)^2: two normal equations
    rows = [(1 / timing.step_seconds, timing.global_batch_size / timing.step_seconds) for timing in timings]
    aa = math.fsum(a * a for a, _ in rows)
    ab = math.fsum(a * b for a, b in rows)
    bb = math.fsum(b * b for _, b in rows)
    sum_a, sum_b = math.fsum(a for a, _ in rows), math.fsum(b for _, b in rows)
    determinant = aa * bb - ab * ab
    if not determinant > 1e-12 * aa * bb:
        return None
    fixed = (sum_a * bb - sum_b * ab) / determinant
    per_sample = (sum_b * aa - sum_a * ab) / determinant
    if fixed < 0:
        return StepCost(fixed_seconds=0.0, per_sample_seconds=sum_b / bb)
    if per_sample < 0:
        return StepCost(fixed_seconds=sum_a / aa, per_sample_seconds=0.0)
    return StepCost(fixed_seconds=fixed, per_sample_seconds=per_sample)


def price(batch_size: float, *, noise_scale: float, overhead_samples: float) -> float:
    """(1 + phi / B) (overhead + B): of the whole run, up to a constant factor. Samples."""
    return (1 + noise_scale / batch_size) * (overhead_samples + batch_size)
