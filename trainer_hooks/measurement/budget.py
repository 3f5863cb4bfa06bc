"""What measuring may cost, and how often, how finely and on how many layers one measures for that.

Pure arithmetic on seconds that were averaged over ranks, so that every rank comes to the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LONGEST_INTERVAL_STEPS = 200
"""Before measurements become rarer than this, fewer layers are measured."""

SMALLEST_LAYER_SHARE = 0.125
"""And no fewer than this share of them."""

FIRST_MEASURED_STEP = 10
"""Steps that show what an unmeasured step costs."""


@dataclass(frozen=True)
class MeasurementCost:
    """Seconds of one measured step, averaged over ranks."""

    extra_seconds: float
    """More than an unmeasured step took."""
    norm_seconds: float
    """Reductions and norms: the part that grows with sign patterns and shrinks with layers."""
    step_seconds: float
    """Of an unmeasured step."""
    elapsed_seconds: float
    """Since the last measured step, this one included."""
    num_patterns: int = 1
    """Sign patterns it was measured with."""
    layer_share: float = 1.0
    """Of the layers."""

    @property
    def seconds(self) -> float:
        """What the measured step cost; never less than its norms."""
        return max(self.extra_seconds, self.norm_seconds, 0.0)

    @property
    def rest_seconds(self) -> float:
        """What does not depend on sign patterns and layers: capture, finer micro-batches."""
        return max(self.extra_seconds - self.norm_seconds, 0.0)


@dataclass
class MeasurementLedger:
    """Spent on measuring against time elapsed; the next measurement waits until the budget covers it."""

    budget: float
    """Largest share of the run's time, e.g. 0.01."""
    spent_seconds: float = 0.0
    elapsed_seconds: float = 0.0
    recent: list[MeasurementCost] = field(default_factory=list)
    """Of the last three measurements."""

    @property
    def share(self) -> float:
        """Of the time so far."""
        return self.spent_seconds / self.elapsed_seconds if self.elapsed_seconds else 0.0

    def settle(self, cost: MeasurementCost) -> int:
        """Book one measurement. Returns the steps until the next one may begin, at least 1.

        (spent + c) <= budget * (elapsed + k * step_seconds + c),  c the dearest of the last three measurements
        c <= budget * (k * step_seconds + c),                      what was saved before is not spent in one go
        """
        self.spent_seconds += cost.seconds
        self.elapsed_seconds += cost.elapsed_seconds
        self.recent = [*self.recent[-2:], cost]
        expected = max(found.seconds for found in self.recent)
        if cost.step_seconds <= 0:
            return 1
        steady = expected / self.budget - expected
        missing = max(steady, steady + self.spent_seconds / self.budget - self.elapsed_seconds)
        return max(1, math.ceil(missing / cost.step_seconds))

    @property
    def typical(self) -> MeasurementCost | None:
        """The cheapest of the last three; None after one, which pays for everything that is done for the first time."""
        return min(self.recent, key=lambda found: found.seconds) if len(self.recent) > 1 else None

    def state_dict(self) -> dict[str, Any]:
        """For the session's checkpoint."""
        return {
            "spent_seconds": self.spent_seconds,
            "elapsed_seconds": self.elapsed_seconds,
            "recent": [asdict(cost) for cost in self.recent],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where the checkpoint stopped."""
        self.spent_seconds = float(state["spent_seconds"])
        self.elapsed_seconds = float(state["elapsed_seconds"])
        self.recent = [MeasurementCost(**cost) for cost in state["recent"]]


def best_num_patterns(cost: MeasurementCost, *, available: int) -> int:
    """Sign patterns that give the smallest error of the signal for the same time.

    P patterns cost c0 + P c1 and leave a variance of (1 + 1/P): the product is smallest at P = sqrt(c0 / c1). More
    patterns than that pay less than more measurements do.
    """
    per_pattern = cost.norm_seconds / cost.num_patterns
    if per_pattern <= 0:
        return available
    return max(1, min(available, round(math.sqrt(cost.rest_seconds / per_pattern))))


def affordable_layer_share(cost: MeasurementCost, *, budget: float, present_share: float) -> float:
    """Share of the layers that can be measured every LONGEST_INTERVAL_STEPS within the budget; never grows.

    Powers of 1/2, so that one stretch of slow steps does not fray the choice.
    """
    norms = cost.norm_seconds / cost.layer_share
    allowed = budget * LONGEST_INTERVAL_STEPS * cost.step_seconds
    share = present_share
    if cost.rest_seconds > allowed:
        return share  # fewer layers would not help
    while share > SMALLEST_LAYER_SHARE and cost.rest_seconds + norms * share > allowed:
        share /= 2
    return share
