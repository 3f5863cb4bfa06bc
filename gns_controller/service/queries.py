"""The read path: views of runs, their logs, what is expected of them, and replay. Any thread may use it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import NamedTuple, get_args

from gns_controller.core.errors import InvalidInputError, ReplayBusyError, ReplayTooLongError, UnknownRunError
from gns_controller.core.policies import AnyPolicyConfig
from gns_controller.core.replay import ReplayReport, compare_log, resume_steps
from gns_controller.core.runs import PolicyView, RunState, RunView, ScheduleView
from gns_controller.service.log_replay import replay_log
from gns_controller.service.metrics import LiveRun, LiveRuns
from gns_controller.service.operators import check_for
from gns_controller.service.projection_cache import Newest, Projections, key_of
from gns_controller.service.views import live_run_of, policy_view, run_state, schedule_view, view_of
from gns_controller.store import LogEntry, RunHead, Store

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


class QueryLimits(NamedTuple):
    """Settings of the read path; see `settings`."""

    silent_after_seconds: float = 300.0
    metrics_retention_seconds: float = 3600.0
    metrics_max_runs: int = 200
    replay_max_measurements: int = 100_000


class RunQueries:
    """Answers about runs, from the store as it was last committed.

    Args:
        store: where runs live.
        clock: the time, with a time zone.
        limits: when a run is silent, and how much is shown and replayed.
    """

    def __init__(self, *, store: Store, clock: Callable[[], datetime], limits: QueryLimits) -> None:
        self._store = store
        self._clock = clock
        self._limits = limits
        self._replaying = threading.Lock()
        self._projections = Projections()
        self._schedules: Newest[ScheduleView] = Newest(_MAX_SCHEDULES)

    def state_of(self, head: RunHead) -> RunState:
        """Return what the run seems to be doing now."""
        return run_state(head, now=self._clock(), silent_after_seconds=self._limits.silent_after_seconds)

    def view(self, run_id: str) -> RunView:
        """Return the view of one run."""
        head = self._head(run_id)
        return view_of(head, state=self.state_of(head))

    def views(self, *, limit: int, before: int | None = None) -> list[tuple[int, RunView]]:
        """Return runs with their positions, newest registration first, from before that position."""
        heads = self._store.heads(limit=limit, before=before)
        return [(head.registered_sequence, view_of(head, state=self.state_of(head))) for head in heads]

    def policy(self, run_id: str) -> PolicyView:
        """Return the control of a run."""
        head = self._head(run_id)
        return policy_view(head, state=self.state_of(head))

    def entries(
        self,
        run_id: str,
        *,
        limit: int,
        measurements: bool | None = None,
        after: int | None = None,
        descending: bool = False,
    ) -> list[LogEntry]:
        """Return the log of one run, beyond position `after`: all, measurements only, or everything else."""
        entries = self._store.entries(
            run_id, limit=limit, measurements=measurements, after=after, descending=descending
        )
        if not entries:
            self._head(run_id)
        return entries

    def schedule(self, run_id: str) -> ScheduleView:
        """Return the plans so far and what is expected to come."""
        head = self._head(run_id)
        cached = self._schedules.get(run_id)
        if cached is not None and cached[0] == key_of(head):
            return cached[1]
        plan_changes = self._store.plan_changes(run_id, limit=_MAX_PLANS)
        view = schedule_view(head, plan_changes, self._projections.present(head))
        if not plan_changes or plan_changes[-1].sequence <= head.state_sequence:  # else something came in between
            self._schedules.put(head, view)
        return view

    def place_in_schedule(self, run_id: str) -> tuple[int, int]:
        """Return attempt and version of the present plan: all that a request which waits for a plan looks at."""
        head = self._head(run_id)
        return head.attempt, head.state.plan.version

    def live_runs(self) -> LiveRuns:
        """Return recent runs for /metrics, those still of interest in detail."""
        now = self._clock()
        runs: list[LiveRun] = []
        num_folded = 0
        states: dict[RunState, int] = dict.fromkeys(get_args(RunState), 0)
        retention = timedelta(seconds=self._limits.metrics_retention_seconds)
        horizon = max(retention, timedelta(seconds=self._limits.silent_after_seconds), timedelta(days=1))
        for head in self._store.recent_heads(limit=_MAX_RECENT_RUNS, since=now - horizon):
            state = self.state_of(head)
            states[state] += 1
            quiet = now - max(head.last_report_at or head.attempt_at, head.attempt_at)
            is_over = state in ("finished", "silent") and quiet > retention
            if not is_over and len(runs) < self._limits.metrics_max_runs:
                steps_left = self._projections.recent_steps_left(head)
                if steps_left is None and num_folded < _MAX_FOLDED_PER_SCRAPE:
                    num_folded += 1
                    projection = self._projections.present(head)
                    steps_left = None if projection is None else projection.steps_left.expected
                runs.append(live_run_of(head, state=state, steps_left=steps_left))
        return LiveRuns(runs, states)

    def replay(self, run_id: str, *, policy: AnyPolicyConfig | None, follow_trainer: bool | None) -> ReplayReport:
        """Fold the run's log again, one replay at a time."""
        head = self._head(run_id)
        if policy is not None:
            check_for(head.specification, policy)
        limit = self._limits.replay_max_measurements
        if head.num_measurements > limit:
            raise ReplayTooLongError(run_id, num_measurements=head.num_measurements, limit=limit)
        if follow_trainer is None:
            follow_trainer = policy is None and head.specification.mode == "active"
        if not self._replaying.acquire(blocking=False):
            raise ReplayBusyError()
        try:
            # Twice through the log: the steps that attempts resume from first, then every line.
            until = head.measurement_sequence or 0
            others = self._log(run_id, until=until, measurements=False)
            steps = resume_steps(event for event, _ in replay_log(others))
            log = replay_log(self._log(run_id, until=until))
            return compare_log(
                head.specification, log, resume_steps=steps, follow_trainer=follow_trainer, policy=policy
            )
        except (ValueError, ArithmeticError):  # as where measurements are decided
            raise InvalidInputError(
                "this policy leads to a plan that cannot be written down: the run's counts are too large for it, "
                "or its numbers are extreme."
            ) from None
        finally:
            self._replaying.release()

    def _head(self, run_id: str) -> RunHead:
        head = self._store.head(run_id)
        if head is None:
            raise UnknownRunError(run_id)
        return head

    def _log(self, run_id: str, *, until: int, measurements: bool | None = None) -> Iterator[LogEntry]:
        after: int | None = None
        while page := self._store.entries(run_id, limit=_REPLAY_PAGE, measurements=measurements, after=after):
            for entry in page:
                if entry.sequence > until:
                    return
                yield entry
            after = page[-1].sequence
