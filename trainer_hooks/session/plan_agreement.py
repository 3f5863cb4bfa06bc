"""The plan that every rank follows, and how they come to the same one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gns_controller.core.contract import BatchPlan, Decision
from gns_controller.core.policies import PolicyState
from gns_controller.core.runs import RunSpecification
from trainer_hooks.client import Controller, Verdict, saved_orders
from trainer_hooks.distributed.collectives import RankGroup, broadcast_plan
from trainer_hooks.optim.protocols import NotifiedOfBatchChange
from trainer_hooks.session.checks import reachable_plan

logger = logging.getLogger(__name__)


class Agreement:
    """Which plan is in force, the same on every rank, and who has heard of it.

    Args:
        ranks: everybody who holds a part or a copy of the model.
        data_parallel_size: ranks that see different samples.
        controller: on rank 0, None elsewhere.
        optimizers: hear of another batch by `on_batch_change`.
        deadline_seconds: that rank 0 may wait for the controller while the others wait for rank 0.
        on_decision: hears of decisions on rank 0.
    """

    def __init__(
        self,
        *,
        run_id: str,
        specification: RunSpecification,
        ranks: RankGroup,
        data_parallel_size: int,
        controller: Controller | None,
        optimizers: Sequence[torch.optim.Optimizer],
        plan: BatchPlan,
        deadline_seconds: float,
        on_decision: Callable[[Decision, str], None] | None,
    ) -> None:
        self.plan = plan
        """In force for the next step."""
        self._run_id = run_id
        self._specification = specification
        self._ranks = ranks
        self._data_parallel_size = data_parallel_size
        self._controller = controller
        self._optimizers = optimizers
        self._deadline_seconds = deadline_seconds
        self._on_decision = on_decision
        self._measured_steps: list[int] = []
        """Whose decisions have not come into force."""
        self._told_batch_size = plan.global_batch_size
        """What optimizers have heard of."""
        self._cut_version: int | None = None
        """Of the latest plan that these ranks cannot make, which was told."""

    def expect(self, optimizer_step: int) -> None:
        """A decision about this measured step."""
        self._measured_steps.append(optimizer_step)

    def settle(self, optimizer_step: int) -> None:
        """Before the next step: take the plan that comes into force now, if any, and tell optimizers. Every rank.

        All ranks count the same measured steps, so that all or none reach the broadcast.
        """
        due = [
            step for step in self._measured_steps if self._specification.batch.effective_step(step) <= optimizer_step
        ]
        if due:  # of those that waited for one boundary the newest has the last word: one exchange, not one for each
            del self._measured_steps[: len(due)]
            self._exchange(due[-1], optimizer_step=optimizer_step)
        self._tell_optimizers(optimizer_step)

    def state_dict(self) -> dict[str, Any]:
        """For the session's checkpoint, the same on every rank: the policy's memory is broadcast. Every rank."""
        message = None
        if self._controller is not None:
            pending = self._controller.pending.items()
            message = {
                "policy_state": self._controller.state.model_dump(mode="json"),
                "pending": {step: decision.model_dump(mode="json") for step, decision in pending},
                "orders": saved_orders(self._controller.orders),
            }
        shared = self._ranks.broadcast_message(message)
        delay = self._specification.batch.decision_delay_steps
        return {
            "plan": self.plan.model_dump(mode="json"),
            **{name: shared[name] for name in ("policy_state", "pending", "orders")},
            "due_exchanges": [step + delay for step in self._measured_steps],
            "told_batch_size": self._told_batch_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, its plan cut for these ranks; what the controller remembers is its own."""
        saved = BatchPlan.model_validate(state["plan"])
        self.plan = self._reachable(saved, PolicyState.model_validate(state["policy_state"]))
        delay = self._specification.batch.decision_delay_steps
        self._measured_steps = [int(step) - delay for step in state["due_exchanges"]]
        self._told_batch_size = int(state.get("told_batch_size", saved.global_batch_size))
        optimizer_step = int(state["optimizer_step"])
        changed = self.plan.global_batch_size != saved.global_batch_size
        if changed and not self._is_boundary(optimizer_step) and self._ranks.rank == 0:
            logger.warning(
                "the batch changes between two outer steps, so the next one mixes two batches: optimizer_step=%d "
                "plan_interval_steps=%d",
                optimizer_step,
                self._specification.batch.plan_interval_steps,
            )
        self._tell_optimizers(optimizer_step)

    def _is_boundary(self, optimizer_step: int) -> bool:
        return optimizer_step % self._specification.batch.plan_interval_steps == 0

    def _tell_optimizers(self, optimizer_step: int) -> None:
        """Of a batch they have not heard of. One that attach cut between two boundaries waits for the next."""
        before, batch_size = self._told_batch_size, self.plan.global_batch_size
        if batch_size == before or not self._is_boundary(optimizer_step):
            return
        self._told_batch_size = batch_size
        for optimizer in self._optimizers:
            if isinstance(optimizer, NotifiedOfBatchChange):
                optimizer.on_batch_change(global_batch_size=batch_size, previous=before)

    def _reachable(self, plan: BatchPlan, memory: PolicyState) -> BatchPlan:
        """The plan as these ranks can make it: one of before a resume may be made for others."""
        found = reachable_plan(plan, self._specification.batch, memory, data_parallel_size=self._data_parallel_size)
        cut = found.global_batch_size != plan.global_batch_size
        if cut and plan.version != self._cut_version and self._ranks.rank == 0:
            logger.warning(
                "batch is not reachable on this many ranks: data_parallel_size=%d global_batch_size=%d->%d",
                self._data_parallel_size,
                plan.global_batch_size,
                found.global_batch_size,
            )
            self._cut_version = plan.version
        return found

    def _exchange(self, measured_step: int, *, optimizer_step: int) -> None:
        """All ranks take rank 0's plan. Rank 0 waits for the controller no longer than the deadline."""
        proposed: BatchPlan | None = None
        verdict: Verdict | None = None
        if self._controller is not None:
            try:
                verdict = self._controller.verdict(
                    optimizer_step=measured_step, deadline_seconds=self._deadline_seconds
                )
                if self._specification.mode == "active":
                    proposed = self._reachable(verdict.plan, self._controller.state)
            except Exception:
                # Whatever fails here, the other ranks wait in the broadcast: keep the plan and go on.
                logger.exception("no decision, keeping plan: run_id=%s optimizer_step=%d", self._run_id, measured_step)
            if proposed is None:
                proposed = self.plan
        plan = broadcast_plan(self._ranks, current=self.plan, proposed=proposed)
        if plan.global_batch_size != self.plan.global_batch_size and self._ranks.rank == 0:
            logger.info(
                "batch changes: run_id=%s optimizer_step=%d global_batch_size=%d->%d learning_rate_factor=%.4g",
                self._run_id,
                optimizer_step,
                self.plan.global_batch_size,
                plan.global_batch_size,
                plan.learning_rate_factor,
            )
        self.plan = plan
        if verdict is not None and self._on_decision is not None:
            try:
                self._on_decision(verdict.decision, verdict.source)
            except Exception:
                logger.exception("on_decision failed, training goes on: run_id=%s", self._run_id)
