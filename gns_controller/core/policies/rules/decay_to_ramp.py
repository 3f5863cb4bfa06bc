"""Seesaw: where the schedule would lower the learning rate, grow the batch instead.

    batch = B0 * alpha^floor(log(1 / d) / log(alpha))        d: learning rate over its peak, after the peak

With a schedule over samples and the sqrt coupling this is the whole of it: lr0 * d * (B / B0)^(1/2) = lr0 * d^(1/2), so
learning rate / sqrt(batch) stays on the trajectory of the schedule. Dividing the rate a second time would be wrong.
For a schedule cos(pi t / 2T) it takes 2/pi of the steps. Source: arXiv:2510.14717.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from gns_controller.core.policies.base import PolicyConfig, Proposal, Situation, hold


class DecayToRampPolicyConfig(PolicyConfig):
    """The batch of the start over the decay of the learning rate, in steps of a factor."""

    policy: Literal["decay_to_ramp"] = "decay_to_ramp"
    alpha: Annotated[float, Field(gt=1, le=1e6)] | None = 2.0
    """The batch grows by this factor whenever the schedule has dropped by it; None: continuously."""
    up_to_noise_scale: bool = False
    """Never beyond the measured noise scale: the rule rests on gradients that are mostly noise."""
    monotone: bool = True
    """Never shrink the batch, also when the schedule warms up again."""


def propose(config: DecayToRampPolicyConfig, situation: Situation) -> Proposal:
    """The batch that the decay of the schedule stands for."""
    decay, first = situation.decay, situation.facts.rules.global_batch_size
    if math.isnan(decay):
        return hold("hold_not_finite", "the report's schedule factor is no number")
    if decay <= 0:
        return hold("hold", "the learning rate is zero, there is nothing left to trade")
    because = f"the schedule is at {decay:.1%} of its peak"
    batch_size = first / decay
    if config.alpha is not None:
        # The small term keeps alpha^-k itself, which no float64 can be trusted to hit, on the far side.
        drops = math.floor(-math.log(decay) / math.log(config.alpha) + 1e-9)
        batch_size = first * config.alpha ** min(drops, 2000 / math.log(config.alpha) / 3)
        because = f"{because}, {drops} drops by {config.alpha:g}"
    if config.up_to_noise_scale and batch_size > situation.batch_size:
        judged = situation.judged
        if judged.unresolved or judged.noise_scale is None:
            return hold("hold_unresolved", f"{because}, but no noise scale is resolved to go up to", batch_size)
        if judged.noise_scale < batch_size:
            because = f"{because}, no further than the noise scale of {judged.noise_scale:.4g}"
            wanted = max(judged.noise_scale, float(situation.batch_size))
            return Proposal(wanted, "capped_max", because, batch_size)
    return Proposal(batch_size, "grow", because, batch_size)
