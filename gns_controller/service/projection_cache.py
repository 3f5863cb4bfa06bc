"""What is expected of many runs, worked out once for each state: the schedule and /metrics ask again and again."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

from gns_controller.core.errors import PolicyPlugInError
from gns_controller.core.projection import Projection, project
from gns_controller.store import RunHead

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

_MAX_PROJECTIONS = 1000
_RECENT_SHARE = 0.01
"""A projection is recent while less than this share of the budget has passed since."""


class StateKey(NamedTuple):
    """The same for as long as nothing has happened to a run."""

    registered_sequence: int
    state_sequence: int
    policy_revision: int


def key_of(head: RunHead) -> StateKey:
    """The key of the run's present state."""
    return StateKey(head.registered_sequence, head.state_sequence, head.control.policy_revision)


class Newest(Generic[Value]):
    """One value for each of the runs that were last asked about. Any thread may ask.

    Args:
        limit: most runs.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[StateKey, Value]] = OrderedDict()

    def get(self, run_id: str) -> tuple[StateKey, Value] | None:
        """The value, and of which state."""
        with self._lock:
            return self._kept.get(run_id)

    def put(self, head: RunHead, value: Value) -> None:
        """Keep the value of the run's present state."""
        with self._lock:
            self._kept[head.run_id] = (key_of(head), value)
            self._kept.move_to_end(head.run_id)
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)


class _Folded(NamedTuple):
    projection: Projection | None
    plan_version: int
    global_batch_size: int
    """In force: a trainer may have changed it on its own, within one version, and does in shadow mode."""
    optimizer_step: int
    samples_seen: int


class Projections:
    """The newest projection of each run."""

    def __init__(self) -> None:
        self._newest: Newest[_Folded] = Newest(_MAX_PROJECTIONS)

    def present(self, head: RunHead) -> Projection | None:
        """From the run's present state; None before the first measurement and after the last."""
        last = head.last_measurement
        if last is None or last.samples_seen >= head.specification.budget_samples:
            return None
        kept = self._newest.get(head.run_id)
        if kept is not None and kept[0] == key_of(head):
            return kept[1].projection
        folded = _Folded(_projected(head), *_in_force(head), last.optimizer_step, last.samples_seen)
        self._newest.put(head, folded)
        return folded.projection

    def recent_steps_left(self, head: RunHead) -> int | None:
        """Optimizer steps to the end, from a projection under the same plan and policy; None without a recent one.

        After the last measurement 0, so that the series ends where the run does and does not vanish.
        """
        last, kept = head.last_measurement, self._newest.get(head.run_id)
        if last is not None and last.samples_seen >= head.specification.budget_samples:
            return 0
        if last is None or kept is None or kept[1].projection is None:
            return None
        key, folded = kept
        present = key_of(head)._replace(state_sequence=key.state_sequence)
        passed = last.samples_seen - folded.samples_seen
        is_recent = 0 <= passed <= _RECENT_SHARE * head.specification.budget_samples
        same_plan = (folded.plan_version, folded.global_batch_size) == _in_force(head)
        if key != present or not same_plan or not is_recent:
            return None
        return max(kept[1].projection.steps_left.expected - (last.optimizer_step - folded.optimizer_step), 0)


def _in_force(head: RunHead) -> tuple[int, int]:
    """Plan version, and the batch that steps are counted by."""
    plan, last = head.state.plan, head.last_measurement
    if last is not None and head.specification.mode == "shadow":
        return plan.version, last.global_batch_size
    return plan.version, plan.global_batch_size


def _projected(head: RunHead) -> Projection | None:
    specification, last = head.specification, head.last_measurement
    assert last is not None
    try:
        return project(
            head.control.policy,
            head.state,
            last,
            facts=specification.facts,
            schedule=specification.schedule,
            override=head.control.override,
            shadow=specification.mode == "shadow",
        )
    except (ValueError, ArithmeticError, PolicyPlugInError):  # counts near 2^62, or a policy that cannot be run here
        logger.debug("no projection: run_id=%s state_sequence=%d", head.run_id, head.state_sequence)
        return None
