"""The log of a run as the API shows it and as replay reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import ValidationError

from gns_controller.core.contract import Decision
from gns_controller.core.errors import DatabaseCorruptError
from gns_controller.core.replay import Event, Resumed
from gns_controller.core.runs import RecordedAttempt, RecordedControl, RecordedDecision, RecordedMeasurement
from gns_controller.store import LogEntry, control_of, measurement_of, registration_of


def recorded_measurement(entry: LogEntry) -> RecordedMeasurement:
    """Return the measurement of a log line as the API shows it."""
    return RecordedMeasurement(
        sequence=entry.sequence, received_at=entry.at, measurement=measurement_of(entry).measurement
    )


def recorded_decision(entry: LogEntry) -> RecordedDecision:
    """Return the decision on a log line's measurement as the API shows it."""
    return RecordedDecision(sequence=entry.sequence, decided_at=entry.at, decision=measurement_of(entry).decision)


def recorded_event(entry: LogEntry) -> RecordedAttempt | RecordedControl:
    """Return a line of the log that is not a measurement as the API shows it."""
    if entry.kind == "registered":
        registration = registration_of(entry)
        return RecordedAttempt(
            sequence=entry.sequence,
            received_at=entry.at,
            attempt=entry.attempt,
            resume_step=registration.resume_step,
            data_parallel_size=registration.specification.data_parallel_size,
        )
    body = control_of(entry)
    return RecordedControl(sequence=entry.sequence, received_at=entry.at, **dict(body))


def replay_log(entries: Iterable[LogEntry]) -> Iterator[tuple[Event, Decision | None]]:
    """Yield the events of a log, or of a part of it, each with the decision that was made on it.

    Raises:
        DatabaseCorruptError: a line cannot be read.
    """
    for entry in entries:
        try:
            if entry.kind == "measurement":
                body = measurement_of(entry)
                event: tuple[Event, Decision | None] = body.measurement, body.decision
            else:
                event = replay_event(recorded_event(entry)), None
        except ValidationError:
            raise DatabaseCorruptError(
                f"line {entry.sequence} of the log is damaged, or of another version: this controller cannot read it."
            ) from None
        yield event


def replay_event(recorded: RecordedAttempt | RecordedControl) -> Event:
    """Return a recorded event as an event of replay."""
    if isinstance(recorded, RecordedAttempt):
        return Resumed(recorded.resume_step, recorded.data_parallel_size)
    return recorded
