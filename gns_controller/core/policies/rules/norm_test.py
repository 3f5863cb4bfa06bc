"""The norm test: enlarge the batch when the gradient's variance is too large beside its norm.

    test:      V / B <= theta^2 |g|^2          V: per-sample variance, noise_sq of rank_variance in the euclidean norm
    violated:  B <- ceil(V / (theta^2 |g|^2))

Source: Byrd, Chin, Nocedal, Wu 2012; over data-parallel workers, arXiv:2412.21124 (Lau et al.). The plain |g|^2 holds
the noise of its own batch: near B = noise scale the test asks for less than the truth.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gns_controller.core.contract import Estimator, Geometry
from gns_controller.core.policies.base import PolicyConfig, Proposal, Situation, hold


class NormTestPolicyConfig(PolicyConfig):
    """The classical test, on readings as they come: no averages unless betas are given."""

    policy: Literal["norm_test"] = "norm_test"
    theta: Annotated[float, Field(ge=1e-6, le=100)] = 0.5
    """Largest ratio of the gradient's standard deviation to its norm."""
    estimator: Estimator = "rank_variance"
    geometry: Geometry | None = "euclidean"
    noise_beta: Annotated[float, Field(ge=0, lt=1)] = 0.0
    signal_beta: Annotated[float, Field(ge=0, lt=1)] = 0.0
    monotone: bool = True
    growth_cap: Annotated[float, Field(gt=1)] | None = 4.0

    def propose(self, situation: Situation) -> Proposal:
        """Return the batch at which the test would just pass."""
        smoothed = situation.state.smoothed
        if smoothed is None:
            return hold("hold_no_reading", f"no {self.estimator} reading yet")
        noise_scale = situation.judged.noise_scale
        if noise_scale is None:
            return hold("hold_unresolved", "the gradient's norm cannot be told from zero")
        needed = noise_scale / self.theta**2
        ratio = noise_scale / situation.batch_size
        if needed <= situation.batch_size:
            because = f"the test passes, variance / |g|^2 = {ratio:.4g} <= {self.theta:g}^2"
            if self.monotone:
                return hold("hold_below_deadband", because, needed)
            return Proposal(needed, "shrink", because, needed, round_up=True)
        because = f"the test fails, variance / |g|^2 = {ratio:.4g} > {self.theta:g}^2, and needs {needed:.4g}"
        return Proposal(needed, "grow", because, needed, round_up=True)
