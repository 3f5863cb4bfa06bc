"""An open-loop ramp: batches at stated sample or token counts, whatever is measured.

The ramp of most published large runs, and the control that an adaptive policy has to beat. Llama 3 405B: 4M tokens,
8M from 252M tokens on, 16M from 2.87T (arXiv:2407.21783). Moonlight: 2048 sequences, 4096 from 200B tokens on.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gns_controller.core.policies.base import PolicyConfig, Proposal, Situation, hold
from gns_controller.core.policies.units import BatchAim, Start


class Stage(Start, BatchAim):
    """From this many samples or tokens on, this batch."""


class StagesPolicyConfig(PolicyConfig):
    """Batches at stated counts; before the first stage the batch of the specification."""

    open_loop: ClassVar[bool] = True
    policy: Literal["stages"] = "stages"
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=1000)]
    """Ascending, all from_samples or all from_tokens."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        starts = [(stage.from_samples is None, stage.from_samples or stage.from_tokens or 0) for stage in self.stages]
        if any(earlier[0] != later[0] for earlier, later in pairwise(starts)):
            raise ValueError("stages begin all at from_samples or all at from_tokens.")
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError("stages must ascend in from_samples or from_tokens, without repeats.")
        return self

    def propose(self, situation: Situation) -> Proposal:
        """Return the batch of the last stage that has begun."""
        seen, facts = situation.measurement.samples_seen, situation.facts
        begun = [stage for stage in self.stages if stage.begins_at(facts) <= seen]
        if not begun:
            first = self.stages[0].begins_at(facts)
            return hold("hold", f"the first stage begins at {first:.12g} samples, {seen} seen")
        batch_size = begun[-1].batch_size(facts)
        because = f"stage {len(begun)} of {len(self.stages)} began at {begun[-1].begins_at(facts):.12g} samples"
        return Proposal(batch_size, "stage", because, batch_size)
