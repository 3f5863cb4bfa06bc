"""What the controller asks of a store, and the two records that pass between them.

Writes are jobs: functions of a `Transaction`, run in order by one writer, acknowledged only when they are on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol, TypeVar

from gns_controller.core.contract import Decision, NoiseScaleMeasurement
from gns_controller.core.policies import PolicyState
from gns_controller.core.runs import Control, RunSpecification

Result = TypeVar("Result")
EntryKind = Literal["registered", "measurement", "control"]


@dataclass(frozen=True, slots=True)
class RunHead:
    """Everything the next measurement of a run, or a view of it, depends on."""

    run_id: str
    specification: RunSpecification
    control: Control
    """The policy and the override that the next measurement is decided under."""
    registered_sequence: int
    registered_at: datetime
    attempt: int
    attempt_at: datetime
    """When this attempt registered."""
    attempt_step: int | None
    """optimizer_step of the last measurement of this attempt; None before the first."""
    state: PolicyState
    """Where the fold goes on."""
    state_sequence: int
    """The log entry that holds `state`."""
    num_measurements: int = 0
    measurement_sequence: int | None = None
    last_measurement: NoiseScaleMeasurement | None = None
    last_decision: Decision | None = None
    last_report_at: datetime | None = None
    usual_gap_seconds: float | None = None
    """Moving average of the time between two reports."""
    controlled_at: datetime | None = None
    """Time of the last operator command."""


@dataclass(frozen=True, slots=True)
class NewEntry:
    """A line for the log. `body` and `state` are JSON text."""

    run_id: str
    attempt: int
    kind: EntryKind
    optimizer_step: int | None
    samples_seen: int | None
    changes_plan: bool
    body: str
    state: str
    at: datetime


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A line of the log as it was committed."""

    sequence: int
    run_id: str
    attempt: int
    kind: EntryKind
    body: str
    state: str
    at: datetime


class Transaction(Protocol):
    """What a job may do. It sees its own changes and those of the jobs before it."""

    def head(self, run_id: str) -> RunHead | None:
        """The run, or None."""
        ...

    def put_head(self, head: RunHead) -> None:
        """Store the run as it is now."""
        ...

    def append(self, entries: Sequence[NewEntry]) -> list[int]:
        """Write log lines of one run, at least one; returns their sequence numbers, ascending."""
        ...

    def known_steps(self, run_id: str, *, attempt: int, first: int, last: int) -> set[int]:
        """Those optimizer steps from first to last that this attempt has measurements of."""
        ...

    def state_at(self, run_id: str, *, optimizer_step: int) -> PolicyState | None:
        """The state after the newest measurement of any attempt that is not beyond this step."""
        ...

    def registrations(self, run_id: str) -> list[LogEntry]:
        """Every registration of the run, oldest first."""
        ...


class Store(Protocol):
    """Durable and ordered. Reads may run in any thread."""

    def submit(self, job: Callable[[Transaction], Result]) -> Future[Result]:
        """Queue a write.

        Raises:
            StoreBusyError: the queue is full. The future raises StoreUnavailableError when the commit failed.
        """
        ...

    def head(self, run_id: str) -> RunHead | None:
        """The run as last committed."""
        ...

    def heads(self, *, limit: int, before: int | None = None) -> list[RunHead]:
        """Runs, newest registration first; `before` is a registered_sequence."""
        ...

    def recent_heads(self, *, limit: int, since: datetime) -> list[RunHead]:
        """Runs that reported or registered since then, the latest first."""
        ...

    def entries(
        self,
        run_id: str,
        *,
        limit: int,
        measurements: bool | None = None,
        after: int | None = None,
        descending: bool = False,
    ) -> list[LogEntry]:
        """Log lines of one run, beyond sequence `after` in the chosen direction: all, measurements, or all others."""
        ...

    def plan_changes(self, run_id: str, *, limit: int) -> list[LogEntry]:
        """The last `limit` log lines that began a plan, oldest first."""
        ...

    def check(self, *, timeout_seconds: float) -> None:
        """Write and read back.

        Raises:
            StoreError: one of the two failed.
        """
        ...

    def num_queued(self) -> int:
        """Jobs that wait for the writer."""
        ...

    def close(self) -> None:
        """Finish what is queued, then let go of the database."""
        ...
