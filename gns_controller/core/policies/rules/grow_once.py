"""Hold, grow once at a stated share of the samples, hold.

In branched tests on small runs the price of a saved step was lowest when growth waited for about 40 % of the samples
(docs/evidence/policies.md); most published ramps have one or two growths, too.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gns_controller.core.policies.base import PolicyConfig, Proposal, Situation, hold


class GrowOncePolicyConfig(PolicyConfig):
    """One growth by a stated factor."""

    open_loop: ClassVar[bool] = True
    policy: Literal["grow_once"] = "grow_once"
    at_share: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Share of the budget in samples after which the batch grows."""
    factor: Annotated[float, Field(gt=1, le=1e6)] = 2.0
    """Of the batch of the start."""

    def propose(self, situation: Situation) -> Proposal:
        """Return the batch of the start, later `factor` times that."""
        budget = situation.facts.budget_samples
        if budget is None:
            return hold("hold", "the budget of this run is not known")
        seen, first = situation.measurement.samples_seen, situation.facts.rules.global_batch_size
        if seen < self.at_share * budget:
            return hold("hold", f"grows at {self.at_share:.0%} of the samples, {seen / budget:.1%} seen")
        because = f"{self.at_share:.0%} of the samples are seen, and this run grows once by {self.factor:g}"
        return Proposal(self.factor * first, "stage", because, self.factor * first)
