"""What a plan does to learning rates and betas, in one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import BatchPlan, Decision, Override, Span
from gns_controller.core.errors import CouplingError, InvalidInputError
from gns_controller.core.policies import (
    DecayToRampPolicyConfig,
    HoldPolicyConfig,
    NoiseScalePolicyConfig,
    Stage,
    StagesPolicyConfig,
)
from gns_controller.core.runs import Control
from tests.attaching import attach_arguments
from trainer_hooks import AdaptiveBatch, warmup_cosine
from trainer_hooks.distributed.collectives import plan_checksum
from trainer_hooks.optim import Muon
from trainer_hooks.optim.known_optimizers import facts_named
from trainer_hooks.session.optimizer_coupling import CoupledOptimizers, averages_of, for_fewer_samples

FOUR_TIMES = StagesPolicyConfig(stages=(Stage(from_samples=24, global_batch_size=32),))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 1))


def attach(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, **changes: Any) -> AdaptiveBatch:
    settings: dict[str, Any] = {
        "run": "coupled",
        "global_batch_size": 8,
        "micro_batch_size": 16,
        "budget_samples": 400,
        "policy": FOUR_TIMES,
        "measurement_interval": Span(steps=1),
        **changes,
    }
    return AdaptiveBatch.attach(model, optimizers, **attach_arguments(settings))


def train(session: AdaptiveBatch, *, until: int | None = None) -> list[Any]:
    """Settings of every param group that each step was made with."""
    trail: list[Any] = []
    data = torch.randn(400, 7, generator=torch.Generator().manual_seed(1))
    for step in session.steps(data, seed=2):
        for rows in step:
            step.backward((session.model(rows[:, :6]) - rows[:, 6:]).square().mean())
        step.apply()
        names = ("lr", "betas", "momentum")
        trail.append(
            [
                step.global_batch_size,
                *({name: group[name] for name in names if name in group} for group in groups_of(session)),
            ]
        )
        if session.optimizer_step == until:
            break
    return trail


def groups_of(session: AdaptiveBatch) -> list[dict[str, Any]]:
    return [group for optimizer in session.optimizers for group in optimizer.param_groups]


def muon_and_adamw(model: nn.Sequential, **changes: Any) -> list[torch.optim.Optimizer]:
    others: list[Tensor] = [*model[2].parameters()]
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), **changes}
    return [Muon(model[0].parameters(), lr=0.02, momentum=0.95), torch.optim.AdamW(others, **options)]


def test_every_optimizer_is_coupled_by_the_rule_of_its_class() -> None:
    model = network()
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.AdamW(model[2].parameters(), lr=1e-3)]
    session = attach(optimizers, model)
    rules = session.specification.batch
    assert (rules.learning_rate_coupling, rules.optimizer_couplings) == ("linear", {"AdamW": "sqrt"})
    trail = train(session)
    assert [trail[0][0], trail[-2][0]] == [8, 32]
    assert [group["lr"] for group in trail[0][1:]] == [0.1, 1e-3]
    assert [group["lr"] for group in trail[-2][1:]] == [pytest.approx(0.4), pytest.approx(2e-3)]
    assert session.learning_rate_factor == 4.0
    assert session.learning_rate_factor_of(optimizers[1]) == 2.0


def test_a_mapping_overrules_the_classes_that_it_names() -> None:
    model = network()
    session = attach(muon_and_adamw(model), model, learning_rate_coupling={"AdamW": "none"})
    rules = session.specification.batch
    assert (rules.learning_rate_coupling, rules.optimizer_couplings) == ("sqrt", {"AdamW": "none"})
    last = train(session)[-2]
    assert [group["lr"] for group in last[1:]] == [pytest.approx(0.04), 1e-3]


def test_shadow_mode_changes_neither_rates_nor_betas() -> None:
    model = network()
    session = attach(muon_and_adamw(model), model, mode="shadow", beta_coupling="half_life")
    trail = train(session)
    assert all(row == trail[0] for row in trail)
    assert trail[0] == [8, {"lr": 0.02, "momentum": 0.95}, {"lr": 1e-3, "betas": (0.9, 0.95)}]


@pytest.mark.parametrize(
    ("optimizer", "changes", "told"),
    [
        (
            "Adagrad",
            {"geometries": {"Adagrad": "sign"}},
            "known to be sound.*CouplingOptions.learning_rate=",
        ),
        ("LBFGS", {"learning_rate_coupling": "none", "geometries": {"LBFGS": "sign"}}, "its step needs a closure"),
        ("LBFGS", {}, "its step needs a closure"),
        ("AdamW", {"beta_coupling": "halflife"}, "beta coupling 'halflife' does not exist; there are half_life, none"),
        ("AdamW", {"learning_rate_coupling": "cubic"}, "'cubic' does not exist; there are sqrt, linear, adascale"),
        ("AdamW", {"learning_rate_coupling": {"SGD": "sqrt"}}, r"names \['SGD'\], and the optimizers are AdamW"),
        ("AdamW", {"learning_rate_coupling": "adascale"}, "adascale is a gain in the euclidean norm.*geometry sign"),
        ("SGD", {"learning_rate_coupling": "adascale", "policy": NoiseScalePolicyConfig(geometry="sign")}, "geometry"),
    ],
)
def test_an_optimizer_without_a_sound_rule_is_refused(optimizer: str, changes: dict[str, Any], told: str) -> None:
    model = network()
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match=told):
        attach([made], model, **changes)


def test_gains_by_the_noise_scale_go_with_the_norm_they_are_made_for() -> None:
    model = network()
    attach([torch.optim.SGD(model.parameters(), lr=0.1)], model, learning_rate_coupling="adascale")
    attach(muon_and_adamw(model), model, learning_rate_coupling="adamscale")
    attach(
        [torch.optim.Adagrad(model.parameters())],
        model,
        learning_rate_coupling="none",
        geometries={"Adagrad": "sign"},
    )


def test_a_policy_and_a_coupling_that_do_not_go_together_are_one_sentence() -> None:
    model = network()
    with pytest.raises(InvalidInputError, match="belongs to the policy decay_to_ramp") as told:
        attach(muon_and_adamw(model), model, learning_rate_coupling="seesaw")
    assert "\n" not in str(told.value)
    with pytest.raises(InvalidInputError, match="would be another trade"):
        attach(
            [torch.optim.SGD(model.parameters(), lr=0.1)],
            model,
            policy=DecayToRampPolicyConfig(),
        )
    attach(muon_and_adamw(model), model, learning_rate_coupling="seesaw", policy=DecayToRampPolicyConfig())


def test_half_lives_in_samples_raise_every_average_to_the_power_of_the_batch_ratio() -> None:
    model = network()
    session = attach(muon_and_adamw(model), model, beta_coupling="half_life")
    trail = train(session)
    assert trail[0] == [8, {"lr": 0.02, "momentum": 0.95}, {"lr": 1e-3, "betas": (0.9, 0.95)}]
    batch, muon, adamw = trail[-2]
    assert batch == 32
    assert muon["momentum"] == pytest.approx(0.81450625)  # 0.95^4
    assert adamw["betas"] == (pytest.approx(0.6561), pytest.approx(0.81450625))
    assert {type(beta) for beta in adamw["betas"]} == {float}
    session.set_learning_rates()
    session.set_learning_rates()
    assert groups_of(session)[0]["momentum"] == muon["momentum"]


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"capturable": True}, {"amsgrad": True}]
)
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_torch_optimizers_of_every_kind_step_with_coupled_betas(kind: str, options: dict[str, Any]) -> None:
    if "capturable" in options and not torch.cuda.is_available():
        options = {"foreach": True}  # capturable wants parameters on an accelerator
    model = network()
    adam = getattr(torch.optim, kind)(model.parameters(), lr=1e-3, betas=(0.9, 0.95), **options)
    session = attach([adam], model, beta_coupling="half_life")
    *_, (batch, group), (left, last_group) = train(session)
    assert session.plan.beta_exponent == 4
    assert (batch, left) == (32, 16)
    assert group["betas"] == (pytest.approx(0.6561), pytest.approx(0.81450625))
    assert last_group["betas"] == (pytest.approx(0.81), pytest.approx(0.9025))  # squares: twice the batch of the start


def test_torchs_own_muon_keeps_its_half_life_too() -> None:
    model = network()
    muon = torch.optim.Muon(model[0].parameters(), lr=0.02, momentum=0.95)
    adamw = torch.optim.AdamW(model[2].parameters(), lr=1e-3)
    last = train(attach([muon, adamw], model, beta_coupling="half_life"))[-2]
    assert last[1]["momentum"] == pytest.approx(0.81450625)


@pytest.mark.parametrize(
    ("plan_factor", "num_samples", "adascale"),
    # A gain of 2.5 at four times the batch of the start: kept as long as the samples alone allow as much.
    [(2.5, 31, 2.5), (2.5, 20, 2.5), (2.5, 16, 2.0), (2.5, 8, 1.0), (2.5, 2, 0.25), (1.0, 20, 1.0), (1.0, 2, 0.25)],
)
def test_a_shorter_step_takes_no_larger_rate_than_its_samples_allow(
    plan_factor: float, num_samples: int, adascale: float
) -> None:
    rules = BatchRules(
        global_batch_size=8,
        micro_batch_size=32,
        learning_rate_coupling="adascale",
        optimizer_couplings={"AdamW": "sqrt", "Muon": "none", "Adam": "adamscale"},
    )
    plan = BatchPlan(
        version=3,
        global_batch_size=32,
        micro_batch_size=32,
        gradient_accumulation_steps=1,
        learning_rate_factor=plan_factor,
        optimizer_factors={"AdamW": 2.0, "Muon": 1.0, "Adam": plan_factor**0.5},
        effective_step=7,
    )
    found = for_fewer_samples(plan, rules, num_samples=num_samples)
    assert found.learning_rate_factor == pytest.approx(adascale)
    assert found.optimizer_factors["Adam"] == pytest.approx(adascale**0.5)
    assert found.optimizer_factors["AdamW"] == pytest.approx((num_samples / 8) ** 0.5)
    assert found.optimizer_factors["Muon"] == 1
    assert found.beta_exponent == 1


@pytest.mark.parametrize("stop", [1, 2, 5, 9])
def test_a_resume_in_the_middle_finds_the_same_betas(stop: int) -> None:
    straight_model = network()
    expected = train(attach(muon_and_adamw(straight_model), straight_model, beta_coupling="half_life"))
    first_model = network()
    first_optimizers = muon_and_adamw(first_model)
    first = attach(first_optimizers, first_model, beta_coupling="half_life")
    trail = train(first, until=stop)
    second_model = network()
    second_model.load_state_dict(first_model.state_dict())
    second_optimizers = muon_and_adamw(second_model)
    for mine, saved in zip(second_optimizers, first_optimizers, strict=True):
        mine.load_state_dict(saved.state_dict())
    second = attach(second_optimizers, second_model, beta_coupling="half_life", state=first.state_dict())
    assert trail + train(second) == expected
    for resumed, uninterrupted in zip(second_model.parameters(), straight_model.parameters(), strict=True):
        assert torch.equal(resumed, uninterrupted)


def test_going_on_without_coupled_betas_brings_the_base_values_back() -> None:
    model = network()
    optimizers = muon_and_adamw(model)
    first = attach(optimizers, model, beta_coupling="half_life")
    train(first, until=8)
    assert optimizers[0].param_groups[0]["momentum"] < 0.9
    attach(optimizers, model, state=first.state_dict())
    assert optimizers[0].param_groups[0]["momentum"] == 0.95
    assert optimizers[1].param_groups[0]["betas"] == (0.9, 0.95)


def test_a_checkpoint_of_before_betas_were_coupled_still_loads() -> None:
    model = network()
    optimizers = muon_and_adamw(model)
    old = attach(optimizers, model).state_dict()
    old["version"] = 1
    for name in ("base_betas", "orders"):
        del old[name]
    for plan in (old["plan"], old["policy_state"]["plan"]):
        for name in ("optimizer_factors", "beta_exponent"):
            del plan[name]
    session = attach(optimizers, model, state=old, beta_coupling="half_life")
    assert train(session)[-2][1]["momentum"] == pytest.approx(0.81450625)


def plan(**changes: Any) -> BatchPlan:
    return BatchPlan(
        **{
            "version": 1,
            "global_batch_size": 32,
            "micro_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "learning_rate_factor": 2.0,
            "effective_step": 3,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("base", "exponent", "expected"),
    [(0.95, 4.0, 0.81450625), (0.95, 0.25, 0.95**0.25), (0.0, 4.0, 0.0), (0.0, 0.25, 0.0), (-1.0, 4.0, -1.0)],
)
def test_a_beta_of_zero_stays_zero_and_a_stand_in_stays_what_it_is(
    base: float, exponent: float, expected: float
) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    optimizer.param_groups[0]["shampoo_beta"] = base
    CoupledOptimizers([optimizer], couples_betas=True).set_betas(plan(beta_exponent=exponent))
    assert optimizer.param_groups[0]["shampoo_beta"] == pytest.approx(expected, rel=1e-15)


def test_no_beta_is_rounded_up_to_one() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(math.nextafter(1.0, 0.0), 0.999))
    CoupledOptimizers([optimizer], couples_betas=True).set_betas(plan(beta_exponent=1e-3))
    assert all(beta < 1 for beta in optimizer.param_groups[0]["betas"])


@pytest.mark.parametrize(
    ("kind", "group", "told"),
    [
        ("SGD", {"momentum": 0.9, "dampening": 0}, "the momentum of SGD is a sum.*dampening=momentum"),
        ("RMSprop", {"momentum": 0.9, "alpha": 0.99}, "the momentum of RMSprop is a sum"),
        ("Scion", {"momentum": 0.1}, "whether the momentum of Scion is a sum or an average is not known"),
        ("Shampoo", {"betas": (0.9, 1.0)}, "never forgets"),
        ("AdamW", {"betas": (torch.tensor(0.9), 0.95)}, "betas of AdamW is a tensor"),
    ],
)
def test_what_is_no_average_is_refused(kind: str, group: dict[str, Any], told: str) -> None:
    with pytest.raises(CouplingError, match=told):
        averages_of(kind, group, facts_named(kind).with_settings(group))


def test_sgd_whose_dampening_makes_its_momentum_an_average_is_coupled_in_both() -> None:
    for kind, group, averages in (
        ("SGD", {"momentum": 0.9, "dampening": 0.9}, {"momentum": (0.9,), "dampening": (0.9,)}),
        ("SGD", {"momentum": 0, "dampening": 0}, {}),
        ("RMSprop", {"momentum": 0, "alpha": 0.99}, {"alpha": (0.99,)}),
    ):
        assert averages_of(kind, group, facts_named(kind).with_settings(group)) == averages


def test_the_checksum_covers_every_field_of_a_plan_and_no_order() -> None:
    both = plan(optimizer_factors={"A": 1.0, "B": 2.0})
    assert plan_checksum(both) == plan_checksum(plan(optimizer_factors={"B": 2.0, "A": 1.0}))
    others = [plan(), plan(optimizer_factors={"A": 1.0, "B": 2.5}), plan(beta_exponent=4.0)]
    assert len({plan_checksum(found) for found in [both, *others]}) == 4


def test_the_schedule_is_told_at_registration() -> None:
    model = network()
    schedule = warmup_cosine(budget_samples=400, warmup_samples=40)
    session = attach(muon_and_adamw(model), model, learning_rate_schedule=schedule)
    points = session.specification.schedule
    assert len(points) == 65
    assert [points[0], points[32], points[64]] == [schedule(0), schedule(200), schedule(400)]
    again = attach(muon_and_adamw(model), model, learning_rate_schedule=schedule, state=session.state_dict())
    assert again.specification == session.specification
    assert attach(muon_and_adamw(model), model).specification.schedule == ()
    with pytest.raises(InvalidInputError, match=r"learning_rate_schedule\(6\) is nan; it has to be a finite number"):
        attach(muon_and_adamw(model), model, learning_rate_schedule=lambda seen: math.nan if seen else 1.0)
    with pytest.raises(InvalidInputError, match=r"learning_rate_schedule\(0\) raised ZeroDivisionError"):
        attach(muon_and_adamw(model), model, learning_rate_schedule=lambda seen: 1 / seen)


def test_a_checkpoint_keeps_what_operators_wanted() -> None:
    model = network()
    optimizers = muon_and_adamw(model)
    seen: list[Decision] = []
    first = attach(optimizers, model)
    pin = Override(kind="pin", global_batch_size=16)
    pinned = Control(policy=HoldPolicyConfig(), policy_revision=3, override=pin)
    assert first._client is not None
    first._client.control = pinned  # type: ignore[misc]  # what an answer of a controller does
    saved = first.state_dict()
    second = attach(optimizers, model, state=saved, on_decision=lambda decision, source: seen.append(decision))
    assert train(second)[-2][0] == 16
    assert {(decision.policy_revision, decision.reason) for decision in seen} == {(3, "override")}
    assert second.state_dict()["orders"] == saved["orders"]
