"""Never change the batch; measure and show all the same."""

from __future__ import annotations

from typing import ClassVar, Literal

from gns_controller.core.policies.base import PolicyConfig, Proposal, Situation, hold


class HoldPolicyConfig(PolicyConfig):
    """Keep the batch of the specification all run long."""

    open_loop: ClassVar[bool] = True
    policy: Literal["hold"] = "hold"

    def propose(self, situation: Situation) -> Proposal:
        """Keep the present batch."""
        return hold("hold", "this run holds its batch")
