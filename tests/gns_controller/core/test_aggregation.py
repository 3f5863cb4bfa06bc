from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns_controller.core.aggregation import Aggregation, summed, weighted_by_learning_rate
from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import Decision, GroupReading, NoiseScaleMeasurement
from gns_controller.core.policies import (
    HoldPolicyConfig,
    NoiseScalePolicyConfig,
    PolicyState,
    RunFacts,
    decide,
    initial_state,
)
from gns_controller.core.replay import replay
from gns_controller.core.runs import RunSpecification
from tests.gns_controller.core.measurements import measurement, reading

RULES = BatchRules(global_batch_size=16, micro_batch_size=32)


def part(**changes: Any) -> GroupReading:
    return reading(noise_scale=1.0, **{"estimator": "split", "num_sign_patterns": 4, **changes})


MATRICES = part(
    group="matrices",
    noise=3.0,
    signal=1.0,
    progress=0.5,
    noise_standard_error=0.1,
    progress_standard_error=0.2,
    learning_rate=0.02,
)
REST = part(
    group="rest",
    geometry="sign",
    noise=4.0,
    signal=2.0,
    progress=1.5,
    noise_standard_error=0.3,
    progress_standard_error=0.4,
    learning_rate=0.01,
)


def follow(config: HoldPolicyConfig | NoiseScalePolicyConfig, *reports: NoiseScaleMeasurement) -> list[Decision]:
    specification = RunSpecification(batch=RULES, data_parallel_size=2, budget_samples=10_000, policy=config)
    return replay(specification, reports)


def test_norms_progress_and_standard_errors_add_over_groups() -> None:
    both = summed([MATRICES, REST], group="sum_of_norms")
    assert (both.group, both.geometry, both.estimator) == ("sum_of_norms", "spectral", "split")
    assert (both.noise, both.signal, both.progress) == (7.0, 3.0, 2.0)
    assert both.noise_scale == pytest.approx(49 / 6)
    assert both.noise_standard_error == pytest.approx(0.4)
    assert both.progress_standard_error == pytest.approx(0.6)
    assert both.signal_sq_standard_error == pytest.approx(1.8)


def test_learning_rates_weigh_groups_by_how_far_they_move() -> None:
    # Shares 2/3 and 1/3: noise 10/3, signal 4/3, progress 5/6; the same ratios as with 0.02 and 0.01.
    both = weighted_by_learning_rate([MATRICES, REST], group="weighted")
    assert both is not None
    assert both.noise == pytest.approx(10 / 3)
    assert both.signal == pytest.approx(4 / 3)
    assert both.progress == pytest.approx(5 / 6)
    assert both.noise_scale == pytest.approx(10.0)
    assert both.progress_standard_error == pytest.approx(0.8 / 3)


def test_pure_noise_in_every_group_reads_the_ceiling_of_the_sum() -> None:
    # Pure noise: every group reads its own ceiling, 9 = (3/1)^2 and 4 = (4/2)^2. Then the sum reads (7/3)^2.
    parts = [
        reading(noise_scale=1.0, noise=3.0, signal=1.0, ceiling=9.0, learning_rate=0.02),
        reading(noise_scale=1.0, noise=4.0, signal=2.0, ceiling=4.0, learning_rate=0.01),
    ]
    both = summed(parts, group="sum_of_norms")
    assert both.ceiling_samples == pytest.approx(49 / 9)
    assert both.resolution == pytest.approx(1.0)
    weighted = weighted_by_learning_rate(parts, group="weighted")
    assert weighted is not None
    assert weighted.ceiling_samples == pytest.approx((10 / 4) ** 2)
    assert weighted.resolution == pytest.approx(1.0)
    unknown = parts[1].model_copy(update={"ceiling_samples": None})
    assert summed([parts[0], unknown], group="sum_of_norms").ceiling_samples is None


def test_a_standard_error_that_one_group_lacks_is_unknown_for_all() -> None:
    both = summed([MATRICES, part(progress_standard_error=0.4)], group="sum_of_norms")
    assert both.noise_standard_error is None
    assert both.progress_standard_error == pytest.approx(0.6)


norms = st.floats(0.0, 1e6)
split_parts = st.builds(
    lambda noise, signal, progress, rate: part(noise=noise, signal=signal, progress=progress, learning_rate=rate),
    norms,
    norms,
    st.floats(-1e6, 1e6),
    st.floats(1e-6, 1.0),
)


@given(one=split_parts)
def test_a_sum_over_one_group_is_that_group(one: GroupReading) -> None:
    assert summed([one], group=one.group) == one
    assert weighted_by_learning_rate([one], group=one.group) == one


