"""The augmented inner-product test: enlarge the batch when -g might not be a descent direction.

    inner product:   Var_i(<g_i, g>) / B <= theta^2 |g|^4
    orthogonality:   (V - Var_i(<g_i, g>) / |g|^2) / B <= nu^2 |g|^2       V: per-sample variance, euclidean
    either fails:    B <- ceil(max(Var_i(<g_i, g>) / (theta^2 |g|^4), (V - Var_i(<g_i, g>) / |g|^2) / (nu^2 |g|^2)))

Weaker than the norm test. Source: Bollapragada, Byrd, Nocedal 2018, "Adaptive Sampling Strategies for Stochastic
Optimization"; theta 0.9 and nu 5.84 are theirs.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gns_controller.core.contract import Geometry
from gns_controller.core.policies.base import PolicyConfig, PolicyNeeds, Proposal, Situation, hold
from gns_controller.core.policies.state_update import followed_readings


class InnerProductTestPolicyConfig(PolicyConfig):
    """Both tests, on each reading as it comes."""

    needs: ClassVar[PolicyNeeds] = PolicyNeeds(inner_products=True)
    policy: Literal["inner_product_test"] = "inner_product_test"
    theta: Annotated[float, Field(ge=1e-6, le=100)] = 0.9
    """Of the inner-product test."""
    nu: Annotated[float, Field(ge=1e-6, le=1000)] = 5.84
    """Of the orthogonality test."""
    estimator: Literal["rank_variance"] = "rank_variance"
    geometry: Geometry | None = "euclidean"
    aggregation: Literal["matrices_only"] = "matrices_only"
    """Variances of inner products do not add over groups."""
    monotone: bool = True
    growth_cap: Annotated[float, Field(gt=1)] | None = 4.0

    def propose(self, situation: Situation) -> Proposal:
        """Return the batch at which both tests would just pass."""
        readings = followed_readings(self, situation.measurement)
        if not readings or readings[0].inner_product_variance is None:
            return hold("hold_no_reading", "no euclidean reading with the variance of its inner products")
        reading = readings[0]
        gradient_sq, variance = reading.signal_sq, reading.inner_product_variance
        assert variance is not None
        if gradient_sq <= 0:
            return hold("hold_unresolved", "the gradient's norm cannot be told from zero")
        # |g|^4 of a small gradient is no number, so it is divided by twice.
        variance_along = variance / gradient_sq
        along = variance_along / gradient_sq / self.theta**2
        across = max(reading.noise_sq - variance_along, 0.0) / gradient_sq / self.nu**2
        needed = max(along, across)
        because = f"the inner-product test needs {along:.4g}, the orthogonality test {across:.4g}"
        if needed <= situation.batch_size:
            if self.monotone:
                return hold("hold_below_deadband", f"both tests pass: {because}", needed)
            return Proposal(needed, "shrink", because, needed, round_up=True)
        return Proposal(needed, "grow", because, needed, round_up=True)
