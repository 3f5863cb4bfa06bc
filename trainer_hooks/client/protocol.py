"""What a session asks of a controller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import TypeAdapter

from gns_controller.core.contract import BatchPlan, Decision, NoiseScaleMeasurement, Override
from gns_controller.core.policies import AnyPolicyConfig, PolicyState

DecisionSource = Literal["controller", "local"]
"""Who decided: the service, or the same policy in this process."""


class Verdict(NamedTuple):
    """The plan to follow after one measurement, and who said so."""

    plan: BatchPlan
    source: DecisionSource
    decision: Decision


class Orders(NamedTuple):
    """What decides at present: the policy of the specification, or what operators have made of it since.

    One immutable tuple, so that a thread that looks sees all of it or nothing of it.
    """

    policy: AnyPolicyConfig
    policy_revision: int = 0
    """Grows with every word of an operator."""
    override: Override | None = None


def saved_orders(orders: Orders) -> dict[str, Any] | None:
    """For a checkpoint; None where no operator has spoken."""
    if not orders.policy_revision:
        return None
    return {
        "policy": orders.policy.model_dump(mode="json"),
        "policy_revision": orders.policy_revision,
        "override": orders.override.model_dump(mode="json") if orders.override else None,
    }


def orders_from(state: Mapping[str, Any] | None) -> Orders | None:
    """From a session's checkpoint; None where no operator had spoken, or nobody kept it."""
    saved = (state or {}).get("orders")
    if not saved:
        return None
    policy: AnyPolicyConfig = TypeAdapter(AnyPolicyConfig).validate_python(saved["policy"])
    override = Override.model_validate(saved["override"]) if saved["override"] else None
    return Orders(policy, int(saved["policy_revision"]), override)


class Controller(Protocol):
    """Lives on rank 0. No method but `verdict`, `wait_registered` and `close` waits, and those have deadlines."""

    @property
    def state(self) -> PolicyState:
        """What the policy remembers, for the checkpoint."""
        ...

    @property
    def pending(self) -> dict[int, Decision]:
        """Decisions whose verdict was not asked for yet, by optimizer_step, for the checkpoint."""
        ...

    @property
    def orders(self) -> Orders:
        """What the local fold goes by, for the checkpoint."""
        ...

    def wait_registered(self, *, deadline_seconds: float) -> None:
        """Give the registration a moment, so that a wrong specification is told at attach.

        Raises:
            RunConflictError, InvalidInputError: the controller refuses this run as specified.
        """
        ...

    def report(self, measurement: NoiseScaleMeasurement) -> None:
        """Take a measurement. Never blocks, never raises."""
        ...

    def verdict(self, *, optimizer_step: int, deadline_seconds: float) -> Verdict:
        """The plan after the measurement of that step; the local one once the deadline has passed."""
        ...

    def close(self, *, deadline_seconds: float) -> None:
        """Send what is left, as far as the deadline allows; the rest stays in the spool."""
        ...
