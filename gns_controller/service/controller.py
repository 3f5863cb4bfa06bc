"""Use cases: register, ingest, and what people ask about runs. It is handed its store, metrics and clock.

Writes return futures that resolve once the disk has them. The fold runs in the store's writer, so the measurements of
one run are decided in the order in which they are stored.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, get_args

from gns_controller.core.contract import Decision, NoiseScaleMeasurement, Override
from gns_controller.core.errors import (
    InvalidInputError,
    PolicyPlugInError,
    ReplayBusyError,
    ReplayTooLongError,
    RunConflictError,
    StaleAttemptError,
    UnknownAttemptError,
    UnknownRunError,
)
from gns_controller.core.policies import AnyPolicyConfig, PolicyState, decide, initial_state
from gns_controller.core.replay import ReplayReport, compare_log, resume_steps
from gns_controller.core.runs import (
    Control,
    IngestReply,
    PolicyView,
    Registration,
    RegistrationReply,
    RunSpecification,
    RunState,
    RunView,
    ScheduleView,
)
from gns_controller.service import operators
from gns_controller.service.log_replay import replay_log
from gns_controller.service.metrics import LiveRun, LiveRuns, Metrics
from gns_controller.service.projection_cache import Newest, Projections, key_of
from gns_controller.service.subscriptions import Listeners
from gns_controller.service.views import live_run_of, run_state, schedule_view, view_of
from gns_controller.store import LogEntry, MeasurementBody, NewEntry, RunHead, Store, Transaction, registration_of

logger = logging.getLogger(__name__)

_GAP_WEIGHT = 0.2
"""Weight of the newest gap in the usual gap between two reports."""

_MAX_PLANS = 1000
"""Most plans in a schedule; the newest are kept."""

_MAX_SCHEDULES = 64
"""Schedules kept; one of a thousand plans is half a megabyte and takes 30 ms."""

_MAX_FOLDED_PER_SCRAPE = 20
"""Projections made for one scrape, each 10 ms; other runs go without until the next."""

_REPLAY_PAGE = 200
"""Log lines read at once."""

_MAX_RECENT_RUNS = 1000
"""Runs counted by state at a scrape."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A registration, and whether it was the run's first."""

    reply: RegistrationReply
    created: bool


