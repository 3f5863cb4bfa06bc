"""Guards: one by one, and where two of them meet. Readings have signal 1 and theta 1: a wish is the noise scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from gns_controller.core.contract import Decision, NoiseScaleMeasurement, Override, Reason, Span
from gns_controller.core.policies import (
    DecayToRampPolicyConfig,
    GrowOncePolicyConfig,
    HoldPolicyConfig,
    LinearRampPolicyConfig,
    NoiseScalePolicyConfig,
    NormTestPolicyConfig,
    RunFacts,
    Stage,
    StagesPolicyConfig,
    decide,
    initial_state,
)
from tests.gns_controller.core.measurements import decisions, measurement, reading, specification


def wishing(*wishes: float, rules: dict[str, Any] | None = None, **guards: Any) -> list[Decision]:
    """Decisions where each report, 100 steps of 16 samples after the last, asks for one of these batches."""
    run = [measurement(100 * (k + 1), reading(noise_scale=wish)) for k, wish in enumerate(wishes)]
    return decisions(wishing_policy(**guards), run, **(rules or {}))


def wishing_policy(**guards: Any) -> NoiseScalePolicyConfig:
    settings = {"noise_tolerance": 1.0, "noise_beta": 0.0, "signal_beta": 0.0, "monotone": False, **guards}
    return NoiseScalePolicyConfig.published(**settings)


def outcomes(found: list[Decision]) -> list[tuple[int, str]]:
    return [(decision.plan.global_batch_size, decision.reason) for decision in found]


def test_warmup_lasts_for_its_span() -> None:
    assert outcomes(wishing(64, 64, 64, warmup=Span(steps=200))) == [
        (16, "warmup"),
        (64, "grow"),
        (64, "hold_below_deadband"),
    ]
    assert outcomes(wishing(64, 64, warmup=Span(samples=1601))) == [(16, "warmup"), (64, "grow")]
    # What a warmup is asked about is shown: the wish.
    assert wishing(64, warmup=Span(steps=200))[0].requested_batch_size == 64


def test_a_span_between_changes_counts_from_the_change() -> None:
    found = wishing(32, 64, 64, 128, dwell=Span(steps=150))
    assert outcomes(found) == [(16, "hold_dwell"), (64, "grow"), (64, "hold_below_deadband"), (128, "grow")]
    found = wishing(32, 64, 64, dwell=Span(samples=1600))
    assert outcomes(found) == [(32, "grow"), (64, "grow"), (64, "hold_below_deadband")]
    # Asking for the present batch is no change, and never too soon.
    assert outcomes(wishing(32, 32, dwell=Span(samples=1600))) == [(32, "grow"), (32, "hold_below_deadband")]


def test_small_changes_are_not_worth_it() -> None:
    assert outcomes(wishing(19, 20, 24, 18, deadband=0.25)) == [
        (16, "hold_below_deadband"),  # 18 after rounding: an eighth
        (20, "grow"),
        (20, "hold_below_deadband"),
        (20, "hold_below_deadband"),
    ]
    assert "less than 25%" in wishing(19, deadband=0.25)[0].explanation


def test_shrinking_waits_for_the_hysteresis() -> None:
    assert outcomes(wishing(8, monotone=True)) == [(16, "hold_monotone")]
    assert outcomes(wishing(8.1, 7.9, hysteresis=2.0)) == [(16, "hold_hysteresis"), (6, "shrink")]
    assert outcomes(wishing(15)) == [(14, "shrink")]


def test_one_growth_is_capped() -> None:
    assert outcomes(wishing(1000, 1000, growth_cap=1.5)) == [(24, "capped_growth"), (36, "capped_growth")]
    assert outcomes(wishing(1000, growth_cap=1.1)) == [(16, "hold_below_deadband")]  # 17.6, down to 16
    assert outcomes(wishing(4, growth_cap=1.1)) == [(4, "shrink")]


def test_growth_per_sample_is_capped() -> None:
    # 1600 samples a report; 2^(1600 / 3200) x 16 = 22.6; then 2^(1/2) x 22 = 31.1.
    assert outcomes(wishing(1000, 1000, samples_per_doubling=3200)) == [(22, "capped_rate"), (30, "capped_rate")]
    # What was not used is kept: after 3200 samples, a doubling.
    assert outcomes(wishing(16, 1000, samples_per_doubling=3200))[-1] == (32, "capped_rate")
    # The tighter of two caps speaks.
    both: dict[str, Any] = {"samples_per_doubling": 1600, "growth_cap": 4.0}
    assert outcomes(wishing(1000, **both)) == [(32, "capped_rate")]
    assert outcomes(wishing(1000, samples_per_doubling=400, growth_cap=4.0)) == [(64, "capped_growth")]


def test_enough_steps_are_left_to_the_end() -> None:
    # 100 000 samples: (100 000 - 1600) / 1000 = 98.4 at the first report.
    assert outcomes(wishing(500, rules={"micro_batch_size": 64}, min_steps_left=1000)) == [(98, "capped_budget")]
    assert outcomes(wishing(500, min_steps_left=50_000)) == [(16, "capped_budget")]
    assert outcomes(wishing(90, rules={"micro_batch_size": 64}, min_steps_left=1000)) == [(90, "grow")]
    # It forbids growth only: shrinking leaves more steps.
    assert outcomes(wishing(8, min_steps_left=50_000)) == [(8, "shrink")]


@pytest.mark.parametrize(("delay", "interval"), [(0, 1), (1, 1), (5, 1), (1, 50)])
def test_enough_steps_are_left_where_the_growth_comes_into_force(delay: int, interval: int) -> None:
    rules = {"micro_batch_size": 1, "decision_delay_steps": delay, "plan_interval_steps": interval}
    [decision] = decisions(
        wishing_policy(min_steps_left=100), [measurement(51, reading(noise_scale=1e5))], budget_samples=20_000, **rules
    )
    seen_there = 16 * decision.plan.effective_step
    # Passes of 2: the largest batch that leaves 100 whole steps, and no smaller one.
    assert decision.plan.global_batch_size == (20_000 - seen_there) // 100 // 2 * 2
    assert decision.reason == "capped_budget"


def test_bounds_hold() -> None:
    assert outcomes(wishing(500, 500, maximum_batch_size=50)) == [(50, "capped_max"), (50, "capped_max")]
    assert outcomes(wishing(4, 4, minimum_batch_size=10)) == [(10, "raised_to_min"), (10, "raised_to_min")]
    # In passes of 32 nothing lies between 33 and 40 or 33 and 63; from 33 on 64 does.
    passes = {"micro_batch_size": 16, "micro_batch_granularity": 8}
    assert outcomes(wishing(35, minimum_batch_size=33, maximum_batch_size=63, rules=passes)) == [
        (16, "hold_below_deadband")
    ]
    assert outcomes(wishing(35, minimum_batch_size=33, rules=passes)) == [(64, "grow")]
    with pytest.raises(ValidationError, match="no batch is left"):
        specification(wishing_policy(minimum_batch_size=65, maximum_batch_size=64))


def test_a_bound_that_would_change_the_batch_waits_out_the_dwell() -> None:
    # The wish is the present batch itself: 1600 samples after the start, and 3200.
    dwell = Span(samples=3200)
    assert outcomes(wishing(16, 16, minimum_batch_size=40, dwell=dwell)) == [(16, "hold_dwell"), (40, "raised_to_min")]
    assert outcomes(wishing(16, 16, maximum_batch_size=8, dwell=dwell)) == [(16, "hold_dwell"), (8, "capped_max")]
    # Where no bound moves it there is nothing to wait for.
    assert outcomes(wishing(16, minimum_batch_size=8, dwell=dwell)) == [(16, "hold_below_deadband")]


def test_a_minimum_above_the_present_batch_is_gone_up_to_by_a_run_that_never_shrinks() -> None:
    assert outcomes(wishing(4, minimum_batch_size=40, monotone=True)) == [(40, "raised_to_min")]
    assert outcomes(wishing(10, minimum_batch_size=40, hysteresis=4.0)) == [(40, "raised_to_min")]
    assert outcomes(wishing(4, minimum_batch_size=8, monotone=True)) == [(16, "hold_monotone")]


def test_a_maximum_below_the_present_batch_is_come_down_to_unless_the_batch_never_shrinks() -> None:
    # An operator lowers the maximum of a run at 64.
    def at_64(wish: float, **guards: Any) -> tuple[int, str]:
        rules = {"global_batch_size": 64}
        [decision] = wishing(wish, rules=rules, maximum_batch_size=32, **guards)
        return decision.plan.global_batch_size, decision.reason

    assert at_64(1000) == (32, "capped_max")
    assert at_64(50) == (32, "capped_max")
    assert at_64(20) == (20, "shrink")
    assert at_64(1000, monotone=True) == (64, "capped_max")
    assert at_64(50, monotone=True) == (64, "hold_monotone")


def test_neither_rounding_up_nor_a_minimum_passes_the_caps() -> None:
    passes = {"micro_batch_size": 8, "micro_batch_granularity": 8}  # 16, 32, 48, ...
    up = measurement(100, reading(noise_scale=17, geometry="euclidean"))

    def tested(**guards: Any) -> tuple[int, str]:
        [decision] = decisions(NormTestPolicyConfig(theta=1.0, **guards), [up], **passes)
        return decision.plan.global_batch_size, decision.reason

    assert tested() == (32, "grow")
    assert tested(growth_cap=1.5) == (16, "hold_below_deadband")
    assert tested(growth_cap=2.0) == (32, "grow")
    assert tested(samples_per_doubling=3200) == (16, "hold_below_deadband")
    assert tested(min_steps_left=4000) == (16, "hold_below_deadband")  # 98 400 / 4000 = 24.6
    assert tested(maximum_batch_size=31) == (16, "hold_below_deadband")

    assert outcomes(wishing(4, minimum_batch_size=40, growth_cap=2.0)) == [(16, "capped_growth")]
    assert "the minimum of 40, capped at 2 times" in wishing(4, minimum_batch_size=40, growth_cap=2.0)[0].explanation
    # The other cap gives way with time: 2^(1600/1600) = 2, 4 one report later.
    assert outcomes(wishing(4, 4, minimum_batch_size=40, samples_per_doubling=1600)) == [
        (16, "capped_rate"),
        (40, "raised_to_min"),
    ]
    assert outcomes(wishing(4, minimum_batch_size=40, min_steps_left=5000)) == [(16, "capped_budget")]


def test_whole_factors_only() -> None:
    wide = {"micro_batch_size": 64}
    assert outcomes(wishing(40, 97, 40, rules=wide, integer_factors=True)) == [
        (32, "capped_integer_factor"),
        (96, "grow"),
        (32, "capped_integer_factor"),  # 96 / 3; 96 / 2 would be 48, more than was asked for
    ]
    assert outcomes(wishing(31, integer_factors=True)) == [(16, "capped_integer_factor")]
    assert outcomes(wishing(32, integer_factors=True)) == [(32, "grow")]
    # Reachable and whole: passes of 6 x 2 = 12 from a batch of 8, so multiples of 24.
    odd = {"global_batch_size": 8, "micro_batch_size": 6}
    assert outcomes(wishing(47, rules=odd, integer_factors=True)) == [(24, "capped_integer_factor")]
    # Passes of 131 x 2 from a batch of 2: the first whole factor is 131, then multiples of it.
    prime = {"global_batch_size": 2, "micro_batch_size": 131, "micro_batch_granularity": 1}
    assert outcomes(wishing(1000, rules=prime, integer_factors=True)) == [(786, "grow")]
    # A minimum that no whole factor meets is passed by the next one.
    assert outcomes(wishing(4, minimum_batch_size=40, integer_factors=True)) == [(48, "capped_integer_factor")]
    assert outcomes(wishing(1, integer_factors=True)) == [(2, "shrink")]


def decaying(factors: list[float], wish: float = 64.0, **guards: Any) -> list[tuple[int, str]]:
    run = [
        measurement(100 * (k + 1), reading(noise_scale=wish), schedule_factor=factor)
        for k, factor in enumerate(factors)
    ]
    return outcomes(decisions(wishing_policy(**guards), run))


def test_growth_ends_where_the_learning_rate_decays() -> None:
    assert decaying([1.0, 0.5])[0] == (64, "grow")
    held = decaying([0.5, 1.0, 0.59], wish=16.0, decay="freeze")
    assert held == [(16, "hold_below_deadband")] * 3
    # 0.5 on the way up is no decay; from the peak on it is.
    assert decaying([0.5], decay="freeze") == [(64, "grow")]
    run = [
        measurement(100, reading(noise_scale=16.0), schedule_factor=2.0),
        measurement(200, reading(noise_scale=64.0), schedule_factor=1.19),
        measurement(300, reading(noise_scale=64.0), schedule_factor=1.2),
    ]
    assert outcomes(decisions(wishing_policy(decay="freeze"), run)) == [
        (16, "hold_below_deadband"),
        (16, "hold_decay"),
        (64, "grow"),
    ]
    # 64 x 0.3 / 0.6 = 32; 64 x 0.12 / 0.6 = 12.8, below the batch.
    run = [
        run[0],
        run[1].model_copy(update={"schedule_factor": 0.6}),
        run[1].model_copy(update={"schedule_factor": 0.24}),
    ]
    found = decisions(wishing_policy(decay="discount"), run)
    assert outcomes(found)[1] == (32, "grow")
    assert found[1].requested_batch_size == 64
    low = [run[0], run[1].model_copy(update={"schedule_factor": 0.24})]
    assert outcomes(decisions(wishing_policy(decay="discount"), low))[1] == (16, "hold_decay")
    # Shrinking is free in both.
    assert decaying([1.0, 0.1], wish=4.0, decay="freeze")[-1] == (4, "hold_below_deadband")


@pytest.mark.parametrize("decay", ["freeze", "discount"])
@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf, -1.0])
def test_a_schedule_factor_that_is_no_number_is_no_reason_to_grow(decay: str, factor: float) -> None:
    run = [
        measurement(100, reading(noise_scale=16.0)),
        measurement(200, reading(noise_scale=64.0), schedule_factor=factor),
    ]
    [_, decision] = decisions(wishing_policy(decay=decay), run)
    assert (decision.plan.global_batch_size, decision.reason) == (16, "hold_decay")
    assert "nan" not in decision.explanation


def test_a_minimum_does_not_grow_the_batch_in_a_frozen_decay() -> None:
    run = [
        measurement(100, reading(noise_scale=16.0)),
        measurement(200, reading(noise_scale=8.0), schedule_factor=0.1),
    ]
    found = decisions(wishing_policy(decay="freeze", minimum_batch_size=16), run)
    assert outcomes(found)[-1] == (16, "raised_to_min")
    from_below = decisions(wishing_policy(decay="freeze", minimum_batch_size=40, growth_cap=1.01), run)
    assert outcomes(from_below) == [(16, "capped_growth"), (16, "hold_decay")]


def test_guards_are_asked_in_one_order() -> None:
    # Each wish is refused by two guards; the earlier one gives the reason. Where a wish is cut twice, the later one.
    def reason(wish: float, **guards: Any) -> str:
        run = [
            measurement(1, reading(noise_scale=16.0), samples=100),
            measurement(2, reading(noise_scale=wish), samples=200, schedule_factor=0.5),
        ]
        return decisions(wishing_policy(**guards), run)[-1].reason

    late, dwell = Span(steps=9), Span(steps=9)
    assert reason(64, warmup=late, decay="freeze") == "warmup"
    assert reason(64, decay="freeze", dwell=dwell) == "hold_decay"
    assert reason(8, monotone=True, dwell=dwell) == "hold_monotone"
    assert reason(15, hysteresis=2.0, dwell=dwell) == "hold_hysteresis"
    assert reason(64, dwell=dwell, growth_cap=2.0) == "hold_dwell"
    assert reason(64, growth_cap=3.0, samples_per_doubling=400) == "capped_rate"
    assert reason(64, growth_cap=3.0, min_steps_left=5000) == "capped_budget"
    assert reason(64, growth_cap=3.0, maximum_batch_size=32) == "capped_max"
    assert reason(64, growth_cap=3.0, maximum_batch_size=32, integer_factors=True) == "capped_max"
    assert reason(64, growth_cap=2.5, integer_factors=True) == "capped_integer_factor"
    assert reason(64, growth_cap=2.0, integer_factors=True) == "capped_growth"
    assert reason(17.9, growth_cap=2.0, deadband=0.5) == "hold_below_deadband"
    assert reason(64, growth_cap=1.5, deadband=0.6) == "hold_below_deadband"


def test_guards_stand_before_open_loop_ramps_too() -> None:
    stages = StagesPolicyConfig(stages=(Stage(from_samples=100, global_batch_size=128),), growth_cap=2.0)
    run = [measurement(k + 1, samples=100 + k) for k in range(4)]
    assert outcomes(decisions(stages, run)) == [
        (32, "capped_growth"),
        (64, "capped_growth"),
        (128, "stage"),
        (128, "stage"),
    ]
    ramp = LinearRampPolicyConfig(global_batch_size=116, ramp_samples=100, integer_factors=True)
    found = decisions(ramp, [measurement(k + 1, samples=10 * k) for k in range(11)])
    assert [d.plan.global_batch_size for d in found] == [16, 16, 32, 32, 32, 64, 64, 64, 64, 64, 64]
    once = GrowOncePolicyConfig(at_share=0.5, factor=8, maximum_batch_size=40)
    assert outcomes(decisions(once, [measurement(1, samples=60_000)])) == [(40, "capped_max")]
    down = LinearRampPolicyConfig(global_batch_size=2, ramp_samples=100, minimum_batch_size=8)
    assert decisions(down, [measurement(1, samples=100)])[0].plan.global_batch_size == 8


def test_an_operators_word_is_above_policy_and_guards() -> None:
    policy = wishing_policy(growth_cap=2.0, maximum_batch_size=64, warmup=Span(steps=10**6))
    facts = RunFacts(specification(policy).batch, 100_000)
    state = initial_state(facts.rules, data_parallel_size=2)
    wish = measurement(100, reading(noise_scale=40.0))

    def told(kind: str, batch: int | None = None) -> Decision:
        override = Override(kind=kind, global_batch_size=batch)  # type: ignore[arg-type]
        return decide(policy, state, wish, facts=facts, override=override)[1]

    pinned = told("pin", 1000)
    assert (pinned.plan.global_batch_size, pinned.reason) == (960, "override")  # down to whole passes of 64
    assert pinned.requested_batch_size == 1000
    assert pinned.plan.learning_rate_factor == pytest.approx(math.sqrt(60))
    assert told("pin", 1).plan.global_batch_size == 2
    assert told("pin", 17).plan == state.plan
    assert told("hold").plan == state.plan
    assert told("hold").reason == "override"
    # What is measured meanwhile is averaged all the same.
    assert told("hold").noise_scale == pytest.approx(40.0)
    with pytest.raises(ValidationError, match="a pin names"):
        Override(kind="pin")
    with pytest.raises(ValidationError, match="a pin names"):
        Override(kind="hold", global_batch_size=5)


def override_of(kind: str) -> Decision:
    policy = HoldPolicyConfig()
    facts = RunFacts(specification(policy).batch)
    state = initial_state(facts.rules, data_parallel_size=2)
    return decide(policy, state, measurement(1), facts=facts, override=Override.model_validate({"kind": kind}))[1]


def last(policy: Any, *run: NoiseScaleMeasurement) -> Decision:
    return decisions(policy, list(run))[-1]


HIGH = reading(noise_scale=1000.0)
PRODUCED: dict[str, Callable[[], Decision]] = {
    "warmup": lambda: wishing(64, warmup=Span(steps=200))[0],
    "grow": lambda: wishing(64)[0],
    "shrink": lambda: wishing(4)[0],
    "stage": lambda: last(StagesPolicyConfig(stages=(Stage(from_samples=0, global_batch_size=64),)), measurement(1)),
    "hold": lambda: last(HoldPolicyConfig(), measurement(1)),
    "hold_below_deadband": lambda: wishing(17)[0],
    "hold_monotone": lambda: wishing(4, monotone=True)[0],
    "hold_hysteresis": lambda: wishing(15, hysteresis=2.0)[0],
    "hold_unresolved": lambda: last(
        NoiseScalePolicyConfig(), measurement(1, reading(noise_scale=9, estimator="split"))
    ),
    "hold_dwell": lambda: wishing(64, dwell=Span(steps=200))[0],
    "hold_decay": lambda: last(
        wishing_policy(decay="freeze"), measurement(1), measurement(2, HIGH, schedule_factor=0.1)
    ),
    "hold_not_finite": lambda: last(wishing_policy(), measurement(1, reading(noise_scale=1, signal=math.nan))),
    "hold_no_reading": lambda: last(wishing_policy(), measurement(1)),
    "capped_growth": lambda: wishing(1000, growth_cap=2.0)[0],
    "capped_rate": lambda: wishing(1000, samples_per_doubling=3200)[0],
    "capped_integer_factor": lambda: wishing(40, integer_factors=True)[0],
    "capped_budget": lambda: wishing(1000, min_steps_left=1000)[0],
    "capped_max": lambda: wishing(1000, maximum_batch_size=64)[0],
    "raised_to_min": lambda: wishing(4, minimum_batch_size=10)[0],
    "override": lambda: override_of("hold"),
}


def test_every_reason_of_the_closed_list_is_given_by_something() -> None:
    assert set(PRODUCED) == set(get_args(Reason))
    for reason, produce in PRODUCED.items():
        assert produce().reason == reason


def test_a_frozen_decay_stops_the_trade_of_decay_for_batch() -> None:
    run = [measurement(k + 1, schedule_factor=factor) for k, factor in enumerate([1.0, 0.5, 0.25, 0.125])]
    policy = DecayToRampPolicyConfig(decay="freeze", decay_below=0.2)
    assert [d.plan.global_batch_size for d in decisions(policy, run)] == [16, 32, 64, 64]
