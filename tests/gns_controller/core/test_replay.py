"""Replay: steps counted by hand, what another policy counts in, and what the report says ran."""

from __future__ import annotations

import math

import pytest

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import NoiseScaleMeasurement, Span
from gns_controller.core.policies import (
    AnyPolicyConfig,
    HoldPolicyConfig,
    LinearRampPolicyConfig,
    NoiseScalePolicyConfig,
    Stage,
    StagesPolicyConfig,
    decide,
    initial_state,
)
from gns_controller.core.replay import Event, ReplayReport, Resumed, compare, replay
from gns_controller.core.runs import Control, RunSpecification
from tests.gns_controller.core.measurements import measurement, reading, specification


def to_the_last_sample(run: RunSpecification, *, steps_between: int) -> list[NoiseScaleMeasurement]:
    """A trainer that obeys, and whose last step takes what is left; its last report is of that step."""
    state = initial_state(run.batch, data_parallel_size=run.data_parallel_size)
    plan, coming, reports, step, samples = state.plan, [state.plan], list[NoiseScaleMeasurement](), 0, 0
    while samples < run.budget_samples:
        plan = max((one for one in coming if one.effective_step <= step), key=lambda one: one.version)
        step, samples = step + 1, min(samples + plan.global_batch_size, run.budget_samples)
        if step % steps_between == 0 or samples == run.budget_samples:
            batch = plan.global_batch_size
            report = measurement(step, samples=samples, batch=batch, plan_version=plan.version)
            report = report.model_copy(
                update={
                    "micro_batch_size": plan.micro_batch_size,
                    "gradient_accumulation_steps": plan.gradient_accumulation_steps,
                }
            )
            state, _ = decide(run.policy, state, report, facts=run.facts)
            coming.append(state.plan)
            reports.append(report)
    return reports


@pytest.mark.parametrize(("delay", "interval"), [(0, 1), (1, 1), (3, 1), (1, 7)])
@pytest.mark.parametrize("budget", [16 * 300 + left for left in (0, 1, 4, 7, 8, 9, 15)])
def test_the_policy_that_ran_takes_the_steps_that_were_taken(delay: int, interval: int, budget: int) -> None:
    """The last step is not a whole batch, and a step all the same."""
    policy = LinearRampPolicyConfig(global_batch_size=64, ramp_samples=budget)
    run = specification(
        policy, budget_samples=budget, decision_delay_steps=delay, plan_interval_steps=interval, micro_batch_size=8
    )
    reports = to_the_last_sample(run, steps_between=10)
    report = compare(run, [Resumed(0), *reports], follow_trainer=True)
    assert report.rows[-1].replayed_batch_size > 32
    assert (report.happened_steps, report.replayed_steps) == (reports[-1].optimizer_step,) * 2
    assert report.steps_saved == 0


