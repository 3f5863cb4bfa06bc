"""Use cases of the service: register, ingest, operator commands, and questions about runs.

The controller is handed its store, metrics and clock. Writes are jobs for the store's writer and return futures that
resolve once the disk has them; then the metrics are counted and subscribers are notified. Reads go to `RunQueries`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import Any, TypeVar

from gns_controller.core.contract import NoiseScaleMeasurement, Override
from gns_controller.core.policies import AnyPolicyConfig
from gns_controller.core.replay import ReplayReport
from gns_controller.core.runs import IngestReply, PolicyView, Registration, RunView, ScheduleView
from gns_controller.service import operators
from gns_controller.service.ingest import Ingest, Ingested, Registered
from gns_controller.service.metrics import LiveRuns, Metrics
from gns_controller.service.queries import QueryLimits, RunQueries
from gns_controller.service.subscriptions import Subscriptions
from gns_controller.service.views import policy_view
from gns_controller.store import LogEntry, Store, Transaction

Result = TypeVar("Result")


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
        self.subscriptions = Subscriptions()
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._ingest = Ingest(metrics=metrics, clock=clock)
        limits = QueryLimits(
            silent_after_seconds=silent_after_seconds,
            metrics_retention_seconds=metrics_retention_seconds,
            metrics_max_runs=metrics_max_runs,
            replay_max_measurements=replay_max_measurements,
        )
        self._queries = RunQueries(store=store, clock=clock, limits=limits)

    # ---------------------------------------------------------------- writes

    def register(self, run_id: str, registration: Registration) -> Future[Registered]:
        """Register an incarnation of a run; the same one again changes nothing.

        The future raises RunConflictError if the run exists with another specification, StaleAttemptError if a newer
        incarnation has registered since.
        """
        return self._submit(run_id, lambda transaction: self._ingest.register(transaction, run_id, registration))

    def ingest(self, run_id: str, measurements: Sequence[NoiseScaleMeasurement]) -> Future[IngestReply]:
        """Store and decide measurements, ascending in optimizer_step; those already stored are skipped.

        All or none: the future raises InvalidInputError, StaleAttemptError, UnknownRunError or PolicyPlugInError, and
        then nothing of the request was recorded.
        """
        future = self._store.submit(lambda transaction: self._ingest.ingest(transaction, run_id, measurements))
        replied: Future[IngestReply] = Future()

        def finish(done: Future[Ingested]) -> None:
            error = done.exception()
            if error is not None:
                replied.set_exception(error)
                return
            ingested = done.result()
            self._count(measurements, ingested)
            self.subscriptions.notify(run_id)
            replied.set_result(ingested.reply)

        replied.set_running_or_notify_cancel()
        future.add_done_callback(finish)
        return replied

    def set_policy(
        self, run_id: str, policy: AnyPolicyConfig, *, revisions: Collection[int] | None, note: str = ""
    ) -> Future[PolicyView]:
        """Let this policy decide from the next measurement on.

        The future raises InvalidInputError if it cannot steer this run; for `revisions` and other errors see
        `operators.apply_command`.
        """
        return self._apply(run_id, operators.set_policy(policy, note=note), revisions)

    def set_override(self, run_id: str, override: Override, *, revisions: Collection[int] | None) -> Future[PolicyView]:
        """Put this above the policy from the next measurement on.

        The future raises BatchShapeError for a pinned batch that the present ranks cannot make, or beyond the budget.
        """
        return self._apply(run_id, operators.set_override(override), revisions)

    def release_override(self, run_id: str, *, revisions: Collection[int] | None, note: str = "") -> Future[PolicyView]:
        """Remove the override. The future raises NoOverrideError if there is none."""
        return self._apply(run_id, operators.release_override(note=note), revisions)

    # ---------------------------------------------------------------- reads

    def view(self, run_id: str) -> RunView:
        """Return the view of one run.

        Raises:
            UnknownRunError: no run has this name. So it is for every question about one run.
        """
        return self._queries.view(run_id)

    def views(self, *, limit: int, before: int | None = None) -> list[tuple[int, RunView]]:
        """Return runs with their positions, newest registration first, from before that position."""
        return self._queries.views(limit=limit, before=before)

    def policy(self, run_id: str) -> PolicyView:
        """Return the control of a run."""
        return self._queries.policy(run_id)

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
        return self._queries.entries(run_id, limit=limit, measurements=measurements, after=after, descending=descending)

    def schedule(self, run_id: str) -> ScheduleView:
        """Return the plans so far and what is expected to come."""
        return self._queries.schedule(run_id)

    def place_in_schedule(self, run_id: str) -> tuple[int, int]:
        """Return attempt and version of the present plan."""
        return self._queries.place_in_schedule(run_id)

    def live_runs(self) -> LiveRuns:
        """Return recent runs for /metrics."""
        return self._queries.live_runs()

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
            ReplayTooLongError: more measurements than the settings allow.
            ReplayBusyError: another one is running.
            InvalidInputError: the policy cannot steer this run.
            PolicyPlugInError: a policy of the run, or the given one, cannot be run here.
        """
        return self._queries.replay(run_id, policy=policy, follow_trainer=follow_trainer)

    # ---------------------------------------------------------------- health

    def check(self) -> None:
        """Write and read the store.

        Raises:
            StoreError: it does not work now.
        """
        self._store.check(timeout_seconds=5.0)

    def num_queued(self) -> int:
        """Return the number of writes that wait."""
        return self._store.num_queued()

    # ---------------------------------------------------------------- inside

    def _apply(
        self, run_id: str, command: operators.OperatorCommand, revisions: Collection[int] | None
    ) -> Future[PolicyView]:
        def job(transaction: Transaction) -> PolicyView:
            head = operators.apply_command(transaction, run_id, command, revisions=revisions, now=self._clock())
            return policy_view(head, state=self._queries.state_of(head))

        return self._submit(run_id, job)

    def _submit(self, run_id: str, job: Callable[[Transaction], Result]) -> Future[Result]:
        """Queue a write; subscribers of the run are notified once it is committed."""
        future = self._store.submit(job)
        future.add_done_callback(lambda done: self._announce(run_id, done))
        return future

    def _announce(self, run_id: str, done: Future[Any]) -> None:
        if not done.cancelled() and done.exception() is None:
            self.subscriptions.notify(run_id)

    def _count(self, measurements: Sequence[NoiseScaleMeasurement], ingested: Ingested) -> None:
        self._metrics.measurements.inc(ingested.reply.accepted)
        self._metrics.duplicates.inc(ingested.reply.duplicates)
        for decision in ingested.decisions:
            self._metrics.decisions.labels(reason=decision.reason).inc()
        stored = {decision.optimizer_step for decision in ingested.decisions}
        odd = {m.optimizer_step for m in measurements if not all(reading.is_finite for reading in m.readings)}
        self._metrics.not_finite.inc(len(odd & stored))
