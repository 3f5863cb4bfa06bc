"""Ramps that were published: batches and step counts worked out by hand from the numbers in the papers.

Tokens map to samples by `tokens_per_sample`, which is one number for a run. Where a publication changes the sequence
length as well, tokens are kept and a sample is a sequence of the later length.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from gns_controller.core.contract import Decision
from gns_controller.core.coupling import learning_rate_factor
from gns_controller.core.policies import (
    AnyPolicyConfig,
    CriticalBatch,
    CriticalBatchTablePolicyConfig,
    DecayToRampPolicyConfig,
    GrowOncePolicyConfig,
    LinearRampPolicyConfig,
    NoiseScalePolicyConfig,
    Stage,
    StagesPolicyConfig,
)
from gns_controller.core.replay import compare
from tests.gns_controller.core.measurements import decisions, measurement, reading, specification, trained


def at_samples(policy: AnyPolicyConfig, seen: list[int], **changes: Any) -> list[Decision]:
    """Decisions of one run that reports at these sample counts."""
    return decisions(policy, [measurement(k + 1, samples=s) for k, s in enumerate(seen)], **changes)


def batches(found: list[Decision]) -> list[int]:
    return [decision.plan.global_batch_size for decision in found]


@pytest.mark.parametrize(
    ("tokens", "ramp_tokens", "quarters"),
    [
        # 125M: 500 000 / 2048 = 244.14 sequences; 16 + 228.14 x share = 73.0, 130.1, 187.1, 244.1, down to 16s.
        (500_000, 4_000_000_000, [64, 128, 176, 240]),
        # 175B: 3 200 000 / 2048 = 1562.5; 16 + 1546.5 x share = 402.6, 789.3, 1175.9, 1562.5, down to 16s.
        (3_200_000, 12_000_000_000, [400, 784, 1168, 1552]),
    ],
)
def test_gpt3_grows_linearly_from_32k_tokens(tokens: int, ramp_tokens: int, quarters: list[int]) -> None:
    policy = LinearRampPolicyConfig(global_batch_tokens=tokens, ramp_tokens=ramp_tokens)
    length = ramp_tokens / 2048
    seen = [0, *(math.ceil(length * quarter / 4) for quarter in (1, 2, 3, 4)), int(2 * length)]
    found = at_samples(
        policy,
        seen,
        global_batch_size=16,  # 32 768 tokens
        micro_batch_size=8,
        micro_batch_granularity=8,
        learning_rate_coupling="none",
        tokens_per_sample=2048,
        budget_samples=300_000_000_000 // 2048,
    )
    assert batches(found) == [16, *quarters, quarters[-1]]
    assert {decision.plan.learning_rate_factor for decision in found} == {1.0}


def test_llama_3_405b_doubles_twice_in_tokens() -> None:
    # 4M tokens were 1024 sequences of 4096, 8M tokens 1024 of 8192, 16M tokens 2048 of 8192. As samples of 8192 tokens:
    # 512, 1024, 2048. 252M / 8192 = 30 761.7 samples; 2.87T / 8192 = 350 341 796.9.
    policy = StagesPolicyConfig(
        stages=(
            Stage(from_tokens=252_000_000, global_batch_tokens=8 * 2**20),
            Stage(from_tokens=2_870_000_000_000, global_batch_tokens=16 * 2**20),
        )
    )
    found = at_samples(
        policy,
        [512, 30_761, 30_762, 350_341_796, 350_341_797],
        global_batch_size=512,
        micro_batch_size=4,
        tokens_per_sample=8192,
        learning_rate_coupling="none",
        budget_samples=15_600_000_000_000 // 8192,
    )
    assert batches(found) == [512, 512, 1024, 1024, 2048]
    assert [decision.plan.global_batch_size * 8192 for decision in found][::2] == [2**22, 2**23, 2**24]


def test_deepseek_v3_grows_from_12_6m_to_62_9m_tokens() -> None:
    policy = LinearRampPolicyConfig(global_batch_size=15360, ramp_tokens=469_000_000_000)
    length = 469_000_000_000 / 4096
    found = at_samples(
        policy,
        [0, *(math.ceil(length * quarter / 4) for quarter in (1, 2, 3, 4)), math.ceil(3 * length)],
        global_batch_size=3072,
        micro_batch_size=24,
        tokens_per_sample=4096,
        learning_rate_coupling="none",
        budget_samples=14_800_000_000_000 // 4096,
    )
    assert batches(found) == [3072, 6144, 9216, 12288, 15360, 15360]
    assert [round(batch * 4096 / 1e6, 1) for batch in (3072, 15360)] == [12.6, 62.9]


def test_moonlight_doubles_at_200b_tokens_and_leaves_the_learning_rate() -> None:
    policy = StagesPolicyConfig(stages=(Stage(from_tokens=200_000_000_000, global_batch_size=4096),))
    found = at_samples(
        policy,
        [24_414_062, 24_414_063],  # 200B / 8192 = 24 414 062.5
        global_batch_size=2048,
        micro_batch_size=16,
        tokens_per_sample=8192,
        learning_rate_coupling="none",
        budget_samples=5_700_000_000_000 // 8192,
    )
    assert batches(found) == [2048, 4096]
    assert found[-1].plan.learning_rate_factor == 1.0


OLMO_TABLE = CriticalBatchTablePolicyConfig(
    table=(
        CriticalBatch(from_tokens=0, critical_batch_size=1024),
        CriticalBatch(from_tokens=168_000_000_000, critical_batch_size=2048),
        CriticalBatch(from_tokens=503_000_000_000, critical_batch_size=4096),
    )
)
OLMO = {
    "global_batch_size": 1024,
    "micro_batch_size": 16,
    "tokens_per_sample": 4096,
    "budget_samples": 658_000_000_000 // 4096,
}


def test_the_measured_critical_batches_of_olmo_1b_save_43_percent_of_the_steps() -> None:
    # (168 + 335 / 2 + 155 / 4) / 658 = 0.5688 of the steps. arXiv:2505.23971 says 43 %.
    by_hand = 1 - (168 + 335 / 2 + 155 / 4) / 658
    assert by_hand == pytest.approx(0.431, abs=5e-4)
    run = specification(OLMO_TABLE, **OLMO)
    constant_steps = run.budget_samples / 1024

    reports = trained(run, steps_between=100)
    grown = [(m.samples_seen * 4096 / 1e9, d.plan) for m, d in reports if d.reason == "grow"]
    assert [plan.global_batch_size for _, plan in grown] == [2048, 4096]
    assert [tokens for tokens, _ in grown] == pytest.approx([168, 503], abs=1)  # 100 steps are 0.84B tokens
    assert [plan.learning_rate_factor for _, plan in grown] == pytest.approx([math.sqrt(2), 2])
    assert 1 - reports[-1][0].optimizer_step / constant_steps == pytest.approx(by_hand, abs=2e-3)

    recorded = [measurement(step, samples=1024 * step, batch=1024) for step in range(100, int(constant_steps) + 1, 100)]
    report = compare(run, recorded)
    assert report.happened_steps == recorded[-1].optimizer_step
    assert report.steps_saved / report.happened_steps == pytest.approx(by_hand, abs=2e-3)


def test_a_table_is_interpolated_and_holds_before_it_begins() -> None:
    policy = CriticalBatchTablePolicyConfig(
        table=(
            CriticalBatch(from_samples=1000, critical_batch_size=20),
            CriticalBatch(from_samples=3000, critical_batch_size=100),
        ),
    )
    # 20 + 80 (t - 1000) / 2000: 32 at 1300, 64 at 2100. 4 x 16 at once where reports are rare.
    assert batches(at_samples(policy, [999, 1000, 1299, 1300, 2099, 2100, 9000])) == [16, 16, 16, 32, 32, 64, 64]
    assert batches(at_samples(policy, [2100])) == [64]
    assert at_samples(policy, [999])[0].reason == "hold"
    assert at_samples(policy, [1000])[0].reason == "hold_below_deadband"
    slight = CriticalBatchTablePolicyConfig(
        table=(CriticalBatch(from_samples=0, critical_batch_size=2**62),), multiple=1 + 1e-15
    )
    assert at_samples(slight, [1])[0].plan.global_batch_size == 2**40  # and it takes no 10^16 multiplications


@pytest.mark.parametrize("starts", [[(0, None), (None, 5)], [(5, None), (5, None)], [(5, None), (4, None)]])
def test_a_table_or_stages_that_do_not_ascend_are_refused(starts: list[tuple[int | None, int | None]]) -> None:
    points = [{"from_samples": samples, "from_tokens": tokens} for samples, tokens in starts]
    with pytest.raises(ValidationError, match="ascend"):
        CriticalBatchTablePolicyConfig.model_validate({"table": [{**p, "critical_batch_size": 9} for p in points]})
    with pytest.raises(ValidationError, match=r"ascend|all at"):
        StagesPolicyConfig.model_validate({"stages": [{**p, "global_batch_size": 9} for p in points]})


def test_grow_once_grows_once_and_saves_what_is_left_over_the_factor() -> None:
    policy = GrowOncePolicyConfig(at_share=0.4, factor=2)
    found = at_samples(policy, [39_999, 40_000, 99_999])
    assert batches(found) == [16, 32, 32]
    assert [decision.reason for decision in found] == ["hold", "stage", "stage"]
    # 0.4 + 0.6 / 2 = 0.7 of the steps.
    steps = trained(specification(policy))[-1][0].optimizer_step
    assert steps / (100_000 / 16) == pytest.approx(0.7, abs=1e-3)


def cosine(share: float) -> float:
    return math.cos(math.pi * min(share, 1.0) / 2)


def test_trading_decay_for_batch_continuously_takes_two_over_pi_of_the_steps() -> None:
    # steps = integral of d / B0: the mean of cos(pi x / 2) is 2 / pi, 36.3 % saved (arXiv:2510.14717).
    run = specification(
        DecayToRampPolicyConfig(alpha=None),
        global_batch_size=4096,
        micro_batch_size=2**30,
        budget_samples=4096 * 2000,
        decision_delay_steps=0,
    )
    reports = trained(run, schedule=cosine)
    share = reports[-1][0].optimizer_step / 2000
    assert share == pytest.approx(2 / math.pi, abs=2e-3)  # batches follow one step behind
    assert 1 - share == pytest.approx(0.363, abs=2e-3)


@pytest.mark.parametrize("coupling", ["sqrt", "seesaw"])
def test_at_each_doubling_the_learning_rate_has_fallen_by_the_root_of_two(coupling: Any) -> None:
    run = specification(
        DecayToRampPolicyConfig(alpha=2.0, maximum_batch_size=16 * 8),
        learning_rate_coupling=coupling,
        budget_samples=16 * 4000,
        micro_batch_size=512,
    )
    rates: list[float] = []
    for report, decision in trained(run, schedule=cosine):
        plan = decision.plan
        # Once coupled, never divided a second time: rate / sqrt(batch) is the schedule itself.
        rate = report.schedule_factor * plan.learning_rate_factor
        assert rate / math.sqrt(plan.global_batch_size) == pytest.approx(report.schedule_factor / math.sqrt(16))
        if decision.reason == "grow":
            assert plan.global_batch_size == 2 * decision.previous_batch_size
            rates.append(rate)
    expected = [2 ** (-doublings / 2) for doublings in range(1, 4)]
    assert rates == pytest.approx(expected, rel=0.02)  # up to one step late
    assert learning_rate_factor("seesaw", global_batch_size=64, initial_batch_size=16) == 2.0


@pytest.mark.parametrize("power", range(1, 30))
def test_a_schedule_that_has_dropped_to_a_power_of_alpha_exactly_has_dropped(power: int) -> None:
    for alpha in (2.0, 1.1, 3.0):
        policy = DecayToRampPolicyConfig(alpha=alpha)
        peak = measurement(1, samples=16)
        low = measurement(2, samples=32, schedule_factor=alpha**-power)
        decision = decisions(policy, [peak, low])[-1]
        assert decision.requested_batch_size == pytest.approx(16 * alpha**power)


def test_nothing_is_traded_while_the_schedule_warms_up_and_where_it_is_no_number() -> None:
    policy = DecayToRampPolicyConfig(alpha=None)
    factors = [0.0, 0.01, 0.3, 0.9, 1.0, 0.5, 0.8, 0.0, math.nan, 5e-324]
    run = [measurement(k + 1, samples=16 * (k + 1), schedule_factor=factor) for k, factor in enumerate(factors)]
    found = decisions(policy, run)
    assert batches(found) == [16, 16, 16, 16, 16, 32, 32, 32, 32, 32]
    assert [decision.reason for decision in found[6:]] == [
        "hold_monotone",
        "hold",
        "hold_not_finite",
        "hold_unresolved",
    ]
    in_steps = decisions(DecayToRampPolicyConfig(), run)
    assert [d.reason for d in in_steps[5:]] == ["grow", "hold_monotone", "hold", "hold_not_finite", "grow"]
    assert in_steps[-1].plan.global_batch_size == 2**40  # which is why a maximum is advised


def test_the_trade_goes_no_further_than_the_noise_scale_where_that_is_asked() -> None:
    policy = DecayToRampPolicyConfig(alpha=2.0, up_to_noise_scale=True, estimator="rank_variance")
    seen = reading(noise_scale=40.0)
    run = [measurement(1, seen), measurement(2, seen, schedule_factor=0.5), measurement(3, seen, schedule_factor=0.125)]
    found = decisions(policy, run)
    assert batches(found) == [16, 32, 40]
    assert found[-1].reason == "capped_max"
    saturated = reading(noise_scale=40.0, ceiling=41.0)
    unresolved = [measurement(1, saturated), measurement(2, saturated, schedule_factor=0.5)]
    assert decisions(policy, unresolved)[-1].reason == "hold_unresolved"


@pytest.mark.parametrize(
    ("policy", "couplings", "match"),
    [
        (DecayToRampPolicyConfig(), {"learning_rate_coupling": "linear"}, "another trade"),
        (DecayToRampPolicyConfig(), {"learning_rate_coupling": "none"}, "another trade"),
        (DecayToRampPolicyConfig(), {"learning_rate_coupling": "adascale"}, "another trade"),
        (DecayToRampPolicyConfig(), {"optimizer_couplings": {"SGD": "linear"}}, "SGD.*another trade"),
        (NoiseScalePolicyConfig(), {"learning_rate_coupling": "seesaw"}, "belongs to the policy decay_to_ramp"),
        (NoiseScalePolicyConfig(), {"optimizer_couplings": {"AdamW": "seesaw"}}, "AdamW.*belongs to"),
        (DecayToRampPolicyConfig(decay="freeze"), {}, "it would never ramp"),
        (DecayToRampPolicyConfig(decay="discount"), {}, "it would never ramp"),
    ],
)
def test_one_change_of_the_batch_never_has_two_rules(policy: Any, couplings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        specification(policy, **couplings)


def test_a_policy_in_tokens_needs_to_know_how_many_make_a_sample() -> None:
    for policy in (
        LinearRampPolicyConfig(global_batch_tokens=4096, ramp_samples=100),
        LinearRampPolicyConfig(global_batch_size=64, ramp_tokens=4096),
        StagesPolicyConfig(stages=(Stage(from_tokens=1, global_batch_size=64),)),
        OLMO_TABLE,
    ):
        with pytest.raises(ValueError, match="tokens_per_sample"):
            specification(policy)
        specification(policy, tokens_per_sample=8)
    with pytest.raises(ValidationError, match="exactly one"):
        LinearRampPolicyConfig(global_batch_size=64, ramp_tokens=1, ramp_samples=1)
    with pytest.raises(ValidationError, match="exactly one"):
        LinearRampPolicyConfig(global_batch_size=64, global_batch_tokens=1, ramp_samples=1)