def constantly_16(num_samples: int, *, every: int = 10) -> list[NoiseScaleMeasurement]:
    return [measurement(step) for step in range(every, num_samples // 16 + 1, every)]


def changes(report: ReplayReport) -> list[tuple[int, int]]:
    """Where the replayed batch changes: samples and the new batch."""
    batches = [16, *(row.replayed_batch_size for row in report.rows)]
    return [
        (row.samples_seen, row.replayed_batch_size)
        for before, row in zip(batches, report.rows, strict=False)
        if row.replayed_batch_size != before
    ]


DOUBLING = LinearRampPolicyConfig(global_batch_size=256, ramp_samples=1, growth_cap=2.0, dwell=Span(steps=100))


def test_another_policys_steps_are_those_that_its_own_batches_take() -> None:
    """A doubling every 100 of its steps; the recording has a report every 160 samples.

    100 steps of 16 are 1600 samples, and 32 is in force one step later, from 1616 on. 100 steps of 32 end at 4816; the
    next report is at 4960, in step 206, so 64 is in force from 4992 on with 206.5 steps. It was decided for step 206:
    step 306 ends at 4992 + 99.5 * 64 = 11 360, a report. 128 from 11 424 on, 100 steps of it to 24 224, the next
    report is at 24 320 with 407.75 steps, and 256 holds from 24 448 on: 408.75 + (60 000 - 24 448) / 256 = 547.6.
    """
    run = specification(HoldPolicyConfig(), budget_samples=60_000)
    report = compare(run, constantly_16(60_000), policy=DOUBLING)
    assert changes(report) == [(1600, 32), (4960, 64), (11_360, 128), (24_320, 256)]
    assert (report.happened_steps, report.replayed_steps) == (3750, 548)
    assert [row.optimizer_step for row in report.rows] == list(range(10, 3751, 10)), "keyed by the recorded steps"
    # A run that lives through it measures every 10 of its own steps instead, up to 256 / 16 times as rarely.
    lived = to_the_last_sample(run.model_copy(update={"policy": DOUBLING}), steps_between=10)[-1].optimizer_step
    assert report.replayed_steps == pytest.approx(lived, rel=0.03)


def test_a_warmup_of_another_policy_lasts_as_many_of_its_steps() -> None:
    """The recording took 64 samples a step, and the run was registered with 16: 100 steps of 16 are 25 of its steps."""
    recorded = [measurement(step, samples=64 * step, batch=64) for step in range(5, 101, 5)]
    policy = StagesPolicyConfig(stages=(Stage(from_samples=0, global_batch_size=32),), warmup=Span(steps=100))
    report = compare(specification(HoldPolicyConfig()), recorded, policy=policy)
    assert [row.replayed_reason for row in report.rows[:5]] == ["warmup"] * 4 + ["stage"]
    assert changes(report) == [(1600, 32)]


def test_what_a_restart_undid_is_in_no_step_count_of_another_policy() -> None:
    run = specification(HoldPolicyConfig(), budget_samples=60_000)
    path = constantly_16(16 * 800)
    undone: list[Event] = [Resumed(0), *path[:60], Resumed(300), *path[30:70], Resumed(450), *path[45:]]
    straight, restarted = compare(run, path, policy=DOUBLING), compare(run, undone, policy=DOUBLING)
    assert restarted == straight
    assert len(changes(straight)) == 3


def test_the_replay_of_what_ran_counts_the_trainers_steps() -> None:
    """As it was decided: also in shadow mode, where the policy's batches are not those that were taken."""
    run = specification(DOUBLING, budget_samples=60_000, mode="shadow")
    path = constantly_16(60_000)
    state, decided = initial_state(run.batch, data_parallel_size=2), []
    for report in path:
        state, decision = decide(DOUBLING, state, report, facts=run.facts, follow_trainer=False)
        decided.append(decision)
    assert replay(run, path) == decided
    grown = [decision.samples_seen for decision in decided if decision.reason == "capped_growth"]
    # Steps 100, 101 + 100 and so on of the trainer, each in the next report.
    assert grown[:3] == [1600, 16 * 210, 16 * 320]


def test_a_measured_step_that_goes_back_does_not_take_steps_back() -> None:
    run = specification(HoldPolicyConfig())
    events = [measurement(100), measurement(110, samples=800), measurement(120, samples=1920)]
    report = compare(run, events, policy=StagesPolicyConfig(stages=(Stage(from_samples=0, global_batch_size=64),)))
    assert report.replayed_steps == 1 + math.ceil(100 + (1920 - 1616) / 64)


def test_the_report_names_the_policy_that_was_in_force_last() -> None:
    run = specification(HoldPolicyConfig())
    later: AnyPolicyConfig = NoiseScalePolicyConfig.published()
    changed = Control(policy=later, policy_revision=1, override=None)
    events: list[Event] = [measurement(10, reading(noise_scale=9.0)), changed, measurement(20)]
    assert compare(run, events, follow_trainer=True).policy == later
    assert compare(run, events, policy=DOUBLING).policy == DOUBLING
    assert compare(run, events[:1]).policy == run.policy


def test_what_happened_to_a_run_in_shadow_mode_is_what_its_trainer_did() -> None:
    rules = BatchRules(global_batch_size=16, micro_batch_size=8)
    policy = StagesPolicyConfig(stages=(Stage(from_samples=100, global_batch_size=512),))
    for mode, happened in (("shadow", [16, 16]), ("active", [512, 512])):
        run = RunSpecification.model_validate(
            {"batch": rules, "data_parallel_size": 2, "budget_samples": 10**5, "policy": policy, "mode": mode}
        )
        events = [measurement(50), measurement(100)]
        recorded = replay(run, events)
        report = compare(run, events, recorded=recorded)
        assert [row.happened_batch_size for row in report.rows] == happened
        assert [row.replayed_batch_size for row in report.rows] == [512, 512]
        assert report.num_equal == 2
