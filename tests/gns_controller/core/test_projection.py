"""The ramp ahead, against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import Override, Span
from gns_controller.core.policies import (
    AnyPolicyConfig,
    DecayToRampPolicyConfig,
    GoodputPolicyConfig,
    GrowOncePolicyConfig,
    HoldPolicyConfig,
    LinearRampPolicyConfig,
    NoiseScalePolicyConfig,
    PolicyState,
    RunFacts,
    Stage,
    StagesPolicyConfig,
    decide,
    initial_state,
)
from gns_controller.core.projection import (
    NUM_POINTS,
    Projection,
    advised_data_parallel_size,
    project,
    savings,
    schedule_at,
    whole_steps,
)
from gns_controller.core.runs import RunSpecification
from tests.gns_controller.core.measurements import measurement, reading
from tests.gns_controller.core.strategies import Report, Trainer, runs, sequences

BUDGET = 16 * 128 * 100
RULES = BatchRules(global_batch_size=16, micro_batch_size=64)
FACTS = RunFacts(RULES, BUDGET)


def at_start(policy: AnyPolicyConfig, *, samples: int = 0, **changes: Any) -> Projection:
    state = initial_state(RULES, data_parallel_size=2)
    return project(policy, state, measurement(samples // 16, samples=samples), facts=FACTS, **changes)


def test_a_constant_batch_takes_what_is_left_over_the_batch() -> None:
    projection = at_start(HoldPolicyConfig())
    assert [stage.global_batch_size for stage in projection.stages] == [16]
    left = projection.steps_left
    assert (left.expected, left.least, left.most) == (BUDGET // 16,) * 3
    assert at_start(HoldPolicyConfig(), samples=BUDGET // 4).steps_left.expected == 3 * BUDGET // 4 // 16
    assert at_start(HoldPolicyConfig(), samples=BUDGET).steps_left.expected == 0
    assert at_start(HoldPolicyConfig(), samples=BUDGET + 5).steps_left.expected == 0


def test_stages_are_projected_where_they_begin() -> None:
    quarter = BUDGET // 4
    policy = StagesPolicyConfig(
        stages=(
            Stage(from_samples=quarter, global_batch_size=32),
            Stage(from_samples=2 * quarter, global_batch_size=128),
        )
    )
    projection = at_start(policy)
    assert [(s.samples_seen, s.global_batch_size) for s in projection.stages] == [
        (0, 16),
        (quarter, 32),
        (2 * quarter, 128),
    ]
    assert projection.steps_left.expected == quarter // 16 + quarter // 32 + 2 * quarter // 128
    # In between imagined reports a stage begins at the next: an error of one in 128 of the way at most.
    shifted = StagesPolicyConfig(stages=(Stage(from_samples=quarter + 1, global_batch_size=32),))
    exact = (quarter + 1) / 16 + (3 * quarter - 1) / 32
    assert at_start(shifted).steps_left.expected == pytest.approx(exact, abs=BUDGET / NUM_POINTS * (1 / 16 - 1 / 32))
    once = at_start(GrowOncePolicyConfig(at_share=0.25, factor=4))
    assert once.steps_left.expected == quarter // 16 + 3 * quarter // 64
    assert once.stages[-1].learning_rate_factor == 2.0


def test_near_the_end_no_more_is_imagined_than_can_be_measured() -> None:
    # 20 samples are two steps of 16: an uncapped policy has two decisions, not 128.
    seen = reading(noise_scale=1e6)
    policy = NoiseScalePolicyConfig.published(growth_cap=2.0)
    state, _ = decide(
        HoldPolicyConfig(estimator="rank_variance"),
        initial_state(RULES, data_parallel_size=2),
        measurement(9, seen),
        facts=FACTS,
    )
    projection = project(policy, state, measurement(9, seen, samples=BUDGET - 20), facts=FACTS)
    assert [stage.global_batch_size for stage in projection.stages] == [16, 32, 64]


def measured(noise_scales: list[float], policy: AnyPolicyConfig) -> PolicyState:
    state = initial_state(RULES, data_parallel_size=2)
    for k, noise_scale in enumerate(noise_scales):
        state, _ = decide(policy, state, measurement(k + 1, reading(noise_scale=noise_scale)), facts=FACTS)
    return state


SPREAD = [30.0, 50.0, 40.0, 36.0, 44.0, 40.0]


def test_the_interval_of_the_noise_scale_becomes_one_of_batches_and_steps() -> None:
    policy = NoiseScalePolicyConfig(
        estimator="rank_variance", noise_tolerance=1.0, growth_cap=None, warmup=Span(steps=100)
    )
    state = measured(SPREAD, policy)
    assert state.smoothed is not None
    judged = state.smoothed.judged()
    assert judged.low is not None
    assert judged.high is not None
    projection = project(policy, state, measurement(6, reading(noise_scale=40.0)), facts=FACTS)
    end = projection.stages[-1]
    assert judged.noise_scale is not None
    # Rounded down to multiples of two.
    assert end.low == max(int(judged.low / 2) * 2, 16)
    assert end.global_batch_size == int(judged.noise_scale / 2) * 2
    assert end.high == int(judged.high / 2) * 2
    assert end.low < end.global_batch_size < end.high
    left = projection.steps_left
    assert left.least < left.expected < left.most


def test_a_frozen_decay_is_seen_coming_in_the_schedule() -> None:
    grown = NoiseScalePolicyConfig.published(
        noise_tolerance=0.5, noise_beta=0.0, signal_beta=0.0, warmup=Span(samples=BUDGET // 2)
    )
    frozen = grown.model_copy(update={"decay": "freeze"})
    state = measured([40.0], grown)
    last = measurement(1, reading(noise_scale=40.0))
    falling = [1.0, 1.0, 0.0, 0.0, 0.0]  # at half of the budget the rate is gone
    assert project(grown, state, last, facts=FACTS, schedule=falling).stages[-1].global_batch_size > 16
    assert project(frozen, state, last, facts=FACTS, schedule=falling).stages[-1].global_batch_size == 16
    assert project(frozen, state, last, facts=FACTS, schedule=[1.0]).stages[-1].global_batch_size > 16
    assert project(frozen, state, last, facts=FACTS).stages[-1].global_batch_size > 16
    # Seesaw: the schedule is the ramp.
    trade = project(DecayToRampPolicyConfig(), state, last, facts=FACTS, schedule=[1.0, 0.75, 0.5, 0.25, 0.125])
    assert {stage.global_batch_size for stage in trade.stages} == {16, 32, 64, 128}


def test_an_operators_word_is_expected_to_stay() -> None:
    policy = LinearRampPolicyConfig(global_batch_size=64, ramp_samples=BUDGET)
    held = at_start(policy, override=Override(kind="hold"))
    assert [stage.global_batch_size for stage in held.stages] == [16]
    pinned = at_start(policy, override=Override(kind="pin", global_batch_size=32))
    assert pinned.stages[-1].global_batch_size == 32
    assert pinned.steps_left.expected == pytest.approx(BUDGET / 32, rel=0.01)


def test_a_schedule_is_read_linearly_between_its_points() -> None:
    points = [0.0, 1.0, 0.5]
    assert [schedule_at(points, share, 9.0) for share in (0.0, 0.25, 0.5, 0.75, 1.0, 2.0)] == [
        0,
        0.5,
        1,
        0.75,
        0.5,
        0.5,
    ]
    assert schedule_at([], 0.5, 9.0) == 9.0
    assert schedule_at([0.3], 0.5, 9.0) == 0.3


def test_a_last_step_of_a_few_samples_is_a_step() -> None:
    left = at_start(HoldPolicyConfig(), samples=BUDGET - 4).steps_left
    assert (left.expected, left.least, left.most) == (1, 1, 1)
    assert at_start(HoldPolicyConfig(), samples=BUDGET - 16 * 3 - 1).steps_left.expected == 4
    # Sums of shares of steps are off in their last bits, and whole steps stay whole.
    for seen in range(0, 16 * 1000, 16):
        assert at_start(HoldPolicyConfig(), samples=seen).steps_left.expected == (BUDGET - seen) // 16


def test_in_shadow_mode_the_steps_left_are_those_of_the_batch_that_the_trainer_keeps() -> None:
    policy = StagesPolicyConfig(stages=(Stage(from_samples=0, global_batch_size=128),))
    state, _ = decide(policy, initial_state(RULES, data_parallel_size=2), measurement(10), facts=FACTS)
    asked, followed = (project(policy, state, measurement(10), facts=FACTS, shadow=mode) for mode in (True, False))
    left = asked.steps_left
    assert (left.expected, left.least, left.most) == ((BUDGET - 160) // 16,) * 3
    assert followed.steps_left.expected == -(-(BUDGET - 160) // 128)
    # The ramp that it would have is shown all the same.
    assert asked.stages == followed.stages
    assert asked.stages[0].global_batch_size == 128


@pytest.mark.parametrize("micro", [1, 3, 8])
@pytest.mark.parametrize("granularity", [1, 2])
def test_the_advised_ranks_are_the_most_that_make_the_batch_of_whole_micro_batches(
    micro: int, granularity: int
) -> None:
    """Tried one by one; where no number of ranks does it, the job keeps its own."""
    num_kept = 0
    for present in (1, 2, 4, 5):
        for batch in range(1, 100):
            rules = BatchRules(global_batch_size=batch, micro_batch_size=micro, micro_batch_granularity=granularity)
            if rules.grid(data_parallel_size=present).floor(batch) != batch:
                continue
            fitting = [
                ranks
                for ranks in range(1, batch + 1)
                if ranks * micro <= batch and rules.grid(data_parallel_size=ranks).floor(batch) == batch
            ]
            state = initial_state(rules, data_parallel_size=present)
            last = measurement(1, batch=batch, ranks=present)
            for report in (None, last):
                found = advised_data_parallel_size(state, report, facts=RunFacts(rules))
                assert found == (fitting[-1] if fitting else present)
            num_kept += not fitting
    assert num_kept > 0 or micro == 1


def test_advice_in_shadow_mode_is_about_the_batch_that_is_in_force() -> None:
    rules = BatchRules(global_batch_size=64, micro_batch_size=8)
    state = initial_state(rules, data_parallel_size=1)
    last = measurement(1, batch=16, ranks=1)
    facts = RunFacts(rules)
    assert advised_data_parallel_size(state, last, facts=facts, shadow=True) == 2
    assert advised_data_parallel_size(state, last, facts=facts) == 8
    assert advised_data_parallel_size(state, None, facts=facts, shadow=True) == 8


@pytest.mark.parametrize(("batch", "ranks"), [(16, 1), (64, 1), (128, 2), (640, 10)])
def test_ranks_are_advised_that_fill_whole_micro_batches(batch: int, ranks: int) -> None:
    rules = BatchRules(global_batch_size=batch, micro_batch_size=64)
    state = initial_state(rules, data_parallel_size=1)
    assert advised_data_parallel_size(state, None, facts=RunFacts(rules)) == ranks


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    run=runs(),
    sequence=sequences,
    schedule=st.lists(st.floats(0, 2), max_size=9),
    override=st.none() | st.builds(Override, kind=st.just("pin"), global_batch_size=st.integers(1, 999)),
)
def test_every_run_has_a_projection(
    run: RunSpecification, sequence: list[Report], schedule: list[float], override: Override | None
) -> None:
    trainer, state = Trainer(run), initial_state(run.batch, data_parallel_size=run.data_parallel_size)
    for report in sequence:
        last = trainer.next_report(report, state.plan)
        state, _ = decide(run.policy, state, last, facts=run.facts)
    for facts in (run.facts, run.facts._replace(budget_samples=None)):
        projection = project(run.policy, state, last, facts=facts, schedule=schedule, override=override)
        assert Projection.model_validate_json(projection.model_dump_json()) == projection
        first = projection.stages[0]
        assert (first.samples_seen, first.global_batch_size) == (last.samples_seen, state.plan.global_batch_size)
        seen = [stage.samples_seen for stage in projection.stages]
        assert seen == sorted(seen)
        for stage in projection.stages:
            assert stage.low <= stage.global_batch_size <= stage.high
        left = projection.steps_left
        assert left.least <= left.expected <= left.most
        savings(state, last, facts=facts)
        assert advised_data_parallel_size(state, last, facts=facts) >= 1


def test_a_policy_that_explores_is_projected_to_explore_once() -> None:
    policy = GoodputPolicyConfig(estimator="rank_variance")
    timed = measurement(1, reading(noise_scale=400.0), step_seconds=1.0)
    state, _ = decide(
        HoldPolicyConfig(estimator="rank_variance"), initial_state(RULES, data_parallel_size=2), timed, facts=FACTS
    )
    assert [s.global_batch_size for s in project(policy, state, timed, facts=FACTS).stages] == [16, 32]


@given(st.integers(1, 10**7), st.sampled_from([0.0, 1e-11, -1e-11]))
def test_rounding_in_a_sum_is_no_step_however_long_the_run(steps: int, error: float) -> None:
    assert whole_steps(steps * (1 + error)) == steps
    assert whole_steps(steps + 0.25) == steps + 1
