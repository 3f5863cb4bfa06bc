"""GPT-3's ramp: the batch grows linearly in samples or tokens, then stays.

    batch(t) = B0 + (B1 - B0) * min(1, t / T)        B0: batch of the start, t: samples seen

GPT-3: from 32k tokens to the full batch over the first 4 to 12 billion tokens (arXiv:2005.14165, appendix B), learning
rate not rescaled. DeepSeek-V3: from 3072 to 15360 sequences over 469B tokens (arXiv:2412.19437), its shape not stated.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from gns_controller.core.contract import PositiveCount
from gns_controller.core.policies.base import PolicyConfig, Proposal, Situation
from gns_controller.core.policies.units import BatchAim, in_samples


class LinearRampPolicyConfig(BatchAim, PolicyConfig):
    """From the batch of the specification to this one, in a straight line."""

    open_loop: ClassVar[bool] = True
    policy: Literal["linear_ramp"] = "linear_ramp"
    ramp_samples: PositiveCount | None = None
    """Length of the ramp."""
    ramp_tokens: PositiveCount | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.ramp_samples is None) == (self.ramp_tokens is None):
            raise ValueError("give either ramp_samples or ramp_tokens, exactly one of them.")
        return self

    def propose(self, situation: Situation) -> Proposal:
        """Return the point of the line that has been reached."""
        facts, seen = situation.facts, situation.measurement.samples_seen
        first, last = facts.rules.global_batch_size, self.batch_size(facts)
        length = in_samples(self.ramp_samples, self.ramp_tokens, facts)
        share = min(1.0, seen / length)
        batch_size = first + (last - first) * share
        because = f"{share:.1%} of the ramp from {first} to {last:.12g} samples"
        reason: Literal["grow", "shrink"] = "grow" if batch_size >= situation.batch_size else "shrink"
        return Proposal(batch_size, reason, because, batch_size)
