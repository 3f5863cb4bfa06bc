"""Fold a policy over what was recorded: what it did, or what another one would have done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gns_controller.core.contract import (
    Count,
    Decision,
    FiniteFloat,
    FrozenModel,
    NoiseScaleMeasurement,
    Override,
    PositiveCount,
    Reason,
)
from gns_controller.core.policies import AnyPolicyConfig, PolicyState, decide, initial_state
from gns_controller.core.runs import RunSpecification


class Resumed(NamedTuple):
    """An incarnation of the run began, from a checkpoint with that many completed steps; the first with 0."""

    resume_step: int
    data_parallel_size: int | None = None
    """Ranks that it registered with; None: those of its first measurement."""


class Controlled(NamedTuple):
    """An operator changed the policy or the override."""

    policy: AnyPolicyConfig
    policy_revision: int
    override: Override | None


Event = Resumed | Controlled | NoiseScaleMeasurement


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
        policy: ask this one instead, all run long; operators' words are then left out.
    """
    present, revision, override = policy or config.policy, 0, None
    ranks: int | None = None
    decisions: list[Decision] = []
    state: PolicyState | None = None
    known: list[tuple[int, PolicyState]] = []
    for event in events:
        if isinstance(event, Resumed):
            state = next((kept for step, kept in reversed(known) if step <= event.resume_step), None)
            ranks = event.data_parallel_size
        elif isinstance(event, Controlled):
            if policy is None:
                present, revision, override = event
        else:
            state = state or initial_state(config.batch, data_parallel_size=ranks or event.data_parallel_size)
            state, decision = decide(
                present,
                state,
                event,
                facts=config.facts,
                policy_revision=revision,
                follow_trainer=follow_trainer,
                override=override,
            )
            known.append((event.optimizer_step, state))
            decisions.append(decision)
    return decisions


class ReplayedRow(FrozenModel):
    """One measurement: what was in force after it, and what would have been."""

    attempt: Count
    optimizer_step: Count
    """Of the run that happened."""
    samples_seen: Count
    happened_batch_size: PositiveCount
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
    replayed = replay(config, events, follow_trainer=follow_trainer, policy=policy)
    rows: list[ReplayedRow] = []
    index = 0
    for event in events:
        if isinstance(event, Resumed):
            rows = [row for row in rows if row.optimizer_step <= event.resume_step]
        elif isinstance(event, NoiseScaleMeasurement):
            decision, before = replayed[index], recorded[index] if recorded else None
            rows.append(
                ReplayedRow(
                    attempt=event.attempt,
                    optimizer_step=event.optimizer_step,
                    samples_seen=event.samples_seen,
                    happened_batch_size=before.plan.global_batch_size if before else event.global_batch_size,
                    replayed_batch_size=decision.plan.global_batch_size,
                    replayed_reason=decision.reason,
                    replayed_explanation=decision.explanation,
                    replayed_learning_rate_factor=decision.plan.learning_rate_factor,
                    equal=None if before is None else before == decision,
                )
            )
            index += 1
    steps = _steps(config, rows)
    happened = rows[-1].optimizer_step if rows else 0
    return ReplayReport(
        policy=policy or config.policy,
        rows=tuple(rows),
        num_compared=len(recorded),
        num_equal=sum(before == after for before, after in zip(recorded, replayed, strict=False)),
        samples=rows[-1].samples_seen if rows else 0,
        happened_steps=happened,
        replayed_steps=steps,
        steps_saved=happened - steps,
    )


def _steps(config: RunSpecification, rows: Sequence[ReplayedRow]) -> int:
    """Optimizer steps to the last row's samples, each decision in force decision_delay_steps after its measurement."""
    steps, samples = 0.0, 0
    before = batch = config.batch.global_batch_size
    for row in rows:
        fresh = row.samples_seen - samples
        delayed = min(config.batch.decision_delay_steps * before, fresh) if before != batch else 0
        steps += delayed / before + (fresh - delayed) / batch
        samples, before, batch = row.samples_seen, batch, row.replayed_batch_size
    return round(steps)
