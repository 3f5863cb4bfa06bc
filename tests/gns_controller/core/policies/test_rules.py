from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gns_controller.core.aggregation import Aggregation
from gns_controller.core.batch_arithmetic import BatchGrid
from gns_controller.core.contract import Decision, ParameterGroup, Span
from gns_controller.core.policies import (
    AnyPolicyConfig,
    HoldPolicyConfig,
    InnerProductTestPolicyConfig,
    NoiseScalePolicyConfig,
    NormTestPolicyConfig,
    Stage,
    StagesPolicyConfig,
)
from gns_controller.core.replay import replay
from gns_controller.core.runs import RunSpecification
from tests.gns_controller.core.measurements import decisions, measurement, reading, specification


def published(**changes: Any) -> NoiseScalePolicyConfig:
    return NoiseScalePolicyConfig.published(noise_beta=0.0, signal_beta=0.0, **changes)


def test_the_published_rule_asks_for_noise_scale_over_theta_squared_floored_to_a_reachable_batch() -> None:
    [decision] = decisions(published(noise_tolerance=0.5), [measurement(100, reading(noise_scale=12.8))])
    assert decision.requested_batch_size == pytest.approx(51.2)
    assert decision.plan.global_batch_size == 50  # two ranks: multiples of two below one full pass of 64
    assert decision.reason == "grow"
    assert decision.plan.learning_rate_factor == pytest.approx(math.sqrt(50 / 16))
    assert decision.plan.effective_step == 101


def test_the_split_estimator_asks_for_half_pi_times_as_much() -> None:
    policy = NoiseScalePolicyConfig(noise_tolerance=1.0, noise_beta=0.9, signal_beta=0.9)
    steady = [measurement(25 * k, reading(noise_scale=40.0, estimator="split")) for k in range(1, 8)]
    last = decisions(policy, steady)[-1]
    assert last.requested_batch_size == pytest.approx(40 * math.pi / 2)


def test_a_batch_never_shrinks_unless_it_may() -> None:
    falling = [measurement(100, reading(noise_scale=16.0)), measurement(200, reading(noise_scale=4.0))]
    assert [d.plan.global_batch_size for d in decisions(published(noise_tolerance=0.5), falling)] == [64, 64]
    assert decisions(published(noise_tolerance=0.5), falling)[-1].reason == "hold_monotone"
    shrinking = decisions(published(noise_tolerance=0.5, monotone=False), falling)
    assert [d.plan.global_batch_size for d in shrinking] == [64, 16]
    assert shrinking[-1].reason == "shrink"


def test_each_guard_names_itself() -> None:
    high = reading(noise_scale=100.0)
    run = [measurement(k * 100, high) for k in range(1, 4)]

    def reasons(**changes: Any) -> list[str]:
        return [d.reason for d in decisions(published(**changes), run)]

    assert reasons(warmup=Span(steps=150))[:2] == ["warmup", "grow"]
    assert reasons(warmup=Span(samples=4800)) == ["warmup", "warmup", "grow"]
    assert reasons(growth_cap=2.0) == ["capped_growth", "capped_growth", "capped_growth"]
    assert reasons(maximum_batch_size=64) == ["capped_max", "capped_max", "capped_max"]
    assert reasons(growth_cap=2.0, dwell=Span(steps=150)) == ["hold_dwell", "capped_growth", "hold_dwell"]
    assert reasons(act_on_unresolved=False)[0] == "grow"


def test_a_saturated_reading_does_not_ramp_unless_the_published_rule_is_asked_for() -> None:
    saturated = [measurement(100, reading(noise_scale=20.0, ceiling=22.0))]
    careful = NoiseScalePolicyConfig(estimator="rank_variance")
    assert decisions(careful, saturated)[0].reason == "hold_unresolved"
    assert decisions(NoiseScalePolicyConfig.published(), saturated)[0].plan.global_batch_size > 16


def test_a_signal_near_zero_asks_for_a_batch_that_still_is_a_number() -> None:
    [decision] = decisions(published(), [measurement(100, reading(noise_scale=1e100))])
    assert decision.plan.global_batch_size <= 2**40
    [capped] = decisions(
        NoiseScalePolicyConfig(estimator="rank_variance", act_on_unresolved=True),
        [measurement(100, reading(noise_scale=1e100))],
    )
    assert (capped.plan.global_batch_size, capped.reason) == (64, "capped_growth")


def test_a_reading_that_is_not_finite_leaves_the_averages_alone() -> None:
    good, bad = reading(noise_scale=12.8), reading(noise_scale=12.8, signal=math.nan)
    found = decisions(published(noise_tolerance=0.5), [measurement(100, good), measurement(200, bad)])
    assert found[1].reason == "hold_not_finite"
    assert found[1].noise_scale == found[0].noise_scale
    found = decisions(published(), [measurement(100)])
    assert found[0].reason == "hold_no_reading"


def test_stages_follow_samples_and_nothing_else() -> None:
    # Llama 3 405B, in samples of 4096 tokens: 1024, then 2048 after 252 M tokens, then 4096 after 2.87 T.
    policy = StagesPolicyConfig(
        stages=(
            Stage(from_samples=math.ceil(252_000_000 / 4096), global_batch_size=2048),
            Stage(from_samples=math.ceil(2_870_000_000_000 / 4096), global_batch_size=4096),
        )
    )
    seen = [0, 61_523, 61_524, 700_683_593, 700_683_594]
    run = [measurement(k + 1, samples=samples, batch=1024, ranks=2) for k, samples in enumerate(seen)]
    found = decisions(policy, run, global_batch_size=1024, micro_batch_size=512)
    assert [d.plan.global_batch_size for d in found] == [1024, 1024, 2048, 2048, 4096]
    assert found[2].reason == "stage"


