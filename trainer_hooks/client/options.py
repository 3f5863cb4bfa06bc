"""Connection options: how a session reaches its controller."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from gns_controller.core.contract import Decision
from gns_controller.core.errors import InvalidInputError

DEFAULT_SPOOL_DIRECTORY = ".gns/spool"


@dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """Token, deadlines, spool folder and decision callback of the connection to a controller.

    Raises:
        InvalidInputError: a value is out of its range; the message names the option.
    """

    token: str | None = None
    """Bearer token of the controller. Default: environment variable GNS_TOKEN."""
    decision_delay_steps: int = 1
    """Optimizer steps between a measurement and the plan that follows from it, 0 or more."""
    decision_deadline_seconds: float = 2.0
    """Longest wait for the controller, once per measured step; none during an outage."""
    spool_directory: str | os.PathLike[str] = DEFAULT_SPOOL_DIRECTORY
    """Folder where measurements wait during an outage."""
    on_decision: Callable[[Decision, str], None] | None = None
    """Called on rank 0 with each decision and its source, "controller" or "local"."""

    def __post_init__(self) -> None:
        """Check every option alone."""
        if self.decision_delay_steps < 0:
            raise InvalidInputError(
                f"decision_delay_steps={self.decision_delay_steps} is negative; give whole steps from 0 on."
            )
        if not self.decision_deadline_seconds >= 0:
            raise InvalidInputError(
                f"decision_deadline_seconds={self.decision_deadline_seconds} is not a number of seconds from 0 on."
            )
