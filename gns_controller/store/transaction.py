"""Rows to records and back, and what a job sees while the writer runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic_core import from_json
from sqlalchemy import Connection, Row, Select, insert, select, update

from gns_controller.core.policies import KEEP_UNKNOWN, PolicyState
from gns_controller.core.runs import Control, RunSpecification
from gns_controller.store.bodies import MeasurementBody
from gns_controller.store.protocol import LogEntry, NewEntry, RunHead
from gns_controller.store.tables import log, runs

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_microseconds(at: datetime) -> int:
    """Integer time of the tables."""
    return (at - _EPOCH) // timedelta(microseconds=1)


def from_microseconds(microseconds: int) -> datetime:
    """The inverse of `to_microseconds`, in UTC."""
    return _EPOCH + timedelta(microseconds=microseconds)


def to_entry(row: Row[Any]) -> LogEntry:
    """A log line from its row."""
    return LogEntry(
        sequence=row.sequence,
        run_id=row.run_id,
        attempt=row.attempt,
        kind=row.kind,
        body=row.body,
        state=row.state,
        at=from_microseconds(row.at),
    )


def select_heads() -> Select[Any]:
    """Runs, each with the state to go on from and its last measurement."""
    last, current = log.alias("last"), log.alias("current")
    return (
        select(runs, current.c.state.label("state"), last.c.body.label("last_body"))
        .join(current, current.c.sequence == runs.c.state_sequence)
        .outerjoin(last, last.c.sequence == runs.c.measurement_sequence)
    )


def to_head(row: Row[Any]) -> RunHead:
    """A run from a row of `select_heads`."""
    last = None if row.last_body is None else MeasurementBody.model_validate_json(row.last_body)
    return RunHead(
        run_id=row.run_id,
        specification=RunSpecification.model_validate_json(row.specification, context=KEEP_UNKNOWN),
        control=Control.model_validate(
            {
                "policy": from_json(row.policy),
                "policy_revision": row.policy_revision,
                "override": None if row.override is None else from_json(row.override),
            },
            context=KEEP_UNKNOWN,
        ),
        registered_sequence=row.registered_sequence,
        registered_at=from_microseconds(row.registered_at),
        attempt=row.attempt,
        attempt_at=from_microseconds(row.attempt_at),
        attempt_step=row.attempt_step,
        state=PolicyState.model_validate_json(row.state),
        state_sequence=row.state_sequence,
        num_measurements=row.num_measurements,
        measurement_sequence=row.measurement_sequence,
        last_measurement=None if last is None else last.measurement,
        last_decision=None if last is None else last.decision,
        last_report_at=None if row.last_report_at is None else from_microseconds(row.last_report_at),
        usual_gap_seconds=row.usual_gap_seconds,
        controlled_at=None if row.controlled_at is None else from_microseconds(row.controlled_at),
    )


class SqlTransaction:
    """One job's view of the open transaction; its heads reach the cache only if the job and the commit succeed."""

    def __init__(
        self, connection: Connection, committed: Mapping[str, RunHead], pending: Mapping[str, RunHead]
    ) -> None:
        self.connection = connection
        self.changed: dict[str, RunHead] = {}
        self.seen: dict[str, RunHead] = {}
        self._committed = committed
        self._pending = pending

    def head(self, run_id: str) -> RunHead | None:
        """The run, or None."""
        for heads in (self.changed, self._pending, self._committed, self.seen):
            if run_id in heads:
                return heads[run_id]
        row = self.connection.execute(select_heads().where(runs.c.run_id == run_id)).one_or_none()
        if row is None:
            return None
        self.seen[run_id] = to_head(row)
        return self.seen[run_id]

    def put_head(self, head: RunHead) -> None:
        """Store the run as it is now."""
        values: dict[str, object] = {
            "attempt": head.attempt,
            "attempt_at": to_microseconds(head.attempt_at),
            "attempt_step": head.attempt_step,
            "state_sequence": head.state_sequence,
            "measurement_sequence": head.measurement_sequence,
            "num_measurements": head.num_measurements,
            "last_report_at": None if head.last_report_at is None else to_microseconds(head.last_report_at),
            "usual_gap_seconds": head.usual_gap_seconds,
        }
        before = self.head(head.run_id)
        control = head.control
        if before is None or before.control.policy_revision != control.policy_revision:
            values["policy"] = control.policy.model_dump_json()
            values["policy_revision"] = control.policy_revision
            values["override"] = None if control.override is None else control.override.model_dump_json()
            values["controlled_at"] = None if head.controlled_at is None else to_microseconds(head.controlled_at)
        if before is None or before.specification != head.specification:
            values["specification"] = head.specification.model_dump_json()
        if before is None:
            values["run_id"] = head.run_id
            values["registered_sequence"] = head.registered_sequence
            values["registered_at"] = to_microseconds(head.registered_at)
            self.connection.execute(insert(runs), values)
        else:
            self.connection.execute(update(runs).where(runs.c.run_id == head.run_id), values)
        self.changed[head.run_id] = head

    def append(self, entries: Sequence[NewEntry]) -> list[int]:
        """Write log lines of one run; returns their sequence numbers, ascending.

        They are read back instead of returned by the insert, which SQLite would then run row by row.
        """
        rows = [
            {
                "run_id": entry.run_id,
                "attempt": entry.attempt,
                "kind": entry.kind,
                "optimizer_step": entry.optimizer_step,
                "samples_seen": entry.samples_seen,
                "changes_plan": entry.changes_plan,
                "body": entry.body,
                "state": entry.state,
                "at": to_microseconds(entry.at),
            }
            for entry in entries
        ]
        self.connection.execute(insert(log), rows)
        written = (
            select(log.c.sequence)
            .where(log.c.run_id == entries[0].run_id)
            .order_by(log.c.sequence.desc())
            .limit(len(entries))
        )
        return list(self.connection.execute(written).scalars())[::-1]

    def known_steps(self, run_id: str, *, attempt: int, first: int, last: int) -> set[int]:
        """Those optimizer steps from first to last that this attempt has measurements of."""
        steps = select(log.c.optimizer_step).where(
            log.c.run_id == run_id, log.c.attempt == attempt, log.c.optimizer_step.between(first, last)
        )
        return {step for step in self.connection.execute(steps).scalars() if step is not None}

    def state_at(self, run_id: str, *, optimizer_step: int) -> PolicyState | None:
        """The state after the newest measurement of any attempt that is not beyond this step."""
        newest = (
            select(log.c.state)
            .where(log.c.run_id == run_id, log.c.kind == "measurement", log.c.optimizer_step <= optimizer_step)
            .order_by(log.c.sequence.desc())
            .limit(1)
        )
        state = self.connection.execute(newest).scalar_one_or_none()
        return None if state is None else PolicyState.model_validate_json(state)

    def registrations(self, run_id: str) -> list[LogEntry]:
        """Every registration of the run, oldest first."""
        rows = (
            select(log)
            .where(log.c.run_id == run_id, log.c.changes_plan.is_(True), log.c.kind == "registered")
            .order_by(log.c.sequence)
        )
        return [to_entry(row) for row in self.connection.execute(rows)]
