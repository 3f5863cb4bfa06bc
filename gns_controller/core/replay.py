"""Fold a policy over what was recorded: what it did, or what another one would have done."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gns_controller.core.contract import (
    Count,
    Decision,
    FiniteFloat,
    FrozenModel,
    NoiseScaleMeasurement,
    PositiveCount,
    Reason,
)
from gns_controller.core.policies import AnyPolicyConfig, PolicyState, decide, initial_state
from gns_controller.core.projection import whole_steps
from gns_controller.core.runs import Control, RunSpecification


class Resumed(NamedTuple):
    """An incarnation of the run began, from a checkpoint with that many completed steps; the first with 0."""

    resume_step: int
    data_parallel_size: int | None = None
    """Ranks that it registered with; None: those of its first measurement."""


Event = Resumed | Control | NoiseScaleMeasurement
"""A line of a log: an attempt that began, a control that holds from here on, or a measurement."""


def replay(
    config: RunSpecification,
    events: Iterable[Event],
    *,
    follow_trainer: bool = False,
    policy: AnyPolicyConfig | None = None,
) -> list[Decision]:
    """The decisions on these measurements, in order, from the start of the run.

    Pure and deterministic: the same input gives the same decisions bit for bit, and replay of a prefix is a prefix
    of the replay. With every event of a run and `follow_trainer`, these are the decisions that were made.

    Args:
        config: the run's specification, with its first policy.
        events: measurements in the order in which they were stored, and what happened between them. Measurements alone
            are those of one attempt.
        follow_trainer: True takes the batch in force from each measurement, as the service does: exact for a run
            whose batch somebody else changed. False lets the policy's own earlier decisions stand: what it would have
            done.
        policy: ask this one instead, all run long; operator commands are then left out. If it does not follow the
            trainer, it counts steps of its own: those that its batches would have taken to the same samples. Its
            decisions carry them.
    """
    kept = list(events)
    fold = _Fold(config, resume_steps=resume_steps(kept), follow_trainer=follow_trainer, policy=policy)
    return [decision for event in kept if (decision := fold.after(event)) is not None]


def resume_steps(events: Iterable[Event]) -> set[int]:
    """The steps that attempts resume from."""
    return {event.resume_step for event in events if isinstance(event, Resumed)}


class _Steps(NamedTuple):
    """Optimizer steps that the replayed batches take, each in force from its effective step on."""

    taken: float
    """Shares of a step included: a measurement of the run that happened may lie inside of one."""
    samples: int
    in_force: int
    planned: int
    waiting: int = 0
    """Samples until the planned batch is in force."""

    @property
    def completed(self) -> int:
        """Whole steps."""
        return int(self.taken * (1 + 1e-9))

    def until(self, samples: int) -> _Steps:
        """When so many samples were seen."""
        fresh = max(samples - self.samples, 0)
        delayed = min(self.waiting, fresh)
        taken = self.taken + delayed / self.in_force + (fresh - delayed) / self.planned
        waiting = self.waiting - delayed
        in_force = self.in_force if waiting else self.planned
        return self._replace(taken=taken, samples=self.samples + fresh, in_force=in_force, waiting=waiting)

    def after_decision(self, batch_size: int, *, delay_steps: int) -> _Steps:
        """Return the count once this batch was decided on."""
        if batch_size == self.planned:
            return self
        return self._replace(planned=batch_size, waiting=self.waiting or delay_steps * self.in_force)


class _Fold:
    """Where a replay stands, and the states that a later attempt goes back to: those, and no others."""

    def __init__(
        self,
        config: RunSpecification,
        *,
        resume_steps: Iterable[int],
        follow_trainer: bool,
        policy: AnyPolicyConfig | None,
    ) -> None:
        self._config, self._follow_trainer, self._asked = config, follow_trainer, policy
        self._control = Control.initial(policy or config.policy)
        self._state: PolicyState | None = None
        first = config.batch.global_batch_size
        self._steps = self._no_steps = _Steps(taken=0.0, samples=0, in_force=first, planned=first)
        self._counts_its_own = policy is not None and not follow_trainer
        self._ranks: int | None = None
        self._resume_steps = sorted(set(resume_steps))
        self._kept: list[tuple[int, PolicyState, _Steps]] = []
        """Places in resume_steps, ascending, each with the newest state that an attempt may resume from there."""

    @property
    def policy(self) -> AnyPolicyConfig:
        """The one that was asked, or the last one in force."""
        return self._control.policy

    @property
    def steps(self) -> int:
        """Optimizer steps that the replayed batches have taken on the path to the last measurement."""
        return whole_steps(self._steps.taken)

    def after(self, event: Event) -> Decision | None:
        """The decision, where the event is a measurement."""
        if isinstance(event, Resumed):
            place = bisect_left(self._resume_steps, event.resume_step)
            resumed = (kept[1:] for kept in reversed(self._kept) if kept[0] <= place)
            self._state, self._steps = next(resumed, (None, self._no_steps))
            self._ranks = event.data_parallel_size
            return None
        if isinstance(event, Control):
            if self._asked is None:
                self._control = event
            return None
        ranks = self._ranks or event.data_parallel_size
        steps = self._steps.until(event.samples_seen)
        step = steps.completed if self._counts_its_own else event.optimizer_step
        self._state, decision = decide(
            self._control.policy,
            self._state or initial_state(self._config.batch, data_parallel_size=ranks),
            event.model_copy(update={"optimizer_step": step}) if self._counts_its_own else event,
            facts=self._config.facts,
            policy_revision=self._control.policy_revision,
            follow_trainer=self._follow_trainer,
            override=self._control.override,
        )
        delay = max(decision.plan.effective_step - step, 0)
        self._steps = steps.after_decision(decision.plan.global_batch_size, delay_steps=delay)
        self._keep(event.optimizer_step, self._state, self._steps)
        return decision

    def _keep(self, optimizer_step: int, state: PolicyState, steps: _Steps) -> None:
        place = bisect_left(self._resume_steps, optimizer_step)
        if place < len(self._resume_steps):
            while self._kept and self._kept[-1][0] >= place:
                self._kept.pop()
            self._kept.append((place, state, steps))


class ReplayedRow(FrozenModel):
    """One measurement: what was in force after it, and what would have been."""

    attempt: Count
    optimizer_step: Count
    """Of the run that happened."""
    samples_seen: Count
    happened_batch_size: PositiveCount
    """In shadow mode the trainer's, which no decision changes."""
    replayed_batch_size: PositiveCount
    replayed_reason: Reason
    replayed_explanation: str
    replayed_learning_rate_factor: FiniteFloat
    equal: bool | None
    """Whether the whole decision is the recorded one, bit for bit; None where none was recorded."""


