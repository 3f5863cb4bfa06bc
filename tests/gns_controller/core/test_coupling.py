"""What a batch change does to learning rates and betas: formulas of others, and once however often it is applied."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import BatchPlan, ParameterGroup
from gns_controller.core.coupling import gain, learning_rate_factor
from gns_controller.core.policies import (
    HoldPolicyConfig,
    NoiseScalePolicyConfig,
    RunFacts,
    decide,
    initial_state,
    plan_for,
)
from gns_controller.core.runs import RunSpecification
from tests.gns_controller.core.measurements import measurement, reading

positive = st.floats(1e-3, 1e6)


@settings(max_examples=200, deadline=None)
@given(noise_sq=positive, signal_sq=positive, initial=st.integers(1, 4096), batch=st.integers(1, 2**20))
def test_the_gain_is_adaptdls_and_lies_between_one_and_the_batches_factor(
    noise_sq: float, signal_sq: float, initial: int, batch: int
) -> None:
    # AdaptDL, scaling_rules.py: var is the variance of a gradient of the first batch, sqr its squared norm.
    var, sqr, scale = noise_sq / initial, signal_sq, batch / initial
    theirs = (var + sqr) / (var / scale + sqr)
    ours = gain(noise_scale=noise_sq / signal_sq, global_batch_size=batch, initial_batch_size=initial)
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert min(scale, 1.0) <= ours <= max(scale, 1.0)
    ends = {"global_batch_size": batch, "initial_batch_size": initial, "noise_scale": noise_sq / signal_sq}
    assert learning_rate_factor("adascale", **ends) == ours  # type: ignore[arg-type]
    assert learning_rate_factor("adamscale", **ends) == math.sqrt(ours)  # type: ignore[arg-type]


def test_the_gain_is_linear_in_noise_and_one_without() -> None:
    assert gain(noise_scale=1e15, global_batch_size=64, initial_batch_size=16) == pytest.approx(4)
    assert gain(noise_scale=0.0, global_batch_size=64, initial_batch_size=16) == 1
    # By hand, noise scale 16 from 16 to 64: (1 + 1) / (1/4 + 1).
    assert gain(noise_scale=16.0, global_batch_size=64, initial_batch_size=16) == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("coupling", "factor"), [("sqrt", 2.0), ("seesaw", 2.0), ("linear", 4.0), ("none", 1.0), ("adascale", 1.6)]
)
def test_factors_from_16_to_64(coupling: Any, factor: float) -> None:
    found = learning_rate_factor(coupling, global_batch_size=64, initial_batch_size=16, noise_scale=16.0)
    assert found == pytest.approx(factor)


def test_a_gain_is_kept_while_nothing_is_resolved_as_far_as_it_fits_the_batch() -> None:
    def kept(coupling: Any, batch: int, before: float) -> float:
        return learning_rate_factor(
            coupling, global_batch_size=batch, initial_batch_size=16, noise_scale=None, previous_factor=before
        )

    assert kept("adascale", 64, 1.6) == 1.6
    assert kept("adascale", 32, 3.0) == 2.0  # a batch twice as large never takes more than twice the rate
    assert kept("adamscale", 32, 3.0) == math.sqrt(2)
    assert kept("adascale", 16, 3.0) == 1.0  # at the batch of the start there is nothing to scale
    assert kept("adascale", 8, 3.0) == 1.0


RULES = BatchRules(
    global_batch_size=16,
    micro_batch_size=64,
    learning_rate_coupling="sqrt",
    optimizer_couplings={"SGD": "linear", "AdamW": "adamscale", "Muon": "none"},
    beta_coupling="half_life",
)


def test_each_optimizer_has_its_rule_and_betas_keep_their_half_life_in_samples() -> None:
    plan = plan_for(RULES, 64, data_parallel_size=2, version=1, effective_step=5, noise_scale=16.0)
    assert plan.learning_rate_factor == 2.0
    assert plan.optimizer_factors == {"SGD": 4.0, "AdamW": pytest.approx(math.sqrt(1.6)), "Muon": 1.0}
    # 0.9 a step of 16 samples forgets half in 6.58 steps = 105 samples; 0.9^4 a step of 64 does so, too.
    assert plan.beta_exponent == 4.0
    half_lives = [samples * math.log(0.5) / math.log(0.9**exponent) for samples, exponent in ((16, 1.0), (64, 4.0))]
    assert half_lives == pytest.approx([105.26, 105.26], rel=1e-3)


def test_applying_a_plan_twice_is_applying_it_once() -> None:
    once = plan_for(RULES, 64, data_parallel_size=2, version=1, effective_step=5, noise_scale=16.0)
    for previous in (None, once):  # a second time, and from a checkpoint: with or without the noise scale of then
        again = plan_for(
            RULES, 64, data_parallel_size=2, version=1, effective_step=5, noise_scale=16.0, previous=previous
        )
        assert again == once
    resumed = plan_for(RULES, 64, data_parallel_size=4, version=1, effective_step=5, previous=once)
    assert resumed.learning_rate_factor == once.learning_rate_factor
    assert resumed.optimizer_factors == once.optimizer_factors
    back = plan_for(RULES, 16, data_parallel_size=2, version=2, effective_step=9, noise_scale=99.0, previous=once)
    assert (back.learning_rate_factor, back.beta_exponent) == (1.0, 1.0)
    assert set(back.optimizer_factors.values()) == {1.0}


def adopted(coupling: Any, *reports: Any, policy: Any = None) -> list[BatchPlan]:
    rules = BatchRules(global_batch_size=16, micro_batch_size=64, learning_rate_coupling=coupling)
    state, plans = initial_state(rules, data_parallel_size=2), []
    for report in reports:
        asked = policy or HoldPolicyConfig(estimator="rank_variance")
        state, decision = decide(asked, state, report, facts=RunFacts(rules))
        plans.append(decision.plan)
    return plans


def test_adopting_the_trainers_batch_couples_it_once_and_other_ranks_change_nothing() -> None:
    seen = reading(noise_scale=16.0)
    run = [
        measurement(10, seen),
        measurement(20, seen, batch=64),
        measurement(30, reading(noise_scale=400.0), batch=64),
        measurement(40, reading(noise_scale=400.0), batch=64, ranks=4),  # a restart on other ranks: another cut
        measurement(50, reading(noise_scale=400.0), batch=64, ranks=4),
    ]
    plans = adopted("adascale", *run)
    assert [plan.learning_rate_factor for plan in plans] == pytest.approx([1.0, 1.6, 1.6, 1.6, 1.6])
    assert [plan.micro_batch_size for plan in plans] == [8, 32, 32, 16, 16]
    assert [plan.learning_rate_factor for plan in adopted("sqrt", *run)] == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_an_unresolved_noise_scale_moves_no_learning_rate_when_a_batch_is_adopted() -> None:
    saturated = reading(noise_scale=20.0, ceiling=21.0)
    plans = adopted("adascale", measurement(10, saturated), measurement(20, saturated, batch=64))
    assert [plan.learning_rate_factor for plan in plans] == [1.0, 1.0]
    policy = NoiseScalePolicyConfig.published(noise_tolerance=0.5)
    [grown] = adopted("adascale", measurement(10, saturated), policy=policy)
    assert (grown.global_batch_size, grown.learning_rate_factor) == (80, 1.0)


def test_adascale_is_registered_only_with_the_euclidean_noise_scale() -> None:
    def registered(geometry: Any, *groups: Any) -> RunSpecification:
        return RunSpecification(
            batch=BatchRules(global_batch_size=16, micro_batch_size=64, learning_rate_coupling="adascale"),
            data_parallel_size=2,
            budget_samples=1000,
            parameter_groups=tuple(
                ParameterGroup(name=g, geometry=g, optimizer="SGD", num_tensors=1, num_parameters=1) for g in groups
            ),
            policy=NoiseScalePolicyConfig(geometry=geometry),
        )

    registered("euclidean", "euclidean", "sign")
    registered(None, "euclidean")
    for geometry, groups in (("sign", ["sign"]), (None, ["euclidean", "sign"]), (None, [])):
        with pytest.raises(ValueError, match="adascale is a gain in the euclidean norm"):
            registered(geometry, *groups)
