"""An open-loop ramp: batches at stated sample counts, whatever is measured.

The ramp of most published large runs (Llama 3, DeepSeek-V3), and the control that an adaptive policy has to beat.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gns_controller.core.contract import Count, FrozenModel, NoiseScaleMeasurement, PositiveCount
from gns_controller.core.policies.fold import PolicyConfig, PolicyState, Proposal


class Stage(FrozenModel):
    """From this many samples on, this batch."""

    from_samples: Count
    global_batch_size: PositiveCount


class StagesPolicyConfig(PolicyConfig):
    """Batches at stated sample counts; before the first stage the batch of the specification."""

    policy: Literal["stages"] = "stages"
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=1000)]
    """In ascending order of from_samples."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if any(later.from_samples <= earlier.from_samples for earlier, later in pairwise(self.stages)):
            raise ValueError("stages must ascend in from_samples, without repeats.")
        return self


def propose(config: StagesPolicyConfig, state: PolicyState, measurement: NoiseScaleMeasurement) -> Proposal:
    """The batch of the last stage that has begun."""
    begun = [stage for stage in config.stages if stage.from_samples <= measurement.samples_seen]
    if not begun:
        first = config.stages[0].from_samples
        return Proposal(None, "hold", f"the first stage begins at {first} samples, {measurement.samples_seen} seen.")
    stage = begun[-1]
    because = f"stage {len(begun)} of {len(config.stages)} began at {stage.from_samples} samples."
    return Proposal(stage.global_batch_size, "stage", because, stage.global_batch_size)
