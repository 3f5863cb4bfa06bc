"""Never change the batch; measure and show all the same."""

from __future__ import annotations

from typing import Literal

from gns_controller.core.contract import NoiseScaleMeasurement
from gns_controller.core.policies.fold import PolicyConfig, PolicyState, Proposal


class HoldPolicyConfig(PolicyConfig):
    """Keep the batch of the specification all run long."""

    policy: Literal["hold"] = "hold"


def propose(config: HoldPolicyConfig, state: PolicyState, measurement: NoiseScaleMeasurement) -> Proposal:
    """Always the present batch."""
    return Proposal(None, "hold", "this run holds its batch.")
