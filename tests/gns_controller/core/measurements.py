"""Measurements for tests, and runs that make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import Decision, GroupReading, NoiseScaleMeasurement
from gns_controller.core.policies import AnyPolicyConfig, decide, initial_state
from gns_controller.core.replay import replay
from gns_controller.core.runs import RunSpecification


def reading(
    *, noise_scale: float, estimator: str = "rank_variance", ceiling: float | None = 1e6, **changes: Any
) -> GroupReading:
    """Signal 1, so that noise_sq is the noise scale."""
    fields: dict[str, Any] = {
        "group": "matrices",
        "geometry": "spectral",
        "estimator": estimator,
        "noise": noise_scale**0.5 if noise_scale >= 0 else 1.0,
        "signal": 1.0,
        "progress": 1.0 if estimator == "split" else None,
        "ceiling_samples": ceiling if estimator == "rank_variance" else None,
        "num_groups": 4,
        "samples_per_group": 4,
        "learning_rate": 0.01,
    }
    return GroupReading(**{**fields, **changes})


def measurement(
    step: int, *readings: GroupReading, batch: int = 16, ranks: int = 2, samples: int | None = None, **changes: Any
) -> NoiseScaleMeasurement:
    """One report of a run on two ranks."""
    fields: dict[str, Any] = {
        "run_id": "run",
        "attempt": 0,
        "optimizer_step": step,
        "samples_seen": samples if samples is not None else 16 * step,
        "plan_version": 0,
        "global_batch_size": batch,
        "micro_batch_size": max(batch // ranks, 1),
        "gradient_accumulation_steps": 1,
        "data_parallel_size": ranks,
        "readings": readings,
    }
    return NoiseScaleMeasurement(**{**fields, **changes})


def specification(policy: AnyPolicyConfig, **changes: Any) -> RunSpecification:
    """A run on two ranks, 16 samples a step at the start; fields of the run or of its batch rules."""
    run = {name: changes.pop(name) for name in set(changes) & set(RunSpecification.model_fields)}
    rules = {"global_batch_size": 16, "micro_batch_size": 32, **changes}
    fields: dict[str, Any] = {"data_parallel_size": 2, "budget_samples": 100_000, **run}
    return RunSpecification(batch=BatchRules(**rules), policy=policy, **fields)


def decisions(policy: AnyPolicyConfig, measurements: list[NoiseScaleMeasurement], **changes: Any) -> list[Decision]:
    """What the policy makes of them."""
    return replay(specification(policy, **changes), measurements)


def trained(
    run: RunSpecification,
    *,
    steps_between: int = 1,
    readings: tuple[GroupReading, ...] = (),
    schedule: Callable[[float], float] = lambda share: 1.0,
    **changes: Any,
) -> list[tuple[NoiseScaleMeasurement, Decision]]:
    """A trainer that does as it is told, to the end of the budget: every report, and the decision about it.

    Args:
        run: with its policy.
        steps_between: optimizer steps from one report to the next.
        readings: of every report.
        schedule: learning rate over its peak, from the share of the budget that has been seen.
        changes: of every measurement.
    """
    state = initial_state(run.batch, data_parallel_size=run.data_parallel_size)
    plan, coming, reports = state.plan, state.plan, []
    step = samples = 0
    while samples < run.budget_samples:
        if coming.effective_step <= step:
            plan = coming
        step, samples = step + 1, samples + plan.global_batch_size
        if step % steps_between:
            continue
        report = NoiseScaleMeasurement(
            run_id="run",
            attempt=0,
            optimizer_step=step,
            samples_seen=samples,
            plan_version=plan.version,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            gradient_accumulation_steps=plan.gradient_accumulation_steps,
            data_parallel_size=run.data_parallel_size,
            schedule_factor=schedule(samples / run.budget_samples),
            readings=readings,
            **changes,
        )
        state, decision = decide(run.policy, state, report, facts=run.facts)
        coming = state.plan
        reports.append((report, decision))
    return reports
