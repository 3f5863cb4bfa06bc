"""Operator commands: another policy, an override above it, or its release.

Every command is one line of the log and the next revision of the run's control. The policy's memory goes on: a new
policy decides on the averages of the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import datetime

from pydantic import ValidationError

from gns_controller.core.contract import Override
from gns_controller.core.errors import (
    BatchShapeError,
    InvalidInputError,
    NoOverrideError,
    RevisionConflictError,
    UnknownRunError,
)
from gns_controller.core.policies import AnyPolicyConfig
from gns_controller.core.policies.guards import LARGEST_BATCH_SIZE
from gns_controller.core.runs import Control, ControlAction, RunSpecification
from gns_controller.store import ControlBody, NewEntry, RunHead, Transaction, registration_of


@dataclass(frozen=True, slots=True)
class OperatorCommand:
    """One command, ready to be applied to a run as it is when the writer reaches it."""

    action: ControlAction
    note: str
    new_control: Callable[[Transaction, RunHead], Control]
    """Returns the control that the command leads to, still with the revision before; raises where it is refused."""


def apply_command(
    transaction: Transaction,
    run_id: str,
    command: OperatorCommand,
    *,
    revisions: Collection[int] | None,
    now: datetime,
) -> RunHead:
    """Append an operator command to the run's log. It takes effect at the next measurement.

    Args:
        transaction: the writer's.
        run_id: name of the run.
        command: what to do.
        revisions: the command is refused unless the present revision is one of these; None: any revision will do.
        now: the time.

    Raises:
        UnknownRunError: no run has this name.
        RevisionConflictError: another command has come first.
    """
    head = transaction.head(run_id)
    if head is None:
        raise UnknownRunError(run_id)
    before = head.control
    if revisions is not None and before.policy_revision not in revisions:
        raise RevisionConflictError(run_id, policy_revision=before.policy_revision)
    control = command.new_control(transaction, head)
    control = control.model_copy(update={"policy_revision": before.policy_revision + 1})
    head = replace(head, control=control, controlled_at=now)
    body = ControlBody(**dict(control), action=command.action, note=command.note)
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


def set_policy(policy: AnyPolicyConfig, *, note: str) -> OperatorCommand:
    """Let this policy decide; an override stays above it. Refused where the policy cannot steer the run."""

    def new_control(_: Transaction, head: RunHead) -> Control:
        check_for(head.specification, policy)
        return head.control.model_copy(update={"policy": policy})

    return OperatorCommand("policy", note, new_control)


def set_override(override: Override) -> OperatorCommand:
    """Pin or hold the batch, in the place of any override before.

    Refused: a pin that the present ranks cannot make, and one beyond what is left of the budget.
    """

    def new_control(transaction: Transaction, head: RunHead) -> Control:
        if override.global_batch_size is not None:
            if override.global_batch_size > LARGEST_BATCH_SIZE:
                raise BatchShapeError(f"no batch has more than 2^40 = {LARGEST_BATCH_SIZE} samples.")
            _refuse_beyond_budget(override.global_batch_size, head)
            grid = head.specification.batch.grid(data_parallel_size=_present_ranks(transaction, head))
            grid.factor(override.global_batch_size)  # raises where it cannot be made
        return head.control.model_copy(update={"override": override})

    return OperatorCommand("override", override.note, new_control)


def release_override(*, note: str) -> OperatorCommand:
    """Remove the override, so that the policy decides again. Refused where there is none."""

    def new_control(_: Transaction, head: RunHead) -> Control:
        if head.control.override is None:
            raise NoOverrideError(head.run_id)
        return head.control.model_copy(update={"override": None})

    return OperatorCommand("release", note, new_control)


def check_for(specification: RunSpecification, policy: AnyPolicyConfig) -> None:
    """Check that the run could have been registered with this policy.

    Raises:
        InvalidInputError: it could not; the message gives the reason.
    """
    try:
        RunSpecification.model_validate({**dict(specification), "policy": policy})
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise InvalidInputError(str(fault.get("ctx", {}).get("error", fault["msg"]))) from None


def _refuse_beyond_budget(pinned: int, head: RunHead) -> None:
    """Refuse a pin beyond what this attempt has left.

    The next attempt of a finished run may begin anywhere, and so may one without a measurement: there the whole budget
    counts.
    """
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
    """Return the ranks of the last measurement, or of the registration while this attempt has no measurement."""
    last = head.last_measurement
    if last is not None and last.attempt == head.attempt:
        return last.data_parallel_size
    newest = transaction.registrations(head.run_id)[-1]
    return registration_of(newest).specification.data_parallel_size
