"""Branches: a session's checkpoint, changed so that training resumes from it with another batch.

Branches of one checkpoint with several batches compare those batches from the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.policies import initial_state, plan_for
from trainer_hooks.session.optimizer_coupling import find_couplings
from trainer_hooks.session.options import CouplingOptions


def branch_state(
    state: Mapping[str, Any],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    global_batch_size: int,
    initial_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    micro_batch_granularity: int = 1,
    coupling: CouplingOptions | None = None,
) -> dict[str, Any]:
    """Return a session's state that resumes with another batch, from the next optimizer step on.

    The learning-rate factor follows from the batch at the start of the run, so it is applied once however often the
    batch has changed. The policy's averages and decisions at the old batch are dropped, and so are pins, holds and
    policies that operators set on the old run.

    Args:
        state: result of `AdaptiveBatch.state_dict`; it is not changed.
        optimizers: those of the session; their classes have coupling rules.
        global_batch_size: samples per optimizer step of the branch.
        initial_batch_size: global_batch_size as given to attach: samples per step at the start of the run.
        micro_batch_size: as given to attach.
        data_parallel_size: ranks of the branch that see different samples.
        micro_batch_granularity: as given to attach.
        coupling: as given to attach.

    Raises:
        BatchShapeError: these ranks cannot make that batch.
        CouplingError: no rule is known to be sound for an optimizer.
    """
    coupling = coupling or CouplingOptions()
    learning_rate_coupling, optimizer_couplings = find_couplings(coupling.learning_rate, optimizers)
    rules = BatchRules(
        global_batch_size=initial_batch_size,
        micro_batch_size=micro_batch_size,
        micro_batch_granularity=micro_batch_granularity,
        learning_rate_coupling=learning_rate_coupling,
        optimizer_couplings=optimizer_couplings,
        beta_coupling=coupling.betas,
    )
    plan = plan_for(
        rules,
        global_batch_size,
        data_parallel_size=data_parallel_size,
        version=state["plan"]["version"] + 1,
        effective_step=state["optimizer_step"],
    )
    fresh = initial_state(rules, data_parallel_size=data_parallel_size).model_copy(update={"plan": plan})
    return {
        **state,
        "plan": plan.model_dump(mode="json"),
        "policy_state": fresh.model_dump(mode="json"),
        "pending": {},
        "orders": None,
        "due_exchanges": [],
    }
