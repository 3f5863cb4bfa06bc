"""What a session asks of a controller."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from gns_controller.core.contract import BatchPlan, Decision, NoiseScaleMeasurement
from gns_controller.core.policies import PolicyState

DecisionSource = Literal["controller", "local"]
"""Who decided: the service, or the same policy in this process."""


class Verdict(NamedTuple):
    """The plan to follow after one measurement, and who said so."""

    plan: BatchPlan
    source: DecisionSource
    decision: Decision


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
