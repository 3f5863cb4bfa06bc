"""Seesaw: where the schedule would lower the learning rate, grow the batch instead.

    batch = B0 * alpha^floor(log(1 / d) / log(alpha))        d: learning rate over its peak, after the peak

With a schedule over samples and the sqrt coupling this is the whole of it: lr0 * d * (B / B0)^(1/2) = lr0 * d^(1/2), so
learning rate / sqrt(batch) stays on the trajectory of the schedule. Dividing the rate a second time would be wrong.
For a schedule cos(pi t / 2T) it takes 2/pi of the steps. Source: arXiv:2510.14717.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies.base import PolicyConfig, Proposal, RunFacts, Situation, hold


class DecayToRampPolicyConfig(PolicyConfig):
    """The batch of the start over the decay of the learning rate, in steps of a factor."""

    open_loop: ClassVar[bool] = True
    policy: Literal["decay_to_ramp"] = "decay_to_ramp"
    alpha: Annotated[float, Field(gt=1, le=1e6)] | None = 2.0
    """The batch grows by this factor whenever the schedule has dropped by it; None: continuously."""
    up_to_noise_scale: bool = False
    """Never beyond the measured noise scale: the rule rests on gradients that are mostly noise."""
    monotone: bool = True
    """Never shrink the batch, also when the schedule warms up again."""

    @property
    def follows_schedule(self) -> bool:
        """True: the decay of the learning rate is what the batch follows."""
        return True

    def check(self, facts: RunFacts) -> None:
        """Refuse guards under which the batch never grows, and couplings that are another trade than the policy's.

        Raises:
            InvalidInputError: growth would begin in a decay that the guard takes back, or a coupling is neither sqrt
                nor seesaw.
        """
        if self.decay != "follow":
            first = 1.0 if self.alpha is None else 1 / self.alpha
            if first < self.decay_below or self.decay_below == 1:
                raise InvalidInputError(
                    f"decay_to_ramp grows from {first:.3g} of the peak rate down, and decay={self.decay!r} takes "
                    f"growth back below {self.decay_below:g} of it: it would never ramp. Use decay='follow', with a "
                    "maximum_batch_size, or a lower decay_below."
                )
        for setting, coupling in facts.couplings.items():
            if coupling not in ("sqrt", "seesaw"):
                raise InvalidInputError(
                    f"decay_to_ramp trades decay for batch along lr / sqrt(batch); {setting}={coupling!r} "
                    "would be another trade. Use 'sqrt' or 'seesaw'."
                )

    def propose(self, situation: Situation) -> Proposal:
        """Return the batch that the decay of the schedule stands for."""
        decay, first = situation.decay, situation.facts.rules.global_batch_size
        if math.isnan(decay):
            return hold("hold_not_finite", "the report's schedule factor is no number")
        if decay <= 0:
            return hold("hold", "the learning rate is zero, there is nothing left to trade")
        because = f"the schedule is at {decay:.1%} of its peak"
        batch_size = first / decay
        if self.alpha is not None:
            # The small term keeps alpha^-k itself, which no float64 can be trusted to hit, on the far side.
            drops = math.floor(-math.log(decay) / math.log(self.alpha) + 1e-9)
            batch_size = first * self.alpha ** min(drops, 2000 / math.log(self.alpha) / 3)
            because = f"{because}, {drops} drops by {self.alpha:g}"
        if self.up_to_noise_scale and batch_size > situation.batch_size:
            judged = situation.judged
            if judged.unresolved or judged.noise_scale is None:
                return hold("hold_unresolved", f"{because}, but no noise scale is resolved to go up to", batch_size)
            if judged.noise_scale < batch_size:
                because = f"{because}, no further than the noise scale of {judged.noise_scale:.4g}"
                wanted = max(judged.noise_scale, float(situation.batch_size))
                return Proposal(wanted, "capped_max", because, batch_size)
        return Proposal(batch_size, "grow", because, batch_size)
