"""The write path: registrations and measurements as jobs of the store's writer.

A job reads the run, folds the policy over what is new, and writes log lines and the run as it is then. The writer runs
jobs one after another, so the measurements of one run are decided in the order in which they are stored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from gns_controller.core.contract import Decision, NoiseScaleMeasurement
from gns_controller.core.errors import (
    InvalidInputError,
    PolicyPlugInError,
    RunConflictError,
    StaleAttemptError,
    UnknownAttemptError,
    UnknownRunError,
)
from gns_controller.core.policies import PolicyState, decide, initial_state
from gns_controller.core.runs import Control, IngestReply, Registration, RegistrationReply, RunSpecification
from gns_controller.service.metrics import Metrics
from gns_controller.store import MeasurementBody, NewEntry, RunHead, Transaction, registration_of

logger = logging.getLogger(__name__)

_GAP_WEIGHT = 0.2
"""Weight of the newest gap in the usual gap between two reports."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A registration, and whether it was the run's first."""

    reply: RegistrationReply
    created: bool


@dataclass(frozen=True, slots=True)
class Ingested:
    """The reply to measurements, and the decisions on those that were new."""

    reply: IngestReply
    decisions: list[Decision]


class Ingest:
    """Jobs that register runs and decide measurements.

    Args:
        metrics: where decisions are timed.
        clock: the time, with a time zone.
    """

    def __init__(self, *, metrics: Metrics, clock: Callable[[], datetime]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._waiting: set[str] = set()
        """Runs whose policy cannot be run now. Only the writer's thread uses it."""

    def register(self, transaction: Transaction, run_id: str, registration: Registration) -> Registered:
        """Register an incarnation of a run; the same one again changes nothing.

        Raises:
            RunConflictError: the run exists with another specification.
            StaleAttemptError: a newer incarnation has registered since.
        """
        head = transaction.head(run_id)
        if head is not None:
            _refuse_other_specification(head, registration.specification)
            for entry in transaction.registrations(run_id):
                if registration_of(entry).incarnation == registration.incarnation:
                    if entry.attempt < head.attempt:
                        raise StaleAttemptError(run_id, attempt=entry.attempt, current_attempt=head.attempt)
                    return Registered(_registration_reply(head), created=False)
        # The memory of the policy goes on from the checkpoint that the incarnation resumes from.
        specification = registration.specification
        state = head and transaction.state_at(run_id, optimizer_step=registration.resume_step)
        state = state or initial_state(specification.batch, data_parallel_size=specification.data_parallel_size)
        now = self._clock()
        attempt = 0 if head is None else head.attempt + 1
        entry_of_attempt = NewEntry(
            run_id=run_id,
            attempt=attempt,
            kind="registered",
            optimizer_step=None,
            samples_seen=None,
            changes_plan=True,
            body=registration.model_dump_json(),
            state=state.model_dump_json(),
            at=now,
        )
        (sequence,) = transaction.append([entry_of_attempt])
        # A new run begins with the control of its specification; a new attempt keeps the control in force.
        new = head or RunHead(
            run_id=run_id,
            specification=specification,
            control=Control.initial(specification.policy),
            registered_sequence=sequence,
            registered_at=now,
            attempt=attempt,
            attempt_at=now,
            attempt_step=None,
            state=state,
            state_sequence=sequence,
        )
        new = replace(
            new,
            specification=new.specification.model_copy(update={"schedule": specification.schedule}),
            attempt=attempt,
            attempt_at=now,
            attempt_step=None,
            state=state,
            state_sequence=sequence,
        )
        transaction.put_head(new)
        return Registered(_registration_reply(new), created=head is None)

    def ingest(self, transaction: Transaction, run_id: str, measurements: Sequence[NoiseScaleMeasurement]) -> Ingested:
        """Store and decide measurements, ascending in optimizer_step; those already stored are skipped.

        Raises:
            UnknownRunError: no run has this name, or the attempt is not registered.
            StaleAttemptError: a newer attempt has registered.
            InvalidInputError: the measurements are not in order, or lead to a plan that cannot be written down.
            PolicyPlugInError: the policy cannot be run here.
        """
        head = transaction.head(run_id)
        if head is None:
            raise UnknownRunError(run_id)
        _refuse_other_attempts(head, measurements)
        fresh = _not_yet_stored(transaction, head, measurements)
        decisions: list[Decision] = []
        if fresh:
            now = self._clock()
            head, entries, decisions = self._fold(head, fresh, now=now)
            sequences = transaction.append(entries)
            head = replace(
                head,
                state_sequence=sequences[-1],
                measurement_sequence=sequences[-1],
                num_measurements=head.num_measurements + len(fresh),
                last_report_at=now,
                usual_gap_seconds=_usual_gap_seconds(head, now=now),
            )
            transaction.put_head(head)
        last, control = head.last_decision, head.control
        reply = IngestReply(
            accepted=len(fresh),
            duplicates=len(measurements) - len(fresh),
            plan=head.state.plan,
            decision=last if last is not None and last.attempt == head.attempt else None,
            policy_revision=control.policy_revision,
            policy=control.policy if control.policy_revision else None,
            override=control.override,
        )
        return Ingested(reply, decisions)

    def _fold(
        self, head: RunHead, measurements: Sequence[NoiseScaleMeasurement], *, now: datetime
    ) -> tuple[RunHead, list[NewEntry], list[Decision]]:
        """Fold the policy over new measurements; return the run after them, their log lines and their decisions."""
        state, decision = head.state, head.last_decision
        entries, decisions = [], []
        for measurement in measurements:
            before = state.plan
            began = time.perf_counter()
            try:
                state, decision = _decide(head, state, measurement)
            except PolicyPlugInError as error:
                self._note_waiting(head, error)
                raise
            self._metrics.decision_seconds.observe(time.perf_counter() - began)
            decisions.append(decision)
            entries.append(
                NewEntry(
                    run_id=head.run_id,
                    attempt=head.attempt,
                    kind="measurement",
                    optimizer_step=measurement.optimizer_step,
                    samples_seen=measurement.samples_seen,
                    changes_plan=state.plan != before,
                    body=MeasurementBody.model_construct(measurement=measurement, decision=decision).model_dump_json(),
                    state=state.model_dump_json(),
                    at=now,
                )
            )
        self._waiting.discard(head.run_id)
        head = replace(
            head,
            state=state,
            attempt_step=measurements[-1].optimizer_step,
            last_measurement=measurements[-1],
            last_decision=decision,
        )
        return head, entries, decisions

    def _note_waiting(self, head: RunHead, error: PolicyPlugInError) -> None:
        """Log, once until a decision is made again, that a run's policy cannot be run."""
        if head.run_id not in self._waiting:
            self._waiting.add(head.run_id)
            logger.warning(
                "measurements wait until their policy can be run: run_id=%s policy=%s reason=%s",
                head.run_id,
                head.control.policy.policy,
                error,
                exc_info=error.__cause__,
            )


def _decide(head: RunHead, state: PolicyState, measurement: NoiseScaleMeasurement) -> tuple[PolicyState, Decision]:
    try:
        return decide(
            head.control.policy,
            state,
            measurement,
            facts=head.specification.facts,
            policy_revision=head.control.policy_revision,
            follow_trainer=head.specification.mode == "active",
            override=head.control.override,
        )
    except (ValueError, ArithmeticError):  # counts beyond 2^62, or extreme numbers
        raise InvalidInputError(
            f"the measurement of optimizer_step {measurement.optimizer_step} leads to no plan that can be written "
            "down: its counts are too large, or the policy's numbers are extreme. Nothing of this request was recorded."
        ) from None


def _usual_gap_seconds(head: RunHead, *, now: datetime) -> float | None:
    """Return the moving average of the time between two reports, with the report of now."""
    gap = head.usual_gap_seconds
    if head.last_report_at is None:
        return gap
    seconds = max((now - head.last_report_at).total_seconds(), 0.0)
    return seconds if gap is None else gap + _GAP_WEIGHT * (seconds - gap)


def _refuse_other_specification(head: RunHead, requested: RunSpecification) -> None:
    same = requested.model_copy(
        update={
            "data_parallel_size": head.specification.data_parallel_size,
            "schedule": head.specification.schedule,
        }
    )
    if same != head.specification:
        raise RunConflictError(
            head.run_id,
            registered=head.specification.model_dump(mode="json"),
            requested=requested.model_dump(mode="json"),
        )


def _refuse_other_attempts(head: RunHead, measurements: Sequence[NoiseScaleMeasurement]) -> None:
    for measurement in measurements:
        if measurement.run_id != head.run_id:
            raise InvalidInputError(
                f"the measurement of optimizer_step {measurement.optimizer_step} names another run than its address."
            )
        if measurement.attempt < head.attempt:
            raise StaleAttemptError(head.run_id, attempt=measurement.attempt, current_attempt=head.attempt)
        if measurement.attempt > head.attempt:
            raise UnknownAttemptError(head.run_id, attempt=measurement.attempt, current_attempt=head.attempt)


def _not_yet_stored(
    transaction: Transaction, head: RunHead, measurements: Sequence[NoiseScaleMeasurement]
) -> list[NoiseScaleMeasurement]:
    """Return the measurements beyond the last stored one; the others must be stored already."""
    last = -1 if head.attempt_step is None else head.attempt_step
    early = [m.optimizer_step for m in measurements if m.optimizer_step <= last]
    known: set[int] = set()
    if early:
        known = transaction.known_steps(head.run_id, attempt=head.attempt, first=min(early), last=max(early))
    fresh = []
    for measurement in measurements:
        step = measurement.optimizer_step
        if step in known:
            continue
        if step <= last:
            raise InvalidInputError(
                f"the measurement of optimizer_step {step} comes after that of {last}, and was never stored: send "
                "measurements in ascending order. Nothing of this request was recorded."
            )
        fresh.append(measurement)
        known.add(step)
        last = step
    return fresh


def _registration_reply(head: RunHead) -> RegistrationReply:
    return RegistrationReply(**dict(head.control), run_id=head.run_id, attempt=head.attempt, plan=head.state.plan)
