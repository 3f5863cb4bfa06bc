"""The object a training loop holds, in one process."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gns_controller.core.contract import Decision, Override, Span
from gns_controller.core.errors import (
    BatchShapeError,
    CouplingError,
    GeometryError,
    InvalidInputError,
    TooFewGroupsError,
)
from gns_controller.core.policies import HoldPolicyConfig, NoiseScalePolicyConfig, Stage, StagesPolicyConfig
from gns_controller.core.runs import Control
from tests.attaching import attach_arguments
from trainer_hooks import AdaptiveBatch, warmup_cosine
from trainer_hooks.optim import Muon, Signum


class Points:
    """y = 3 x_0 - x_1 + noise."""

    def __init__(self, count: int = 400) -> None:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(count, 6, generator=generator)
        self.rows = torch.cat([x, (3 * x[:, :1] - x[:, 1:2] + 0.1 * torch.randn(count, 1, generator=generator))], dim=1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return (model(rows[:, :6]) - rows[:, 6:]).square().mean()


RAMP = StagesPolicyConfig(
    stages=(Stage(from_samples=100, global_batch_size=12), Stage(from_samples=260, global_batch_size=32))
)


def attach(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **changes: Any) -> AdaptiveBatch:
    settings: dict[str, Any] = {
        "run": "test",
        "global_batch_size": 8,
        "micro_batch_size": 16,
        "budget_samples": 600,
        "policy": RAMP,
        "measurement_interval": Span(steps=2),
        "learning_rate_schedule": warmup_cosine(budget_samples=600, warmup_samples=90),
        **changes,
    }
    return AdaptiveBatch.attach(model, optimizer or Signum(model.parameters(), lr=0.01), **attach_arguments(settings))


def train(session: AdaptiveBatch, *, until: int | None = None) -> list[tuple[int, int, float]]:
    """(samples seen before, batch, learning rate) of each step."""
    trail = []
    for step in session.steps(Points(), seed=2):
        before = session.samples_seen
        for rows in step:
            step.backward(loss_of(session.model, rows))
        step.apply()
        trail.append((before, step.global_batch_size, session.optimizers[0].param_groups[0]["lr"]))
        if until is not None and session.optimizer_step == until:
            break
    return trail


def test_a_ramp_changes_batch_and_learning_rate_together_and_ends_on_the_budget() -> None:
    session = attach(network())
    trail = train(session)
    batches = [batch for _, batch, _ in trail]
    assert set(batches[:-1]) == {8, 12, 32}
    assert session.samples_seen == sum(batches) == 600
    schedule = warmup_cosine(budget_samples=600, warmup_samples=90)
    for before, batch, learning_rate in trail[:-1]:
        assert learning_rate == pytest.approx(0.01 * schedule(before) * math.sqrt(batch / 8))


@pytest.mark.parametrize(
    ("coupling", "power"), [("linear", 1.0), ("sqrt", 0.5), ("none", 0.0), ("adamscale", None), (None, 0.5)]
)
@pytest.mark.parametrize("leftover", [1, 4, 20, 32])
def test_the_last_step_takes_rates_and_betas_of_the_samples_it_has(
    coupling: Any, power: float | None, leftover: int
) -> None:
    """A gain stays, here at 1 because no noise scale is resolved, but never above the power of its rule."""
    model = network()
    session = attach(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95)),
        policy=StagesPolicyConfig(stages=(Stage(from_samples=20, global_batch_size=32),)),
        budget_samples=5 * 8 + 10 * 32 + leftover,
        learning_rate_schedule=None,
        learning_rate_coupling=coupling,
        beta_coupling="half_life",
    )
    trail = train(session)
    assert [batch for _, batch, _ in trail[-2:]] == [32, leftover]
    [group] = session.optimizers[0].param_groups
    for _, batch, rate in trail[-2:]:
        wanted = 0.01 * (batch / 8) ** power if power is not None else 0.01 * min(1.0, (batch / 8) ** 0.5)
        assert rate == pytest.approx(wanted)
    assert trail[-1][2] <= trail[-2][2]
    assert group["betas"] == (pytest.approx(0.9 ** (leftover / 8)), pytest.approx(0.95 ** (leftover / 8)))


def test_shadow_mode_leaves_the_rate_of_a_shorter_last_step_alone() -> None:
    trail = train(attach(network(), mode="shadow", budget_samples=603, learning_rate_schedule=None))
    assert trail[-1][1:] == (3, 0.01)


def test_a_batch_pinned_above_what_is_left_ends_with_the_rate_of_what_is_left() -> None:
    session = attach(network(), policy=HoldPolicyConfig(), learning_rate_schedule=None, budget_samples=130)
    trail = train(session, until=4)
    pin = Override(kind="pin", global_batch_size=320)
    session._client.control = Control(policy=HoldPolicyConfig(), policy_revision=1, override=pin)
    trail += train(session)
    assert session.plan.global_batch_size == 320
    left = 130 - trail[-1][0]
    assert trail[-1] == (trail[-1][0], left, pytest.approx(0.01 * math.sqrt(left / 8)))


def test_unmeasured_steps_train_exactly_as_a_loop_without_us() -> None:
    ours, theirs = network(), network()
    session = attach(ours, policy=HoldPolicyConfig(), measurement_interval=Span(steps=3), learning_rate_schedule=None)
    train(session)
    optimizer = Signum(theirs.parameters(), lr=0.01)
    points, stream = Points(), None
    from trainer_hooks.data import SampleStream

    stream = SampleStream(len(points), seed=2)
    for start in range(0, 600, 8):
        optimizer.zero_grad()
        loss_of(theirs, torch.stack([points[i] for i in stream.positions(start, 8).tolist()])).backward()
        optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Measured steps are cut into two pieces, which rounds differently; sign steps hide that but for exact ties.
        assert torch.allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("stop", range(1, 40, 2))
def test_a_resumed_run_goes_on_as_if_never_stopped(stop: int) -> None:
    policy = NoiseScalePolicyConfig.published(noise_tolerance=0.5, warmup=Span(samples=60))
    delayed = {"policy": policy, "decision_delay_steps": 2}
    straight = attach(network(), **delayed)
    expected = train(straight)
    assert len({batch for _, batch, _ in expected}) > 2

    first_model = network()
    first_optimizer = Signum(first_model.parameters(), lr=0.01)
    first = attach(first_model, first_optimizer, **delayed)
    trail = train(first, until=stop)
    saved = first.state_dict()

    second_model = network()
    second_model.load_state_dict(first_model.state_dict())
    second_optimizer = Signum(second_model.parameters(), lr=0.01)
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    second = attach(second_model, second_optimizer, state=saved, **delayed)
    trail += train(second)
    assert trail == expected
    for resumed, uninterrupted in zip(second_model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(resumed, uninterrupted)


def test_shadow_mode_records_what_it_would_do_and_changes_nothing() -> None:
    seen: list[Decision] = []
    session = attach(network(), mode="shadow", on_decision=lambda decision, source: seen.append(decision))
    trail = train(session)
    assert {batch for _, batch, _ in trail} == {8}
    assert {decision.plan.global_batch_size for decision in seen} == {8, 12, 32}
    assert session.learning_rate_factor == 1.0


def test_a_loop_of_ones_own_uses_the_parts() -> None:
    model = network()
    session = attach(model, policy=HoldPolicyConfig(), measurement_interval=Span(steps=1))
    points = Points()
    for start in range(0, 64, 8):
        rows = torch.stack([points[i] for i in range(start, start + 8)])
        for piece in rows.chunk(2):
            with session.measured(num_samples=4, loss_factor=0.5):
                (0.5 * loss_of(model, piece)).backward()
        [reading] = session.measure()
        session.set_learning_rates()
        session.optimizers[0].step()
        session.optimizers[0].zero_grad()
        session.advance(num_samples=8)
        assert (reading.num_groups, reading.samples_per_group) == (2, 4)
    assert session.samples_seen == 64


def test_a_loss_that_is_not_a_mean_over_samples_is_told_and_not_measured(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    session = attach(model, policy=HoldPolicyConfig(), measurement_interval=Span(steps=1))
    rows = torch.stack([Points()[i] for i in range(8)])
    for piece in rows.chunk(2):
        with session.measured(num_samples=4, loss_factor=1.0):
            loss_of(model, piece).backward()
    with caplog.at_level(logging.WARNING):
        assert session.measure() == []
    assert "misweighted=2" in caplog.text


def test_gradients_that_are_not_finite_give_a_measurement_that_policies_leave_alone() -> None:
    seen: list[Decision] = []
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 1, bias=False))
    session = attach(
        model,
        Muon(model.parameters(), lr=0.0),
        policy=NoiseScalePolicyConfig(),
        measurement_interval=Span(steps=1),
        estimators=["split", "rank_variance"],
        on_decision=lambda decision, source: seen.append(decision),
        budget_samples=24,
    )
    for step in session.steps(Points()):
        for rows in step:
            step.backward(loss_of(model, rows) * (math.nan if session.optimizer_step == 1 else 1.0))
        step.apply()
    assert [decision.reason for decision in seen] == ["hold_unresolved", "hold_not_finite"]


def test_what_cannot_be_is_said_in_a_sentence() -> None:
    model = network()
    with pytest.raises(BatchShapeError, match="Nearest reachable: 32 or 48"):
        attach(model, global_batch_size=40)
    with pytest.raises(TooFewGroupsError, match="raise global_batch_size to 2 or more"):
        attach(model, global_batch_size=1)
    with pytest.raises(GeometryError, match="no parameter group has it; groups have sign"):
        attach(model, policy=NoiseScalePolicyConfig(geometry="spectral"))
    with pytest.raises(GeometryError, match="geometry of optimizer Adagrad is not known"):
        attach(model, torch.optim.Adagrad(model.parameters()), learning_rate_coupling="none")
    with pytest.raises(CouplingError, match="no rule for the learning rate of Adagrad is known to be sound"):
        attach(model, torch.optim.Adagrad(model.parameters()))
    with pytest.raises(InvalidInputError, match="not an address like http"):
        attach(model, controller="127.0.0.1:8000")
    with pytest.raises(InvalidInputError, match=r"call step.apply\(\)"):
        for _ in attach(model).steps(Points()):
            pass


def test_the_groups_follow_from_the_optimizers() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1, bias=False))
    muon = Muon([model[0].weight], lr=0.02)
    adamw = torch.optim.AdamW([model[0].bias, model[1].weight], lr=1e-3)
    session = AdaptiveBatch.attach(
        model, [muon, adamw], run="groups", global_batch_size=8, micro_batch_size=8, budget_samples=80
    )
    found = [(g.name, g.geometry, g.optimizer, len(g.parameters)) for g in session.groups]
    assert found == [("matrices", "spectral", "Muon", 1), ("others", "sign", "AdamW", 2)]
    assert "matrices (Muon -> spectral, 1 tensors)" in session.describe()


def test_resuming_with_a_start_batch_that_fewer_ranks_cannot_make_takes_the_nearest_below() -> None:
    saved = attach(network(), global_batch_size=32, policy=HoldPolicyConfig()).state_dict()
    saved["plan"]["global_batch_size"] = saved["policy_state"]["plan"]["global_batch_size"] = 40
    resumed = attach(network(), global_batch_size=32, policy=HoldPolicyConfig(), state=saved)
    assert resumed.plan.global_batch_size == 32


def test_embeddings_with_sparse_gradients_are_left_out_and_training_goes_on() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(24, 1))
    session = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), policy=HoldPolicyConfig(), budget_samples=64)
    assert [len(group.parameters) for group in session.groups] == [2]
    for step in session.steps(torch.randint(0, 10, (64, 6))):
        for tokens in step:
            step.backward(model(tokens).square().mean())
        step.apply()
    assert session.samples_seen == 64


def test_names_are_checked_at_attach() -> None:
    with pytest.raises(InvalidInputError, match="run='x y' is not a name"):
        attach(network(), run="x y")
    with pytest.raises(InvalidInputError, match="there are rank_variance, split"):
        attach(network(), estimators=["foo"])
    with pytest.raises(InvalidInputError, match="does not measure it"):
        attach(network(), policy=NoiseScalePolicyConfig(), estimators=["rank_variance"])


def test_a_parameter_frozen_after_attach_counts_as_zero_and_training_goes_on() -> None:
    model = network()
    session = attach(model, policy=HoldPolicyConfig(), measurement_interval=Span(steps=1), budget_samples=24)
    for step in session.steps(Points()):
        for rows in step:
            step.backward(loss_of(model, rows))
        step.apply()
        next(model.parameters()).requires_grad_(False)
    assert session.samples_seen == 24


def test_a_decomposition_that_fails_is_a_reading_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 1, bias=False))
    muon = Muon(model.parameters(), lr=0.01)
    session = attach(model, muon, policy=HoldPolicyConfig(), budget_samples=8)
    for rows in (step := next(session.steps(Points()))):
        step.backward(loss_of(model, rows))
    [reading] = session.measure()
    assert math.isnan(reading.noise)


def test_a_micro_batch_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    session = attach(network(), policy=HoldPolicyConfig())
    for step in session.steps(Points()):
        for _ in step:
            pass
        with pytest.raises(InvalidInputError, match="backward saw 0 of this rank's 8 samples"):
            step.apply()
        break


def test_two_backward_passes_in_one_micro_batch_give_no_spread(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    session = attach(model, policy=HoldPolicyConfig(estimator="rank_variance"), measurement_interval=Span(steps=1))
    rows = torch.stack([Points()[i] for i in range(8)])
    for piece in rows.chunk(2):
        with session.measured(num_samples=4, loss_factor=0.5):
            (0.25 * loss_of(model, piece)).backward()
            (0.25 * loss_of(model, piece)).backward()
    assert session.measure() == []
    assert "misweighted=2" in caplog.text


def test_a_checkpoint_of_other_optimizers_is_refused_before_anything_is_opened() -> None:
    saved = attach(network()).state_dict()
    with pytest.raises(InvalidInputError, match="not the same optimizers"):
        attach(network(), state={**saved, "base_learning_rates": [[0.1, 0.2]]})
    with pytest.raises(InvalidInputError, match="this program reads versions 1 and 2"):
        attach(network(), state={"version": 9})