@given(parts=st.lists(split_parts, min_size=1, max_size=5), factor=st.floats(1e-6, 1e6))
def test_scaling_all_learning_rates_changes_nothing(parts: list[GroupReading], factor: float) -> None:
    scaled = [one.model_copy(update={"learning_rate": factor * one.learning_rate}) for one in parts]
    before, after = (weighted_by_learning_rate(each, group="weighted") for each in (parts, scaled))
    assert before is not None
    assert after is not None
    size = sum(abs(one.noise) + abs(one.signal) + abs(one.progress or 0.0) for one in parts)
    for name in ("noise", "signal", "progress"):
        # Rounding of five products and one division, relative to the largest term.
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-12, abs=1e-14 * size)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("aggregation", ["sum_of_norms", "learning_rate_weighted", "max"])
def test_a_group_that_is_not_finite_keeps_the_whole_measurement_out(aggregation: Aggregation, value: float) -> None:
    broken = REST.model_copy(update={"noise": value})
    config = NoiseScalePolicyConfig(aggregation=aggregation)
    good, odd = follow(config, measurement(1, MATRICES, REST), measurement(2, MATRICES, broken))
    assert odd.reason == "hold_not_finite"
    assert odd.noise_sq == good.noise_sq


def test_learning_rates_of_zero_leave_nothing_to_weigh_with() -> None:
    config = NoiseScalePolicyConfig(aggregation="learning_rate_weighted")
    over = [one.model_copy(update={"learning_rate": 0.0}) for one in (MATRICES, REST)]
    good, last = follow(config, measurement(1, MATRICES, REST), measurement(2, *over))
    assert last.reason == "hold_no_reading"
    assert last.noise_sq == good.noise_sq == pytest.approx(100 / 9)
    [frozen] = follow(config, measurement(1, MATRICES, over[1]))
    assert frozen.noise_sq == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("aggregation", "geometry", "noise_sq"),
    [
        ("matrices_only", None, 9.0),
        ("matrices_only", "sign", 16.0),
        ("sum_of_norms", None, 49.0),
        ("sum_of_norms", "sign", 16.0),
        ("learning_rate_weighted", None, 100 / 9),
        ("max", None, 9.0),
        ("max", "sign", 16.0),
    ],
)
def test_a_policy_follows_the_readings_it_was_told_to(aggregation: Aggregation, geometry: Any, noise_sq: float) -> None:
    config = HoldPolicyConfig(aggregation=aggregation, geometry=geometry)
    other = MATRICES.model_copy(update={"direction": "update", "noise": 100.0})
    plain = reading(noise_scale=1e4)
    [decision] = follow(config, measurement(1, other, plain, MATRICES, REST))
    assert decision.noise_sq == pytest.approx(noise_sq)


@pytest.mark.parametrize(
    ("aggregation", "geometry", "noise_sq"),
    [
        ("sum_of_norms", None, 49.0),
        ("learning_rate_weighted", None, 100 / 9),
        ("max", None, 9.0),
        ("matrices_only", "euclidean", 6.25),
        ("sum_of_norms", "euclidean", 12.25),
    ],
)
def test_parameters_that_are_measured_in_two_norms_count_once(
    aggregation: Aggregation, geometry: Any, noise_sq: float
) -> None:
    def repeated(one: GroupReading, **changes: Any) -> GroupReading:
        return part(group=f"{one.group}, euclidean", geometry="euclidean", repeats=one.group, **changes)

    twins = [repeated(MATRICES, noise=2.5, signal=0.01, progress=0.01), repeated(REST, noise=1.0)]
    config = HoldPolicyConfig(aggregation=aggregation, geometry=geometry)
    [decision] = follow(config, measurement(1, MATRICES, twins[0], REST, twins[1]))
    assert decision.noise_sq == pytest.approx(noise_sq)


def test_readings_stored_before_repetitions_were_marked_all_count() -> None:
    stored = part(group="matrices, euclidean", geometry="euclidean", noise=3.0).model_dump(exclude={"repeats"})
    [decision] = follow(
        HoldPolicyConfig(aggregation="sum_of_norms"), measurement(1, MATRICES, REST, GroupReading(**stored))
    )
    assert decision.noise_sq == pytest.approx(100.0)


def test_a_policy_may_follow_the_update_instead_of_the_gradient() -> None:
    update = MATRICES.model_copy(update={"direction": "update", "noise": 1.5})
    [decision] = follow(HoldPolicyConfig(direction="update"), measurement(1, MATRICES, update))
    assert decision.noise_sq == pytest.approx(2.25)
    [decision] = follow(NoiseScalePolicyConfig(direction="update"), measurement(1, MATRICES))
    assert decision.reason == "hold_no_reading"


def resolved(noise_scale: float, group: str, *, progress: float = 1.0) -> GroupReading:
    return part(group=group, noise=math.sqrt(noise_scale), signal=1.0, progress=progress)


def test_max_follows_the_group_with_the_largest_resolved_noise_scale_and_changes_over_when_that_changes() -> None:
    # beta = 0.5: rest averages 20, 20, 20, 20, 20, then 60 + 1/2 (20 - 60) = 40 -> first above the matrices' 30.
    config = NoiseScalePolicyConfig(aggregation="max", noise_beta=0.5, signal_beta=0.5)
    reports = [
        measurement(step, resolved(30.0, "matrices"), resolved(20.0 if step <= 5 else 60.0, "rest"))
        for step in range(1, 8)
    ]
    found = follow(config, *reports)
    assert [decision.noise_sq for decision in found] == pytest.approx([30, 30, 30, 30, 30, 40, 50])
    assert "of matrices" in found[4].explanation
    assert "of rest" in found[5].explanation


