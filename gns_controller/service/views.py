"""Views of a run: its state, its control, its schedule, its metrics. Pure; the caller brings the time."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from gns_controller.core.contract import BatchPlan
from gns_controller.core.policies import PolicyState
from gns_controller.core.projection import Projection, Savings, advised_data_parallel_size, savings
from gns_controller.core.runs import PolicyView, RunState, RunView, ScheduleView
from gns_controller.service.metrics import LiveRun
from gns_controller.store import LogEntry, RunHead, registration_of

_SILENT_GAPS = 10.0
"""A run is silent after this many times its usual gap, if that is longer than the setting."""


def run_state(head: RunHead, *, now: datetime, silent_after_seconds: float) -> RunState:
    """Return what the run seems to be doing, judged by its reports alone."""
    measurement = head.last_measurement
    if measurement is None or head.last_report_at is None:
        return "registered"
    # A remainder smaller than one sample per rank is left over.
    left = head.specification.budget_samples - measurement.samples_seen
    if measurement.attempt == head.attempt and left < measurement.data_parallel_size:
        return "finished"
    patience = max(silent_after_seconds, _SILENT_GAPS * (head.usual_gap_seconds or 0.0))
    quiet = now - max(head.last_report_at, head.attempt_at)
    return "silent" if quiet > timedelta(seconds=patience) else "running"


def view_of(head: RunHead, *, state: RunState) -> RunView:
    """Return the run as lists and the page show it."""
    measurement = head.last_measurement
    return RunView(
        **dict(head.control),
        run_id=head.run_id,
        state=state,
        specification=head.specification,
        attempt=head.attempt,
        optimizer_step=measurement.optimizer_step if measurement else 0,
        samples_seen=measurement.samples_seen if measurement else 0,
        plan=head.state.plan,
        last_measurement=measurement,
        last_decision=head.last_decision,
        num_measurements=head.num_measurements,
        registered_at=head.registered_at,
        last_report_at=head.last_report_at,
        savings=_savings(head),
        advised_data_parallel_size=_advised(head),
    )


def policy_view(head: RunHead, *, state: RunState) -> PolicyView:
    """Return the run's control as the API shows it."""
    return PolicyView(**dict(head.control), run_id=head.run_id, state=state, changed_at=head.controlled_at)


def live_run_of(head: RunHead, *, state: RunState, steps_left: int | None) -> LiveRun:
    """Return the run as /metrics shows it."""
    saved = _savings(head)
    plan, measurement = head.state.plan, head.last_measurement
    return LiveRun(
        run_id=head.run_id,
        state=state,
        budget_samples=head.specification.budget_samples,
        smoothed=head.state.smoothed,
        learning_rate_factor=plan.learning_rate_factor,
        global_batch_size=measurement.global_batch_size if measurement else plan.global_batch_size,
        measurement=measurement,
        decision=head.last_decision,
        last_report_timestamp_seconds=head.last_report_at.timestamp() if head.last_report_at else None,
        policy_revision=head.control.policy_revision,
        override_active=head.control.override is not None,
        advised_data_parallel_size=_advised(head),
        steps_saved=saved.steps_saved if saved else None,
        seconds_saved=saved.seconds_saved if saved else None,
        steps_left=steps_left,
    )


def schedule_view(head: RunHead, plan_changes: Iterable[LogEntry], projection: Projection | None) -> ScheduleView:
    """Return the plans that led to the present one, and what is expected to come.

    A restart from an older checkpoint undoes the plans beyond it: they are in the decisions, not in the schedule.
    """
    plans: list[BatchPlan] = []
    for entry in plan_changes:
        if entry.kind == "registered":
            resume_step = registration_of(entry).resume_step
            plans = [plan for plan in plans if plan.effective_step <= resume_step]
        plan = PolicyState.model_validate_json(entry.state).plan
        if not plans or plans[-1] != plan:
            plans.append(plan)
    return ScheduleView(
        run_id=head.run_id,
        attempt=head.attempt,
        plans=tuple(plans),
        projection=projection,
        savings=_savings(head),
        advised_data_parallel_size=_advised(head),
    )


def _savings(head: RunHead) -> Savings | None:
    last = head.last_measurement
    return None if last is None else savings(head.state, last, facts=head.specification.facts)


def _advised(head: RunHead) -> int:
    run = head.specification
    return advised_data_parallel_size(head.state, head.last_measurement, facts=run.facts, shadow=run.mode == "shadow")
