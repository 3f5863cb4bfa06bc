"""Never change the batch; measure and show all the same."""

from __future__ import annotations

from typing import Literal

from gns_controller.core.policies.base import PolicyConfig, Proposal, Situation, hold


class HoldPolicyConfig(PolicyConfig):
    """Keep the batch of the specification all run long."""

    policy: Literal["hold"] = "hold"


def propose(config: HoldPolicyConfig, situation: Situation) -> Proposal:
    """Always the present batch."""
    return hold("hold", "this run holds its batch")
