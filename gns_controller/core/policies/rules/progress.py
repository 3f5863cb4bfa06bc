"""Grow while a larger batch still makes more progress: the measured elasticity, with no model of the noise.

    e = log(P2 / P1) / log(S2 / S1)        P: averaged first-order progress <p(g_S), g_rest> at sub-batches S1 < S2

P at the two largest sub-batches of one measurement (a quarter and a half of the batch, by sign patterns). In the noise
dominated limit progress grows like the root of the batch: e = 1/2. Far above the noise scale it does not grow: e = 0.
In the euclidean norm P(S) ~ (1 + N / S)^(-1/2), so e = N / (2 (N + S)), and 1/4 where sqrt(S1 S2) is the noise scale N:
with a quarter and a half of the batch that is a batch of 2.83 N. Ours. First order only: curvature is not seen, and
docs/evidence/policies.md tells what that costs.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gns_controller.core.contract import RESOLVED_STANDARD_ERRORS
from gns_controller.core.policies.base import PolicyConfig, PolicyNeeds, ProgressAverage, Proposal, Situation, hold
from gns_controller.core.statistics import MIN_SPREAD_MEASUREMENTS


class ProgressPolicyConfig(PolicyConfig):
    """Grow by a factor while the elasticity of progress is above a price."""

    needs: ClassVar[PolicyNeeds] = PolicyNeeds(progress_curve=True)
    policy: Literal["progress"] = "progress"
    least_elasticity: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Grow above it. In the euclidean norm 1/4 is the elasticity where the sub-batches enclose the noise scale."""
    standard_errors: Annotated[float, Field(ge=0, le=10)] = 1.0
    """How many standard errors the elasticity has to be above it."""
    factor: Annotated[float, Field(gt=1, le=16)] = 2.0
    """Of one growth."""
    estimator: Literal["split"] = "split"
    monotone: bool = True

    def propose(self, situation: Situation) -> Proposal:
        """Return one growth, or none."""
        curve = situation.state.curve
        if len(curve) < 2:
            return hold(
                "hold_no_reading", "no progress at two sub-batches: measure with progress_curve and four groups"
            )
        measured_elasticity = elasticity(curve[-2], curve[-1])
        if measured_elasticity is None:
            return hold("hold_unresolved", f"progress cannot be told from zero at {curve[-2].samples:g} samples")
        value, error = measured_elasticity
        bar = self.least_elasticity + self.standard_errors * error
        measured = f"elasticity of progress {value:.2f} +- {error:.2f} at {curve[-1].samples:g} samples"
        if value <= bar:
            return hold("hold_below_deadband", f"{measured}, not above {self.least_elasticity:g} by enough")
        wanted = self.factor * situation.batch_size
        return Proposal(wanted, "grow", f"{measured}, above {self.least_elasticity:g}", wanted)


def elasticity(smaller: ProgressAverage, larger: ProgressAverage) -> tuple[float, float] | None:
    """d log progress / d log batch between two sub-batches, and its standard error; None while either is unresolved.

    The two averages share their gradients and are positively correlated; taking them for independent errs on the large
    side.
    """
    low, high = smaller.progress, larger.progress
    for average in (low, high):
        resolved = average.mean > RESOLVED_STANDARD_ERRORS * average.standard_error
        if average.count < MIN_SPREAD_MEASUREMENTS or not resolved:
            return None
    span = math.log(larger.samples / smaller.samples)
    error = math.hypot(low.standard_error / low.mean, high.standard_error / high.mean) / span
    return math.log(high.mean / low.mean) / span, error
