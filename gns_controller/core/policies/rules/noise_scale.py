"""Grow the batch as the gradient gets noisier: the published rule, on either estimator.

    batch = kappa * noise_scale / theta^2        kappa = 1 (rank_variance), pi / 2 (split)

kappa keeps theta's meaning for the l1 norm: pure-noise plug-in readings and debiased ones differ by pi / 2 there.
Source: arXiv:2602.03001 algorithm 1. Ours: signed averages, hold while unresolved, bounds, guards in samples.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from gns_controller.core.contract import Span
from gns_controller.core.policies.base import IntervalUse, PolicyConfig, PolicyState, Proposal, Situation, hold
from gns_controller.core.statistics import MIN_SPREAD_MEASUREMENTS

KAPPA = {"rank_variance": 1.0, "split": math.pi / 2}


class NoiseScalePolicyConfig(PolicyConfig):
    """Batch = kappa * noise_scale / theta^2, floored to a reachable batch."""

    policy: Literal["noise_scale"] = "noise_scale"
    noise_tolerance: Annotated[float, Field(ge=1e-6, le=100)] = 0.6
    """theta. Smaller means larger batches. Calibrate it again for another estimator or geometry."""
    bound: Literal["estimate", "low"] = "estimate"
    """Act on the noise scale, or on the lower end of its interval of two standard errors."""
    monotone: bool = True
    """Never shrink the batch."""
    growth_cap: Annotated[float, Field(gt=1)] | None = 4.0
    """Largest factor of one growth; None: whatever the rule asks for."""
    act_on_unresolved: bool = False
    """Follow readings that their own resolution calls unresolved. The published rule does; see `published`."""

    @classmethod
    def recommended(cls, *, budget_samples: int, **changes: Any) -> Self:
        """Return the default policy of `attach`, chosen and measured in docs/evidence/policies.md.

        The split estimator's growing averages, acted on at the lower end of their interval: theta 1.6, at most
        doubling, a warmup of 5 % of the samples, 2 % between two changes, nothing in the decay of the learning rate.
        """
        recommended: dict[str, Any] = {
            "noise_tolerance": 1.6,
            "bound": "low",
            "averaging": "growing",
            "noise_beta": 0.93,
            "signal_beta": 0.93,
            "warmup": Span(samples=max(budget_samples // 20, 1)),
            "dwell": Span(samples=max(budget_samples // 48, 1)),
            "growth_cap": 2.0,
            "decay": "freeze",
        }
        return cls(**{**recommended, **changes})

    @classmethod
    def published(cls, **changes: Any) -> Self:
        """Return algorithm 1 as printed: rank_variance, theta 0.6, no caps, acting on saturated readings too."""
        return cls(**{"estimator": "rank_variance", "growth_cap": None, "act_on_unresolved": True, **changes})

    @property
    def interval_use(self) -> IntervalUse:
        """Acts on the lower end of the interval, or resolves split readings by it, or does without."""
        if self.bound == "low":
            return "decision"
        return "resolution" if self.estimator == "split" and not self.act_on_unresolved else "nothing"

    def propose(self, situation: Situation) -> Proposal:
        """Return the batch that the rule asks for at this measurement."""
        smoothed, judged = situation.state.smoothed, situation.judged
        if smoothed is None:
            return hold("hold_no_reading", f"no {self.estimator} reading yet")
        noise_scale = judged.noise_scale if self.bound == "estimate" else judged.low
        kappa = KAPPA[self.estimator]
        requested = None if noise_scale is None else kappa * noise_scale / self.noise_tolerance**2
        if requested is None or noise_scale is None or (judged.unresolved and not self.act_on_unresolved):
            because = unresolved_clause(situation.state)
            if judged.noise_scale is not None and not judged.unresolved:
                because = f"the noise scale has no lower end before {MIN_SPREAD_MEASUREMENTS} measurements"
            return hold("hold_unresolved", because, requested)
        whose = f" of {smoothed.group}" if self.aggregation == "max" else ""
        which = "noise scale" if self.bound == "estimate" else "lower bound of the noise scale"
        rule = f"{which} {noise_scale:.4g}{whose} * {kappa:.4g} / {self.noise_tolerance:g}^2 asks for {requested:.4g}"
        return Proposal(requested, "grow" if requested >= situation.batch_size else "shrink", rule, requested)


def unresolved_clause(state: PolicyState) -> str:
    """Return the reason why the averages resolve nothing yet, as a clause."""
    smoothed = state.smoothed
    if smoothed is not None and not smoothed.signal_sq.mean > 0:
        return f"signal {smoothed.signal_sq.mean:.3g} after {smoothed.signal_sq.count} measurements is not positive"
    if smoothed is None or smoothed.estimator == "rank_variance":
        return "the reading sits at its pure-noise ceiling: the noise scale is at least about this batch"
    signal = smoothed.signal_sq
    if signal.count < MIN_SPREAD_MEASUREMENTS:
        return f"{signal.count} of the {MIN_SPREAD_MEASUREMENTS} measurements that a standard error needs"
    if not math.isfinite(signal.standard_error):
        return "with signal_beta 0 there is one measurement in the average, and no standard error"
    return (
        f"signal {signal.mean:.3g} +- {signal.standard_error:.2g} after {signal.count} measurements "
        "cannot be told from noise"
    )
