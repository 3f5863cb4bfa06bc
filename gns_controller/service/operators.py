"""What operators may say about a run, what their words do to it, and the log as replay reads it.

Every word is a line of the log with a revision of its own. The policy's memory goes on: a new policy decides on the
averages of the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple

from pydantic import ValidationError

from gns_controller.core.batch_arithmetic import factor_batch
from gns_controller.core.contract import Decision, Override
from gns_controller.core.errors import (
    BatchShapeError,
    DatabaseCorruptError,
    InvalidInputError,
    NoOverrideError,
    RevisionConflictError,
    UnknownRunError,
)
from gns_controller.core.policies import AnyPolicyConfig
from gns_controller.core.policies.guards import LARGEST_BATCH_SIZE
from gns_controller.core.replay import Controlled, Event, Resumed
from gns_controller.core.runs import (
    ControlAction,
    PolicyView,
    RecordedAttempt,
    RecordedControl,
    Registration,
    RunSpecification,
    RunState,
)
from gns_controller.store import ControlBody, LogEntry, MeasurementBody, NewEntry, RunHead, Transaction


class Word(NamedTuple):
    """What an operator says."""

    action: ControlAction
    policy: AnyPolicyConfig
    override: Override | None
    note: str


Speech = Callable[[Transaction, RunHead], Word]
"""A word in the light of the run as it is."""


def speak(
    transaction: Transaction, run_id: str, speech: Speech, *, revisions: Collection[int] | None, now: datetime
) -> RunHead:
    """Write an operator's word into the log; it holds from the next measurement on.

    Args:
        transaction: of the writer.
        run_id: name of the run.
        speech: what to say.
        revisions: refused unless the present revision is one of them; None: whatever it is.
        now: the time.

    Raises:
        UnknownRunError: no run has this name.
        RevisionConflictError: somebody has spoken since.
    """
    head = transaction.head(run_id)
    if head is None:
        raise UnknownRunError(run_id)
    if revisions is not None and head.policy_revision not in revisions:
        raise RevisionConflictError(run_id, policy_revision=head.policy_revision)
    word = speech(transaction, head)
    head = replace(
        head,
        policy=word.policy,
        policy_revision=head.policy_revision + 1,
        override=word.override,
        controlled_at=now,
    )
    body = ControlBody(
        policy=head.policy,
        policy_revision=head.policy_revision,
        override=head.override,
        action=word.action,
        note=word.note,
    )
    entry = NewEntry(
        run_id=run_id,
        attempt=head.attempt,
        kind="control",
        optimizer_step=None,
        samples_seen=None,
        changes_plan=False,
        body=body.model_dump_json(),
        state=head.state.model_dump_json(),
        at=now,
    )
    transaction.append([entry])
    transaction.put_head(head)
    return head


def new_policy(policy: AnyPolicyConfig, *, note: str) -> Speech:
    """Let this policy decide; an override stays above it."""

    def speech(_: Transaction, head: RunHead) -> Word:
        check_for(head.specification, policy)
        return Word("policy", policy, head.override, note)

    return speech


def new_override(override: Override) -> Speech:
    """Pin or hold, in the place of an override that there may be.

    Refuses a pin that the present ranks cannot make, and one beyond what is left of the budget.
    """

    def speech(transaction: Transaction, head: RunHead) -> Word:
        if override.global_batch_size is not None:
            if override.global_batch_size > LARGEST_BATCH_SIZE:
                raise BatchShapeError(f"no batch has more than 2^40 = {LARGEST_BATCH_SIZE} samples.")
            _refuse_beyond_budget(override.global_batch_size, head)
            rules = head.specification.batch
            factor_batch(
                override.global_batch_size,
                micro_batch_size=rules.micro_batch_size,
                data_parallel_size=_present_ranks(transaction, head),
                micro_batch_granularity=rules.micro_batch_granularity,
            )
        return Word("override", head.policy, override, override.note)

    return speech


def release(*, note: str) -> Speech:
    """Give the word back to the policy."""

    def speech(_: Transaction, head: RunHead) -> Word:
        if head.override is None:
            raise NoOverrideError(head.run_id)
        return Word("release", head.policy, None, note)

    return speech


def check_for(specification: RunSpecification, policy: AnyPolicyConfig) -> None:
    """Whether this run could have been registered with this policy.

    Raises:
        InvalidInputError: it could not; the message says why.
    """
    try:
        RunSpecification.model_validate({**dict(specification), "policy": policy})
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise InvalidInputError(str(fault.get("ctx", {}).get("error", fault["msg"]))) from None


def policy_view(head: RunHead, *, state: RunState) -> PolicyView:
    """Who decides."""
    return PolicyView(
        run_id=head.run_id,
        state=state,
        policy=head.policy,
        policy_revision=head.policy_revision,
        override=head.override,
        changed_at=head.controlled_at,
    )


def recorded_event(entry: LogEntry) -> RecordedAttempt | RecordedControl:
    """A line of the log that is no measurement, as the API shows it."""
    if entry.kind == "registered":
        registration = Registration.model_validate_json(entry.body)
        return RecordedAttempt(
            sequence=entry.sequence,
            received_at=entry.at,
            attempt=entry.attempt,
            resume_step=registration.resume_step,
            data_parallel_size=registration.specification.data_parallel_size,
        )
    body = ControlBody.model_validate_json(entry.body)
    return RecordedControl(sequence=entry.sequence, received_at=entry.at, **dict(body))


def replay_log(entries: Iterable[LogEntry]) -> Iterator[tuple[Event, Decision | None]]:
    """The log, or a part of it, as replay reads it, with the decisions that were made.

    Raises:
        DatabaseCorruptError: a line cannot be read.
    """
    for entry in entries:
        try:
            if entry.kind == "measurement":
                body = MeasurementBody.model_validate_json(entry.body)
                event: tuple[Event, Decision | None] = body.measurement, body.decision
            else:
                event = replay_event(recorded_event(entry)), None
        except ValidationError:
            raise DatabaseCorruptError(
                f"line {entry.sequence} of the log is damaged, or of another version: this controller cannot read it."
            ) from None
        yield event


def replay_event(recorded: RecordedAttempt | RecordedControl) -> Event:
    """What replay makes of it."""
    if isinstance(recorded, RecordedAttempt):
        return Resumed(recorded.resume_step, recorded.data_parallel_size)
    return Controlled(recorded.policy, recorded.policy_revision, recorded.override)


def _refuse_beyond_budget(pinned: int, head: RunHead) -> None:
    """A finished run's word is for its next attempt, which may begin anywhere; so may one without a measurement."""
    budget, last = head.specification.budget_samples, head.last_measurement
    left = budget
    if last is not None and last.attempt == head.attempt and budget - last.samples_seen >= last.data_parallel_size:
        left = budget - last.samples_seen
    if pinned > max(left, head.state.plan.global_batch_size):
        raise BatchShapeError(
            f"{pinned} samples in one step are more than this run has left: {left} of the {budget} samples of its "
            f"budget. Pin a smaller batch."
        )


def _present_ranks(transaction: Transaction, head: RunHead) -> int:
    """Of the last measurement; of the registration while this attempt has none."""
    last = head.last_measurement
    if last is not None and last.attempt == head.attempt:
        return last.data_parallel_size
    newest = transaction.registrations(head.run_id)[-1]
    return Registration.model_validate_json(newest.body).specification.data_parallel_size