class ReplayReport(FrozenModel):
    """A policy's answers to a recording, side by side with what happened.

    It can only fold what was measured: how gradients would have looked along another ramp, no replay knows.
    """

    policy: AnyPolicyConfig
    """The one that was asked, or the last one in force."""
    rows: tuple[ReplayedRow, ...]
    """Of the path that led to the last measurement: what a restart undid is left out."""
    num_compared: Count
    """Recorded decisions, of all attempts."""
    num_equal: Count
    samples: Count
    happened_steps: Count
    replayed_steps: Count
    """Optimizer steps that the replayed batches would have taken for the same samples."""
    steps_saved: int
    """happened - replayed."""


def compare(
    config: RunSpecification,
    events: Sequence[Event],
    *,
    recorded: Sequence[Decision] = (),
    follow_trainer: bool = False,
    policy: AnyPolicyConfig | None = None,
) -> ReplayReport:
    """Replay, and count.

    Args:
        config: the run's specification.
        events: as for `replay`.
        recorded: the decisions that were made, one per measurement, or none.
        follow_trainer: as for `replay`.
        policy: as for `replay`.
    """
    decisions = iter(recorded)
    log = ((event, next(decisions, None) if isinstance(event, NoiseScaleMeasurement) else None) for event in events)
    return compare_log(config, log, resume_steps=resume_steps(events), follow_trainer=follow_trainer, policy=policy)


def compare_log(
    config: RunSpecification,
    log: Iterable[tuple[Event, Decision | None]],
    *,
    resume_steps: Iterable[int],
    follow_trainer: bool = False,
    policy: AnyPolicyConfig | None = None,
) -> ReplayReport:
    """The same for a log that is too long to hold: each event once, with the decision that was made, if any.

    Args:
        config: the run's specification.
        log: events as for `replay`.
        resume_steps: of every attempt in the log.
        follow_trainer: as for `replay`.
        policy: as for `replay`.
    """
    fold = _Fold(config, resume_steps=resume_steps, follow_trainer=follow_trainer, policy=policy)
    rows: list[ReplayedRow] = []
    num_compared = num_equal = 0
    is_followed = config.mode == "active"
    for event, before in log:
        decision = fold.after(event)
        if isinstance(event, Resumed):
            rows = [row for row in rows if row.optimizer_step <= event.resume_step]
        elif isinstance(event, NoiseScaleMeasurement):
            assert decision is not None
            num_compared += before is not None
            num_equal += before == decision
            happened = before.plan.global_batch_size if before and is_followed else event.global_batch_size
            rows.append(
                ReplayedRow(
                    attempt=event.attempt,
                    optimizer_step=event.optimizer_step,
                    samples_seen=event.samples_seen,
                    happened_batch_size=happened,
                    replayed_batch_size=decision.plan.global_batch_size,
                    replayed_reason=decision.reason,
                    replayed_explanation=decision.explanation,
                    replayed_learning_rate_factor=decision.plan.learning_rate_factor,
                    equal=None if before is None else before == decision,
                )
            )
    happened_steps, replayed_steps = (rows[-1].optimizer_step, fold.steps) if rows else (0, 0)
    return ReplayReport(
        policy=fold.policy,
        rows=tuple(rows),
        num_compared=num_compared,
        num_equal=num_equal,
        samples=rows[-1].samples_seen if rows else 0,
        happened_steps=happened_steps,
        replayed_steps=replayed_steps,
        steps_saved=happened_steps - replayed_steps,
    )
