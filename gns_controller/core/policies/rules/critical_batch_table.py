"""Grow along a measured critical batch size: a table from branched training.

    while critical_batch_size(t) >= multiple * B:  B <- multiple * B          in one change

Between two points of the table the critical batch size is interpolated linearly in samples. `gns-controller calibrate`
measures such a table. Source: arXiv:2505.23971 (Merrill et al.): OLMo 1B from 1024, doubled at 168B and 503B tokens.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gns_controller.core.contract import PositiveCount
from gns_controller.core.policies.base import PolicyConfig, Proposal, Situation, hold
from gns_controller.core.policies.units import Start


class CriticalBatch(Start):
    """From here on, up to this batch nothing was lost."""

    critical_batch_size: PositiveCount


class CriticalBatchTablePolicyConfig(PolicyConfig):
    """Grow by `multiple` once the table allows it."""

    open_loop: ClassVar[bool] = True
    policy: Literal["critical_batch_table"] = "critical_batch_table"
    table: Annotated[tuple[CriticalBatch, ...], Field(min_length=1, max_length=1000)]
    """Ascending, all from_samples or all from_tokens."""
    multiple: Annotated[float, Field(gt=1, le=1e6)] = 2.0
    """Factor of one growth."""
    monotone: bool = True
    """Never shrink the batch."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        starts = [(point.from_samples is None, point.from_samples or point.from_tokens or 0) for point in self.table]
        if any(a[0] != b[0] or b[1] <= a[1] for a, b in pairwise(starts)):
            raise ValueError("the table must ascend, all in from_samples or all in from_tokens, without repeats.")
        return self

    def propose(self, situation: Situation) -> Proposal:
        """Return the largest batch, in powers of `multiple`, that the table allows now."""
        facts, seen = situation.facts, situation.measurement.samples_seen
        points = [(point.begins_at(facts), point.critical_batch_size) for point in self.table]
        critical = _interpolated(points, seen)
        if critical is None:
            return hold("hold", f"the table begins at {points[0][0]:.12g} samples, {seen} seen")
        because = f"the table's critical batch size is {critical:.4g}"
        # The small term takes in a power that is met exactly, which no float64 can be trusted to hit.
        times = math.floor(math.log(critical / situation.batch_size) / math.log(self.multiple) + 1e-9)
        if times < 1:
            return hold("hold_below_deadband", f"{because}, less than {self.multiple:g} times the batch", critical)
        return Proposal(situation.batch_size * self.multiple**times, "grow", because, critical)


def _interpolated(points: list[tuple[float, int]], seen: int) -> float | None:
    if seen < points[0][0]:
        return None
    for (start, low), (end, high) in pairwise(points):
        if seen < end:
            return low + (high - low) * (seen - start) / (end - start)
    return float(points[-1][1])
