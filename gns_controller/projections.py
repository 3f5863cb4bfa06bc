"""Projections of many runs, folded once for each state of a run: the schedule and /metrics ask for the same ones."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import NamedTuple

from gns_controller.core.projection import Projection, project
from gns_controller.store import RunHead

logger = logging.getLogger(__name__)

_MAX_KEPT = 1000
_RECENT_SHARE = 0.01
"""A projection is recent while less than this share of the budget has passed since."""


class _Kept(NamedTuple):
    key: tuple[int, int, int]
    plan_version: int
    optimizer_step: int
    samples_seen: int
    projection: Projection | None


class Projections:
    """The newest projection of each run, for as long as nothing has happened to the run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def present(self, head: RunHead) -> Projection | None:
        """From the run's present state; None before the first measurement and after the last."""
        last = head.last_measurement
        if last is None or last.samples_seen >= head.specification.budget_samples:
            return None
        key = (head.registered_sequence, head.state_sequence, head.policy_revision)
        with self._lock:
            kept = self._kept.get(head.run_id)
        if kept is not None and kept.key == key:
            return kept.projection
        projection = _projected(head)
        kept = _Kept(key, head.state.plan.version, last.optimizer_step, last.samples_seen, projection)
        with self._lock:
            self._kept[head.run_id] = kept
            self._kept.move_to_end(head.run_id)
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return projection

    def recent_steps_left(self, head: RunHead) -> int | None:
        """Optimizer steps to the end, from a projection under the same plan and policy; None without a recent one."""
        last = head.last_measurement
        with self._lock:
            kept = self._kept.get(head.run_id)
        if last is None or kept is None or kept.projection is None:
            return None
        passed = last.samples_seen - kept.samples_seen
        same = (kept.key[0], kept.key[2], kept.plan_version) == (
            head.registered_sequence,
            head.policy_revision,
            head.state.plan.version,
        )
        if not same or not 0 <= passed <= _RECENT_SHARE * head.specification.budget_samples:
            return None
        return max(kept.projection.steps_left.expected - (last.optimizer_step - kept.optimizer_step), 0)


def _projected(head: RunHead) -> Projection | None:
    specification, last = head.specification, head.last_measurement
    assert last is not None
    try:
        return project(
            head.policy,
            head.state,
            last,
            facts=specification.facts,
            schedule=specification.schedule,
            override=head.override,
        )
    except (ValueError, ArithmeticError):  # counts near 2^62: no plan ahead can be written down
        logger.debug("no projection: run_id=%s state_sequence=%d", head.run_id, head.state_sequence)
        return None
