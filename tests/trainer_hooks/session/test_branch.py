"""A session's checkpoint goes on with another batch."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from trainer_hooks import (
    AdaptiveBatch,
    BatchShapeError,
    CouplingOptions,
    MeasurementOptions,
    Span,
    branch_state,
)

BATCH = {"micro_batch_size": 4, "initial_batch_size": 8, "data_parallel_size": 1}


def trained() -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    session = attach(model, optimizer)
    rows = torch.randn(40, 4)
    for number, step in enumerate(session.steps(rows, seed=1), start=1):
        for batch in step:
            step.backward((model(batch[:, :3]) - batch[:, 3:]).square().mean())
        step.apply()
        if number == 5:
            break
    return model, optimizer, session.state_dict()


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, **changes: Any) -> AdaptiveBatch:
    return AdaptiveBatch.attach(
        model,
        optimizer,
        run="branch",
        global_batch_size=8,
        micro_batch_size=4,
        budget_samples=400,
        policy='{"policy": "hold"}',
        measurement=MeasurementOptions(interval=Span(steps=2)),
        **changes,
    )


def test_a_branch_resumes_at_the_same_sample_with_its_batch_and_coupled_rate() -> None:
    model, optimizer, state = trained()
    before = json.dumps(state)
    branch = branch_state(state, [optimizer], global_batch_size=32, **BATCH)
    assert json.dumps(state) == before
    session = attach(model, optimizer, state=branch)
    assert (session.samples_seen, session.optimizer_step) == (40, 5)
    assert session.plan.global_batch_size == 32
    assert session.learning_rate_factor == 2.0  # sqrt(32 / 8)


def test_a_branch_of_a_branch_takes_its_rate_from_the_batch_at_the_start() -> None:
    _, optimizer, state = trained()
    first = branch_state(state, [optimizer], global_batch_size=32, **BATCH)
    second = branch_state(first, [optimizer], global_batch_size=16, **BATCH)
    assert second["plan"]["learning_rate_factor"] == pytest.approx(2**0.5)
    assert second["plan"]["version"] == first["plan"]["version"] + 1


def test_a_branch_follows_the_coupling_that_it_is_given() -> None:
    _, optimizer, state = trained()
    coupling = CouplingOptions(learning_rate="none", betas="half_life")
    plan = branch_state(state, [optimizer], global_batch_size=32, coupling=coupling, **BATCH)["plan"]
    assert (plan["learning_rate_factor"], plan["beta_exponent"]) == (1.0, 4.0)


def test_a_branch_with_a_batch_that_the_ranks_cannot_make_is_refused() -> None:
    _, optimizer, state = trained()
    with pytest.raises(BatchShapeError, match="9"):
        branch_state(state, [optimizer], global_batch_size=9, **BATCH)
