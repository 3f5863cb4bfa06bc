"""What a measurement teaches, whatever the policy: the batch in force, averages, progress, step times, the decay."""

from __future__ import annotations

import math

from gns_controller.core.aggregation import summed, weighted_by_learning_rate
from gns_controller.core.contract import BatchPlan, GroupReading, NoiseScaleMeasurement, Reason
from gns_controller.core.coupling import coupled
from gns_controller.core.policies.frame import PolicyConfig, PolicyState, ProgressAverage, RunFacts, StepTiming
from gns_controller.core.smoothing import SignedAverage, SmoothedNoiseScale

_TIMING_BETA = 0.9
_MAX_TIMINGS = 32


def adopt(state: PolicyState, measurement: NoiseScaleMeasurement, *, facts: RunFacts) -> PolicyState:
    """Believe the trainer about the batch that is in force.

    The plan that should be in force by now may not be: the trainer decided alone during an outage, an operator
    pinned another batch, or the world size changed on a restart.
    """
    plan = state.plan
    in_force = (plan.global_batch_size, plan.micro_batch_size, plan.gradient_accumulation_steps)
    reported = (
        measurement.global_batch_size,
        measurement.micro_batch_size,
        measurement.gradient_accumulation_steps,
    )
    if measurement.optimizer_step < plan.effective_step or reported == in_force:
        return state
    factor, factors, exponent = coupled(
        facts.rules,
        global_batch_size=measurement.global_batch_size,
        noise_scale=state.smoothed.judged().noise_scale if state.smoothed else None,
        previous=plan,
    )
    measured = BatchPlan(
        version=max(plan.version, measurement.plan_version),
        global_batch_size=measurement.global_batch_size,
        micro_batch_size=measurement.micro_batch_size,
        gradient_accumulation_steps=measurement.gradient_accumulation_steps,
        learning_rate_factor=factor,
        optimizer_factors=factors,
        beta_exponent=exponent,
        effective_step=measurement.optimizer_step,
    )
    if measurement.global_batch_size == plan.global_batch_size:
        return state.model_copy(update={"plan": measured})
    return state.model_copy(
        update={
            "plan": measured,
            "changed_at_step": measurement.optimizer_step,
            "changed_at_samples": measurement.samples_seen,
        }
    )


def followed_readings(config: PolicyConfig, measurement: NoiseScaleMeasurement) -> list[GroupReading]:
    """What this policy's averages are made of: one reading, after aggregation; one of each group for "max"; or none."""
    found = []
    for reading in measurement.readings:
        if reading.estimator != config.estimator or reading.direction != config.direction:
            continue
        if config.geometry is not None and reading.geometry != config.geometry:
            continue
        found.append(reading.corrected_for_few_groups() if config.correct_few_groups else reading)
        if config.aggregation == "matrices_only":
            break
    if not found or config.aggregation in ("matrices_only", "max"):
        return found
    # With the parts' names: where another set of layers is measured, averages start again.
    name = f"{config.aggregation}: {' + '.join(reading.group for reading in found)}"[:200]
    if config.aggregation == "sum_of_norms":
        return [summed(found, group=name)]
    weighted = weighted_by_learning_rate(found, group=name)
    return [] if weighted is None else [weighted]


def observe(config: PolicyConfig, state: PolicyState, measurement: NoiseScaleMeasurement) -> tuple[PolicyState, Reason]:
    """Update everything. The reason is "hold" where there was a reading to learn from, else why there was not."""
    learned = _clockwork(state, measurement)
    readings = followed_readings(config, measurement)
    if not readings:
        return state.model_copy(update=learned), "hold_no_reading"
    if not all(reading.is_finite for reading in readings):
        return state.model_copy(update=learned), "hold_not_finite"
    groups: tuple[SmoothedNoiseScale, ...] = ()
    if config.aggregation == "max":
        before = {average.group: average for average in state.groups}
        groups = tuple(_averaged(config, before.get(reading.group), reading) for reading in readings)
        smoothed = _largest(groups)
    else:
        smoothed = _averaged(config, state.smoothed, readings[0])
    learned |= {"smoothed": smoothed, "groups": groups, "num_measurements": state.num_measurements + 1}
    learned["curve"] = _averaged_curve(config, state.curve, readings[0])
    return state.model_copy(update=learned), "hold"


def _clockwork(state: PolicyState, measurement: NoiseScaleMeasurement) -> dict[str, object]:
    """Peak of the schedule and step times: learned from every measurement, with readings or without."""
    learned: dict[str, object] = {"last_step": measurement.optimizer_step}
    factor = measurement.schedule_factor
    if math.isfinite(factor) and factor > state.peak_schedule_factor:
        learned["peak_schedule_factor"] = factor
    seconds = measurement.step_seconds
    if seconds is not None and 0 < seconds < math.inf:
        steps = max(measurement.optimizer_step - state.last_step, 0)
        learned["timings"] = _timed(state.timings, measurement.global_batch_size, seconds)
        learned["timed_steps"] = state.timed_steps + steps
        total = state.timed_seconds + steps * seconds
        learned["timed_seconds"] = total if math.isfinite(total) else state.timed_seconds
    return learned


def _timed(timings: tuple[StepTiming, ...], batch_size: int, seconds: float) -> tuple[StepTiming, ...]:
    others = [timing for timing in timings if timing.global_batch_size != batch_size]
    known = next((timing for timing in timings if timing.global_batch_size == batch_size), None)
    count = known.num_reports + 1 if known else 1
    weight = max(1 / count, 1 - _TIMING_BETA)
    average = seconds if known is None else known.step_seconds + weight * (seconds - known.step_seconds)
    timing = StepTiming(global_batch_size=batch_size, step_seconds=average, num_reports=count)
    return tuple(sorted([*others, timing], key=lambda kept: kept.global_batch_size)[:_MAX_TIMINGS])


def _averaged(config: PolicyConfig, before: SmoothedNoiseScale | None, reading: GroupReading) -> SmoothedNoiseScale:
    if before is None or not before.continues_with(reading, corrected=config.correct_few_groups):
        return SmoothedNoiseScale.started_by(reading, corrected=config.correct_few_groups)
    return before.updated(reading, noise_beta=config.noise_beta, signal_beta=config.signal_beta)


def _averaged_curve(
    config: PolicyConfig, before: tuple[ProgressAverage, ...], reading: GroupReading
) -> tuple[ProgressAverage, ...]:
    points = sorted(
        (point for point in reading.progress_curve if math.isfinite(point.progress)), key=lambda point: point.samples
    )
    if not points:
        return before
    if [point.samples for point in points] != [average.samples for average in before]:
        return tuple(
            ProgressAverage(samples=point.samples, progress=SignedAverage(mean=point.progress)) for point in points
        )
    return tuple(
        ProgressAverage(
            samples=point.samples, progress=average.progress.updated(point.progress, beta=config.signal_beta)
        )
        for point, average in zip(points, before, strict=True)
    )


def _largest(groups: tuple[SmoothedNoiseScale, ...]) -> SmoothedNoiseScale:
    """The largest noise scale of those resolved, else of those unresolved; the first of equals."""

    def rank(average: SmoothedNoiseScale) -> tuple[bool, float]:
        judged = average.judged()
        return not judged.unresolved, judged.noise_scale or 0.0

    return max(groups, key=rank)