def test_hold_holds() -> None:
    found = decisions(HoldPolicyConfig(estimator="rank_variance"), [measurement(100, reading(noise_scale=1e5))])
    assert found[0].plan.version == 0
    assert found[0].noise_scale == pytest.approx(1e5)


def test_the_service_follows_the_trainer_where_an_asked_replay_follows_itself() -> None:
    policy = published(noise_tolerance=0.5)
    run = [measurement(100, reading(noise_scale=16.0)), measurement(200, reading(noise_scale=4.0), batch=16)]
    assert replay(specification(policy), run)[-1].plan.global_batch_size == 64
    followed = replay(specification(policy), run, follow_trainer=True)
    assert followed[-1].previous_batch_size == 16


def with_groups(policy: AnyPolicyConfig, *geometries: str) -> RunSpecification:
    groups = [
        ParameterGroup.model_validate(
            {"name": geometry, "geometry": geometry, "optimizer": "Muon", "num_tensors": 1, "num_parameters": 1}
        )
        for geometry in geometries
    ]
    return specification(policy, parameter_groups=tuple(groups))


def test_a_policy_that_follows_a_missing_geometry_is_refused_with_what_there_is_and_a_way_out() -> None:
    wanted = r"groups have sign\. Name one of these, or 'euclidean', or set geometry to null\."
    with pytest.raises(ValidationError, match="no parameter group has it; " + wanted):
        with_groups(NoiseScalePolicyConfig(geometry="spectral"), "sign")


def test_any_run_may_get_a_euclidean_policy_and_holds_until_that_is_measured() -> None:
    """As `attach` takes it: readings in the l2 norm come with the next attach."""
    for policy in (
        NormTestPolicyConfig(),
        InnerProductTestPolicyConfig(),
        NoiseScalePolicyConfig(geometry="euclidean"),
    ):
        run = with_groups(policy, "spectral", "sign")
        [held] = replay(run, [measurement(1, reading(noise_scale=400.0, geometry="spectral", estimator="split"))])
        assert (held.reason, held.plan.global_batch_size) == ("hold_no_reading", 16)
        assert RunSpecification.model_validate_json(run.model_dump_json()) == run


def test_a_progress_report_is_told_from_one_that_measured_something_else() -> None:
    policy = NormTestPolicyConfig()
    progress, other = replay(
        specification(policy), [measurement(1), measurement(2, reading(noise_scale=9.0, geometry="sign"))]
    )
    assert {progress.reason, other.reason} == {"hold_no_reading"}
    assert progress.explanation == "Keep 16 samples: a progress report, nothing was measured at this step."
    assert other.explanation == "Keep 16 samples: this report holds no rank_variance reading that this policy follows."


readings = st.builds(
    lambda noise, signal, progress, rate: reading(
        noise_scale=noise, estimator="split", signal=signal, progress=progress, learning_rate=rate
    ),
    st.floats(0, 1e4),
    st.floats(0, 1e3) | st.just(math.inf) | st.just(math.nan),
    st.floats(-1e3, 1e3) | st.just(math.nan),
    st.floats(0, 1) | st.just(0.0),
)
policies = st.builds(
    NoiseScalePolicyConfig,
    noise_tolerance=st.floats(0.05, 4),
    noise_beta=st.floats(0, 0.99),
    monotone=st.booleans(),
    maximum_batch_size=st.none() | st.integers(16, 5000),
    growth_cap=st.none() | st.floats(1.1, 8),
    dwell=st.none() | st.builds(Span, samples=st.integers(1, 10_000)),
    act_on_unresolved=st.booleans(),
    aggregation=st.sampled_from(get_args(Aggregation)),
    correct_few_groups=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(policy=policies, found=st.lists(st.tuples(readings, readings), min_size=1, max_size=25), cut=st.integers(0, 25))
def test_whatever_is_measured_decisions_stay_reachable_bounded_and_repeatable(
    policy: NoiseScalePolicyConfig, found: list[Any], cut: int
) -> None:
    run = [
        measurement(25 * (k + 1), first, second.model_copy(update={"group": "rest", "geometry": "sign"}))
        for k, (first, second) in enumerate(found)
    ]
    asked = specification(policy)
    result = replay(asked, run)
    assert replay(asked, run) == result
    assert replay(asked, run[:cut]) == result[:cut]
    batches = [16, *(decision.plan.global_batch_size for decision in result)]
    for before, after in pairwise(batches):
        BatchGrid(micro_batch_size=32, data_parallel_size=2).factor(after)
        assert not policy.monotone or after >= before
        assert policy.maximum_batch_size is None or after <= max(before, policy.maximum_batch_size)
        assert policy.growth_cap is None or after <= before * policy.growth_cap
    versions = [decision.plan.version for decision in result]
    assert versions == sorted(versions)
    for decision in result:
        assert Decision.model_validate_json(decision.model_dump_json()) == decision
        if decision.noise_scale_high is not None:
            assert decision.noise_scale_low is not None
            assert decision.noise_scale is not None
            assert decision.noise_scale_low <= decision.noise_scale <= decision.noise_scale_high