def test_max_leaves_out_groups_that_cannot_be_told_from_noise() -> None:
    config = NoiseScalePolicyConfig(aggregation="max")
    reports = [
        measurement(step, resolved(30.0, "matrices"), resolved(500.0, "rest", progress=0.1 + 2 * (-1) ** step))
        for step in range(1, 12)
    ]
    found = follow(config, *reports)
    assert found[-1].noise_scale == pytest.approx(30.0)
    assert not found[-1].unresolved
    assert found[3].unresolved, "before five measurements no group is resolved"


def test_only_max_keeps_an_average_per_group() -> None:
    def state_after(aggregation: Aggregation, state: PolicyState) -> PolicyState:
        config = NoiseScalePolicyConfig(aggregation=aggregation)
        return decide(config, state, measurement(1, MATRICES, REST), facts=RunFacts(RULES))[0]

    for aggregation in get_args(Aggregation):
        state = state_after(aggregation, initial_state(RULES, data_parallel_size=2))
        assert len(state.groups) == (2 if aggregation == "max" else 0)
        assert PolicyState.model_validate_json(state.model_dump_json()) == state
        assert state_after("sum_of_norms", state).groups == ()


def test_max_forgets_a_group_that_is_no_longer_measured() -> None:
    config = NoiseScalePolicyConfig(aggregation="max")
    state = initial_state(RULES, data_parallel_size=2)
    for step, readings in enumerate([(MATRICES, REST), (MATRICES,), (MATRICES, REST)], start=1):
        state, _ = decide(config, state, measurement(step, *readings), facts=RunFacts(RULES))
    assert [average.noise_sq.count for average in state.groups] == [3, 1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"aggregation": "sum_of_norms"}),
        ({}, {"aggregation": "learning_rate_weighted"}),
        ({}, {"aggregation": "max"}),
        ({}, {"geometry": "sign"}),
        ({}, {"estimator": "rank_variance"}),
        ({}, {"direction": "update"}),
        ({"aggregation": "sum_of_norms"}, {"aggregation": "sum_of_norms", "geometry": "spectral"}),
        ({"estimator": "rank_variance"}, {"estimator": "rank_variance", "correct_few_groups": True}),
    ],
)
def test_averages_begin_anew_where_another_quantity_is_followed(before: dict[str, Any], after: dict[str, Any]) -> None:
    update = MATRICES.model_copy(update={"direction": "update"})
    report = measurement(1, MATRICES, REST, update, reading(noise_scale=5.0))
    state = initial_state(RULES, data_parallel_size=2)
    counts = []
    for changes in (before, before, after, after):
        state, _ = decide(NoiseScalePolicyConfig(**changes), state, report, facts=RunFacts(RULES))
        assert state.smoothed is not None
        counts.append(state.smoothed.noise_sq.count)
    assert counts == [1, 2, 1, 2]


def test_corrected_noise_does_not_move_when_the_ranks_do() -> None:
    # E[noise] of normal groups is c4(K-1) times the l1 norm of sigma, here 10: c4(1)^2 = 2/pi, c4(3)^2 = 8/(3 pi).
    two, four = (
        measurement(
            step,
            reading(
                noise_scale=1.0,
                geometry="sign",
                noise=10 * math.sqrt(squared),
                num_groups=groups,
                ceiling=100 * squared,
            ),
        )
        for step, groups, squared in ((1, 2, 2 / math.pi), (2, 4, 8 / (3 * math.pi)))
    )
    config = HoldPolicyConfig(estimator="rank_variance", correct_few_groups=True)
    found = follow(config, two, four)
    assert [decision.noise_sq for decision in found] == pytest.approx([100.0, 100.0])
    assert [decision.ceiling_samples for decision in found] == pytest.approx([100.0, 100.0])
    plain = follow(HoldPolicyConfig(estimator="rank_variance"), two, four)
    assert plain[0].noise_sq == pytest.approx(200 / math.pi)
    assert plain[0].resolution == pytest.approx(found[0].resolution)


def test_each_group_of_a_sum_is_corrected_by_its_own_geometry() -> None:
    spectral = reading(noise_scale=1.0, noise=3.0, num_groups=2)
    sign = reading(noise_scale=1.0, group="rest", geometry="sign", noise=4.0, num_groups=2)
    config = HoldPolicyConfig(estimator="rank_variance", aggregation="sum_of_norms", correct_few_groups=True)
    [decision] = follow(config, measurement(1, spectral, sign))
    assert decision.noise_sq == pytest.approx((3 + 4 * math.sqrt(math.pi / 2)) ** 2)