class Controller:
    """Everything the service can do.

    Args:
        store: where runs live.
        metrics: where work is counted.
        clock: the time, with a time zone.
        silent_after_seconds: see settings.
        metrics_retention_seconds: see settings.
        metrics_max_runs: see settings.
        replay_max_measurements: see settings.
    """

    def __init__(
        self,
        *,
        store: Store,
        metrics: Metrics,
        clock: Callable[[], datetime],
        silent_after_seconds: float = 300.0,
        metrics_retention_seconds: float = 3600.0,
        metrics_max_runs: int = 200,
        replay_max_measurements: int = 100_000,
    ) -> None:
        self.listeners = Listeners()
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._silent_after_seconds = silent_after_seconds
        self._retention = timedelta(seconds=metrics_retention_seconds)
        self._max_runs = metrics_max_runs
        self._replay_max_measurements = replay_max_measurements
        self._replaying = threading.Lock()
        self._waiting: set[str] = set()
        """Runs whose policy cannot be run; only the writer's thread looks."""
        self._projections = Projections()
        self._schedules: Newest[ScheduleView] = Newest(_MAX_SCHEDULES)

    def register(self, run_id: str, registration: Registration) -> Future[Registered]:
        """Announce an incarnation of a run; the same one again changes nothing.

        The future raises RunConflictError if the run exists with another specification, StaleAttemptError if a newer
        incarnation has registered since.
        """
        future = self._store.submit(lambda transaction: self._register(transaction, run_id, registration))
        future.add_done_callback(lambda done: self._announce(run_id, done))
        return future

    def ingest(self, run_id: str, measurements: Sequence[NoiseScaleMeasurement]) -> Future[IngestReply]:
        """Store and decide measurements, ascending in optimizer_step; those already stored are skipped.

        All or none: the future raises InvalidInputError, StaleAttemptError or UnknownRunError, and then nothing of the
        request was recorded.
        """
        future = self._store.submit(lambda transaction: self._ingest(transaction, run_id, measurements))
        outer: Future[IngestReply] = Future()

        def finish(done: Future[tuple[IngestReply, list[Decision]]]) -> None:
            error = done.exception()
            if error is not None:
                outer.set_exception(error)
                return
            reply, decisions = done.result()
            self._count(measurements, reply, decisions)
            self.listeners.notify(run_id)
            outer.set_result(reply)

        outer.set_running_or_notify_cancel()
        future.add_done_callback(finish)
        return outer

    def view(self, run_id: str) -> RunView:
        """One run.

        Raises:
            UnknownRunError: no run has this name.
        """
        head = self._head(run_id)
        return view_of(head, state=self._state(head))

    def views(self, *, limit: int, before: int | None = None) -> list[tuple[int, RunView]]:
        """Runs with their positions, newest registration first, from before that position."""
        heads = self._store.heads(limit=limit, before=before)
        return [(head.registered_sequence, view_of(head, state=self._state(head))) for head in heads]

    def policy(self, run_id: str) -> PolicyView:
        """Return what decides about a run.

        Raises:
            UnknownRunError: no run has this name.
        """
        head = self._head(run_id)
        return operators.policy_view(head, state=self._state(head))

    def set_policy(
        self, run_id: str, policy: AnyPolicyConfig, *, revisions: Collection[int] | None, note: str = ""
    ) -> Future[PolicyView]:
        """Let this policy decide from the next measurement on.

        The future raises InvalidInputError if it cannot steer this run; for `revisions` and other errors see
        `operators.apply_command`.
        """
        return self._command(run_id, operators.set_policy(policy, note=note), revisions)

    def set_override(self, run_id: str, override: Override, *, revisions: Collection[int] | None) -> Future[PolicyView]:
        """Put this above the policy from the next measurement on.

        The future raises BatchShapeError for a pinned batch that the present ranks cannot make, or beyond the budget.
        """
        return self._command(run_id, operators.set_override(override), revisions)

    def release_override(self, run_id: str, *, revisions: Collection[int] | None, note: str = "") -> Future[PolicyView]:
        """Remove the override. The future raises NoOverrideError if there is none."""
        return self._command(run_id, operators.release_override(note=note), revisions)

    def replay(
        self, run_id: str, *, policy: AnyPolicyConfig | None = None, follow_trainer: bool | None = None
    ) -> ReplayReport:
        """Fold the run's log again: as it was, or with another policy. Takes long; one at a time.

        Args:
            run_id: name of the run.
            policy: the policy to replay instead of what ran; operator commands are then left out.
            follow_trainer: see `core.replay.replay`; None: as the service did it for what ran, not at all for another
                policy.

        Raises:
            UnknownRunError: no run has this name.
            ReplayTooLongError: more measurements than the settings allow.
            ReplayBusyError: another one is running.
            InvalidInputError: the policy cannot steer this run.
        """
        head = self._head(run_id)
        if policy is not None:
            operators.check_for(head.specification, policy)
        limit = self._replay_max_measurements
        if head.num_measurements > limit:
            raise ReplayTooLongError(run_id, num_measurements=head.num_measurements, limit=limit)
        if follow_trainer is None:
            follow_trainer = policy is None and head.specification.mode == "active"
        if not self._replaying.acquire(blocking=False):
            raise ReplayBusyError()
        try:
            until = head.measurement_sequence or 0
            others = self._log(run_id, until=until, measurements=False)
            steps = resume_steps(event for event, _ in replay_log(others))
            log = replay_log(self._log(run_id, until=until))
            try:
                return compare_log(
                    head.specification, log, resume_steps=steps, follow_trainer=follow_trainer, policy=policy
                )
            except (ValueError, ArithmeticError):  # as in _decide
                raise InvalidInputError(
                    "this policy leads to a plan that cannot be written down: the run's counts are too large for it, "
                    "or its numbers are extreme."
                ) from None
        finally:
            self._replaying.release()

    def entries(
        self,
        run_id: str,
        *,
        limit: int,
        measurements: bool | None = None,
        after: int | None = None,
        descending: bool = False,
    ) -> list[LogEntry]:
        """The log of one run, beyond position `after`: all, measurements only, or everything else.

        Raises:
            UnknownRunError: no run has this name.
        """
        entries = self._store.entries(
            run_id, limit=limit, measurements=measurements, after=after, descending=descending
        )
        if not entries:
            self._head(run_id)
        return entries

    def schedule(self, run_id: str) -> ScheduleView:
        """The plans so far and what is expected to come.

        Raises:
            UnknownRunError: no run has this name.
        """
        head = self._head(run_id)
        kept = self._schedules.get(run_id)
        if kept is not None and kept[0] == key_of(head):
            return kept[1]
        plan_changes = self._store.plan_changes(run_id, limit=_MAX_PLANS)
        view = schedule_view(head, plan_changes, self._projections.present(head))
        if not plan_changes or plan_changes[-1].sequence <= head.state_sequence:  # else something came in between
            self._schedules.put(head, view)
        return view

    def place_in_schedule(self, run_id: str) -> tuple[int, int]:
        """Attempt and version of the present plan: all that somebody who waits for a plan has to look at.

        Raises:
            UnknownRunError: no run has this name.
        """
        head = self._head(run_id)
        return head.attempt, head.state.plan.version

    def live_runs(self) -> LiveRuns:
        """What /metrics shows: recent runs, those still of interest in detail."""
        now = self._clock()
        runs: list[LiveRun] = []
        num_folded = 0
        states: dict[RunState, int] = dict.fromkeys(get_args(RunState), 0)
        horizon = max(self._retention, timedelta(seconds=self._silent_after_seconds), timedelta(days=1))
        for head in self._store.recent_heads(limit=_MAX_RECENT_RUNS, since=now - horizon):
            state = self._state(head)
            states[state] += 1
            quiet = now - max(head.last_report_at or head.attempt_at, head.attempt_at)
            is_over = state in ("finished", "silent") and quiet > self._retention
            if not is_over and len(runs) < self._max_runs:
                steps_left = self._projections.recent_steps_left(head)
                if steps_left is None and num_folded < _MAX_FOLDED_PER_SCRAPE:
                    num_folded += 1
                    projection = self._projections.present(head)
                    steps_left = None if projection is None else projection.steps_left.expected
                runs.append(live_run_of(head, state=state, steps_left=steps_left))
        return LiveRuns(runs, states)

    def check(self) -> None:
        """Write and read the store.

        Raises:
            StoreError: it does not work now.
        """
        self._store.check(timeout_seconds=5.0)

    def num_queued(self) -> int:
        """Writes that wait."""
        return self._store.num_queued()

    def _head(self, run_id: str) -> RunHead:
        head = self._store.head(run_id)
        if head is None:
            raise UnknownRunError(run_id)
        return head

    def _state(self, head: RunHead) -> RunState:
        return run_state(head, now=self._clock(), silent_after_seconds=self._silent_after_seconds)

    def _command(
        self, run_id: str, command: operators.OperatorCommand, revisions: Collection[int] | None
    ) -> Future[PolicyView]:
        def apply(transaction: Transaction) -> PolicyView:
            head = operators.apply_command(transaction, run_id, command, revisions=revisions, now=self._clock())
            return operators.policy_view(head, state=self._state(head))

        future = self._store.submit(apply)
        future.add_done_callback(lambda done: self._announce(run_id, done))
        return future

    def _log(self, run_id: str, *, until: int, measurements: bool | None = None) -> Iterator[LogEntry]:
        after: int | None = None
        while page := self._store.entries(run_id, limit=_REPLAY_PAGE, measurements=measurements, after=after):
            for entry in page:
                if entry.sequence > until:
                    return
                yield entry
            after = page[-1].sequence

    def _announce(self, run_id: str, done: Future[Any]) -> None:
        if not done.cancelled() and done.exception() is None:
            self.listeners.notify(run_id)

    def _count(
        self, measurements: Sequence[NoiseScaleMeasurement], reply: IngestReply, decisions: Sequence[Decision]
    ) -> None:
        self._metrics.measurements.inc(reply.accepted)
        self._metrics.duplicates.inc(reply.duplicates)
        for decision in decisions:
            self._metrics.decisions.labels(reason=decision.reason).inc()
        stored = {decision.optimizer_step for decision in decisions}
        odd = {m.optimizer_step for m in measurements if not all(reading.is_finite for reading in m.readings)}
        self._metrics.not_finite.inc(len(odd & stored))

    def _register(self, transaction: Transaction, run_id: str, registration: Registration) -> Registered:
        head = transaction.head(run_id)
        if head is not None:
            _refuse_other_specification(head, registration.specification)
            for entry in transaction.registrations(run_id):
                if registration_of(entry).incarnation == registration.incarnation:
                    if entry.attempt < head.attempt:
                        raise StaleAttemptError(run_id, attempt=entry.attempt, current_attempt=head.attempt)
                    return Registered(_registration_reply(head), created=False)
        specification = registration.specification
        state = head and transaction.state_at(run_id, optimizer_step=registration.resume_step)
        state = state or initial_state(specification.batch, data_parallel_size=specification.data_parallel_size)
        now = self._clock()
        attempt = 0 if head is None else head.attempt + 1
        (sequence,) = transaction.append(
            [
                NewEntry(
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
            ]
        )
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

    def _ingest(
        self, transaction: Transaction, run_id: str, measurements: Sequence[NoiseScaleMeasurement]
    ) -> tuple[IngestReply, list[Decision]]:
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
            gap = head.usual_gap_seconds
            if head.last_report_at is not None:
                seconds = max((now - head.last_report_at).total_seconds(), 0.0)
                gap = seconds if gap is None else gap + _GAP_WEIGHT * (seconds - gap)
            head = replace(
                head,
                state_sequence=sequences[-1],
                measurement_sequence=sequences[-1],
                num_measurements=head.num_measurements + len(fresh),
                last_report_at=now,
                usual_gap_seconds=gap,
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
        return reply, decisions

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

    def _fold(
        self, head: RunHead, measurements: Sequence[NoiseScaleMeasurement], *, now: datetime
    ) -> tuple[RunHead, list[NewEntry], list[Decision]]:
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
            self._waiting.discard(head.run_id)
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
        head = replace(
            head,
            state=state,
            attempt_step=measurements[-1].optimizer_step,
            last_measurement=measurements[-1],
            last_decision=decision,
        )
        return head, entries, decisions


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
    """The measurements beyond the last stored one; the others must be stored already."""
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
