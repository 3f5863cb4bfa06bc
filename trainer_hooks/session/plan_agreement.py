"""Plan agreement: the batch plan that every rank follows, and how all ranks come to the same one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import BatchPlan
from gns_controller.core.policies import PolicyState, plan_for
from gns_controller.core.runs import RunSpecification
from trainer_hooks.client import DecisionClient, Verdict, saved_control
from trainer_hooks.client.options import ConnectionOptions
from trainer_hooks.distributed.collectives import broadcast_plan
from trainer_hooks.distributed.layout import Layout
from trainer_hooks.optim.protocols import NotifiedOfBatchChange

logger = logging.getLogger(__name__)


class PlanAgreement:
    """The plan in force, the same on every rank, and the optimizers that are notified of its batch.

    Args:
        run_id: name of the run, for log lines.
        specification: rules and mode of the run.
        layout: every rank that holds a part or a copy of the model takes part in the agreement.
        controller: the client on rank 0, None elsewhere.
        optimizers: notified of another batch by `on_batch_change`.
        plan: the plan of the start.
        connection: how long rank 0 may wait for the controller while the others wait for rank 0, and the callback for
            decisions.
    """

    def __init__(
        self,
        *,
        run_id: str,
        specification: RunSpecification,
        layout: Layout,
        controller: DecisionClient | None,
        optimizers: Sequence[torch.optim.Optimizer],
        plan: BatchPlan,
        connection: ConnectionOptions,
    ) -> None:
        self.plan = plan
        """The plan in force for the next step."""
        self._run_id = run_id
        self._specification = specification
        self._ranks = layout.ranks
        self._data_parallel_size = layout.data_parallel.size
        self._controller = controller
        self._optimizers = optimizers
        self._deadline_seconds = connection.decision_deadline_seconds
        self._on_decision = connection.on_decision
        self._measured_steps: list[int] = []
        """Measured steps whose decisions have not come into force."""
        self._notified_batch_size = plan.global_batch_size
        """The batch that optimizers were last notified of."""
        self._cut_version: int | None = None
        """Version of the latest plan that was logged as out of reach of these ranks."""

    def expect(self, optimizer_step: int) -> None:
        """Note that a decision follows from this measured step."""
        self._measured_steps.append(optimizer_step)

    def settle(self, optimizer_step: int) -> None:
        """Put the plan in force that is due before the next step, if any, and notify optimizers. Every rank.

        All ranks count the same measured steps, so that all or none reach the broadcast.
        """
        due = [
            step for step in self._measured_steps if self._specification.batch.effective_step(step) <= optimizer_step
        ]
        if due:  # the newest of those that waited for one boundary decides: one exchange, not one for each
            del self._measured_steps[: len(due)]
            self._exchange(due[-1], optimizer_step=optimizer_step)
        self._notify_optimizers(optimizer_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the checkpoint, the same on every rank: the policy's memory is broadcast. Every rank."""
        message = None
        if self._controller is not None:
            pending = self._controller.pending.items()
            message = {
                "policy_state": self._controller.state.model_dump(mode="json"),
                "pending": {step: decision.model_dump(mode="json") for step, decision in pending},
                "orders": saved_control(self._controller.control),
            }
        shared = self._ranks.broadcast_message(message)
        delay = self._specification.batch.decision_delay_steps
        return {
            "plan": self.plan.model_dump(mode="json"),
            **{name: shared[name] for name in ("policy_state", "pending", "orders")},
            "due_exchanges": [step + delay for step in self._measured_steps],
            "told_batch_size": self._notified_batch_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, its plan cut for these ranks; the controller's client restores its own memory."""
        saved = BatchPlan.model_validate(state["plan"])
        self.plan = self._reachable(saved, PolicyState.model_validate(state["policy_state"]))
        delay = self._specification.batch.decision_delay_steps
        self._measured_steps = [int(step) - delay for step in state["due_exchanges"]]
        self._notified_batch_size = int(state.get("told_batch_size", saved.global_batch_size))
        optimizer_step = int(state["optimizer_step"])
        changed = self.plan.global_batch_size != saved.global_batch_size
        if changed and not self._is_boundary(optimizer_step) and self._ranks.rank == 0:
            logger.warning(
                "the batch changes between two outer steps, so the next one mixes two batches: optimizer_step=%d "
                "plan_interval_steps=%d",
                optimizer_step,
                self._specification.batch.plan_interval_steps,
            )
        self._notify_optimizers(optimizer_step)

    def _is_boundary(self, optimizer_step: int) -> bool:
        return optimizer_step % self._specification.batch.plan_interval_steps == 0

    def _notify_optimizers(self, optimizer_step: int) -> None:
        """Notify optimizers of a batch-size change, at the next outer boundary."""
        before, batch_size = self._notified_batch_size, self.plan.global_batch_size
        if batch_size == before or not self._is_boundary(optimizer_step):
            return
        self._notified_batch_size = batch_size
        for optimizer in self._optimizers:
            if isinstance(optimizer, NotifiedOfBatchChange):
                optimizer.on_batch_change(global_batch_size=batch_size, previous=before)

    def _reachable(self, plan: BatchPlan, memory: PolicyState) -> BatchPlan:
        """Cut a plan for these ranks: one from before a resume may be made for others. Logged once per plan."""
        reached = reachable_plan(plan, self._specification.batch, memory, data_parallel_size=self._data_parallel_size)
        cut = reached.global_batch_size != plan.global_batch_size
        if cut and plan.version != self._cut_version and self._ranks.rank == 0:
            logger.warning(
                "batch is not reachable on this many ranks: data_parallel_size=%d global_batch_size=%d->%d",
                self._data_parallel_size,
                plan.global_batch_size,
                reached.global_batch_size,
            )
            self._cut_version = plan.version
        return reached

    def _exchange(self, measured_step: int, *, optimizer_step: int) -> None:
        """Take rank 0's plan on all ranks. Rank 0 waits for the controller no longer than the deadline."""
        # Rank 0 alone has a client. Whatever fails here, it must go on to the broadcast: the other ranks wait there.
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
                logger.exception("no decision, keeping plan: run_id=%s optimizer_step=%d", self._run_id, measured_step)
            if proposed is None:
                proposed = self.plan

        # Every rank: `settle` comes here on all of them or on none.
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

        # After the exchange, so that a callback that fails or waits holds no other rank.
        if verdict is not None and self._on_decision is not None:
            try:
                self._on_decision(verdict.decision, verdict.source)
            except Exception:
                logger.exception("on_decision failed, training goes on: run_id=%s", self._run_id)


def reachable_plan(
    plan: BatchPlan, rules: BatchRules, policy_state: PolicyState, *, data_parallel_size: int
) -> BatchPlan:
    """Cut a plan for this number of ranks: to the nearest reachable batch below, if its own is not reachable.

    Gains by the noise scale are computed again only for another batch; else they stay what they were.
    """
    batch_size = rules.grid(data_parallel_size=data_parallel_size).floor(plan.global_batch_size)
    noise_scale = None
    if batch_size != plan.global_batch_size:
        judged = policy_state.smoothed.judged() if policy_state.smoothed else None
        noise_scale = None if judged is None or judged.unresolved else judged.noise_scale
    return plan_for(
        rules,
        batch_size,
        data_parallel_size=data_parallel_size,
        version=plan.version,
        effective_step=plan.effective_step,
        noise_scale=noise_scale,
        previous=plan,
    )
