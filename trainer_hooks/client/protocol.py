"""The interface between a session and whatever decides for it, on rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

from gns_controller.core.contract import BatchPlan, Decision, NoiseScaleMeasurement
from gns_controller.core.policies import PolicyState
from gns_controller.core.policies.parsing import policy_of
from gns_controller.core.runs import Control

DecisionSource = Literal["controller", "local"]
"""Where a decision was made: by the service, or by the same policy in this process."""


class Verdict(NamedTuple):
    """The plan to follow after one measurement, and where it was decided."""

    plan: BatchPlan
    source: DecisionSource
    decision: Decision


def saved_control(control: Control) -> dict[str, Any] | None:
    """Return the control as a checkpoint keeps it; None where no operator has changed it."""
    return control.model_dump(mode="json") if control.policy_revision else None


def control_from(state: Mapping[str, Any] | None) -> Control | None:
    """Return the control of a session's checkpoint; None where no operator had changed it, or it was not kept.

    Raises:
        InvalidInputError: the policy that an operator had set cannot be run here.
    """
    saved = (state or {}).get("orders")  # the key of state version 2
    return Control.model_validate({**saved, "policy": policy_of(saved["policy"])}) if saved else None


class DecisionClient(Protocol):
    """Rank 0's way to decisions. Only `verdict`, `wait_registered` and `close` wait, and those have deadlines."""

    @property
    def state(self) -> PolicyState:
        """Memory of the local policy, for the checkpoint."""
        ...

    @property
    def pending(self) -> dict[int, Decision]:
        """Decisions whose verdict was not taken yet, by optimizer_step, for the checkpoint."""
        ...

    @property
    def control(self) -> Control:
        """Policy and override of the local fold, for the checkpoint."""
        ...

    def wait_registered(self, *, deadline_seconds: float) -> None:
        """Wait a moment for the registration, so that a wrong specification is an error at attach.

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
