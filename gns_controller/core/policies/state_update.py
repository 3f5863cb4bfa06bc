"""What a measurement teaches, whatever the policy: the batch in force, averages, progress, step times, the decay."""

from __future__ import annotations

import math

from gns_controller.core.aggregation import summed, weighted_by_learning_rate
from gns_controller.core.contract import BatchPlan, GroupReading, NoiseScaleMeasurement, ProgressPoint, Reason
from gns_controller.core.coupling import coupled
from gns_controller.core.policies.base import PolicyConfig, PolicyState, ProgressAverage, RunFacts, StepTiming
from gns_controller.core.statistics import NOTHING_SEEN, SignedAverage, SmoothedNoiseScale, corrected_for_few_groups

_TIMING_BETA = 0.9
_MAX_TIMINGS = 32
_STEP_SECONDS = (1e-9, 1e9)
"""Step times outside of this are no times, and their squares no numbers."""
_LARGEST_AVERAGED = 1e150
"""As for readings: averages keep squares."""


def timed_on_these_ranks(state: PolicyState, measurement: NoiseScaleMeasurement) -> PolicyState:
    """Forget the step times of other ranks: the same batch takes another time there."""
    plan, ranks = state.plan, state.data_parallel_size
    if ranks is None:  # nothing measured yet, or stored before states knew it
        ranks = plan.global_batch_size // (plan.micro_batch_size * plan.gradient_accumulation_steps)
    if not state.timings or ranks == measurement.data_parallel_size:
        return state
    return state.model_copy(update={"timings": ()})


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
    # The first step under a plan starts with `effective_step` completed ones: the report that counts as many tells of
    # the step before.
    if measurement.optimizer_step <= plan.effective_step or reported == in_force:
        return state
    same_batch = measurement.global_batch_size == plan.global_batch_size
    factor, factors, exponent = coupled(
        facts.rules,
        global_batch_size=measurement.global_batch_size,
        noise_scale=None if same_batch else _resolved_noise_scale(state),
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
    changes: dict[str, object] = {"plan": measured}
    if not same_batch:
        changes |= {
            "changed_at_step": measurement.optimizer_step,
            "changed_at_samples": measurement.samples_seen,
            "curve": (),
        }
    return state.model_copy(update=changes)


def _resolved_noise_scale(state: PolicyState) -> float | None:
    judged = state.smoothed.judged() if state.smoothed else NOTHING_SEEN
    return None if judged.unresolved else judged.noise_scale


def followed_readings(config: PolicyConfig, measurement: NoiseScaleMeasurement) -> list[GroupReading]:
    """What this policy's averages are made of: one reading, after aggregation; one of each group for "max"; or none."""
    found = []
    for reading in measurement.readings:
        if reading.estimator != config.estimator or reading.direction != config.direction:
            continue
        if config.geometry is not None and reading.geometry != config.geometry:
            continue
        if config.geometry is None and reading.repeats is not None:
            continue  # the same parameters in their own norm are here as well
        found.append(corrected_for_few_groups(reading) if config.correct_few_groups else reading)
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


def observe(
    config: PolicyConfig, state: PolicyState, measurement: NoiseScaleMeasurement, *, facts: RunFacts
) -> tuple[PolicyState, Reason]:
    """Update everything. The reason is "hold" where there was a reading to learn from, else why there was not."""
    learned = _clockwork(state, measurement, facts)
    readings = followed_readings(config, measurement)
    if not readings:
        return state.model_copy(update=learned), "hold_no_reading"
    if not all(reading.is_finite for reading in readings):
        return state.model_copy(update=learned), "hold_not_finite"
    groups: tuple[SmoothedNoiseScale, ...] = ()
    followed = readings[0]
    if config.aggregation == "max":
        before = {average.group: average for average in state.groups}
        groups = tuple(_averaged(config, before.get(reading.group), reading) for reading in readings)
        smoothed = _largest(groups)
        followed = next(reading for reading in readings if reading.group == smoothed.group)
    else:
        smoothed = _averaged(config, state.smoothed, followed)
    learned["smoothed"] = smoothed
    learned["groups"] = groups
    learned["num_measurements"] = state.num_measurements + 1
    if followed.progress_curve:
        learned["curve"] = _averaged_curve(config, state.curve if _goes_on(config, state, followed) else (), followed)
    return state.model_copy(update=learned), "hold"


def _clockwork(state: PolicyState, measurement: NoiseScaleMeasurement, facts: RunFacts) -> dict[str, object]:
    """Peak of the schedule, step times and what they saved: of every measurement, with readings or without.

        seconds saved += steps * (B / B0 * t0 - t)          t: of a step at batch B; t0: at the batch B0 of the start

    Exactly 0 at B0, whatever the average t0 of its steps says of these.
    """
    learned: dict[str, object] = {
        "last_step": measurement.optimizer_step,
        "data_parallel_size": measurement.data_parallel_size,
    }
    factor = measurement.schedule_factor
    if math.isfinite(factor) and factor > state.peak_schedule_factor:
        learned["peak_schedule_factor"] = factor
    seconds = measurement.step_seconds
    if seconds is not None and _STEP_SECONDS[0] <= seconds <= _STEP_SECONDS[1]:
        batch_size, first = measurement.global_batch_size, facts.rules.global_batch_size
        timings = _timed(state.timings, batch_size, seconds)
        learned["timings"] = timings
        constant = next((timing.step_seconds for timing in timings if timing.global_batch_size == first), None)
        if constant is not None:
            steps = max(measurement.optimizer_step - state.last_step, 0)
            saved = 0.0 if batch_size == first else steps * (batch_size / first * constant - seconds)
            learned["seconds_saved"] = (state.seconds_saved or 0.0) + saved
    return learned


def _timed(timings: tuple[StepTiming, ...], batch_size: int, seconds: float) -> tuple[StepTiming, ...]:
    for index, known in enumerate(timings):
        if known.global_batch_size == batch_size:
            count = known.num_reports + 1
            weight = max(1 / count, 1 - _TIMING_BETA)
            average = known.step_seconds + weight * (seconds - known.step_seconds)
            timing = StepTiming(global_batch_size=batch_size, step_seconds=average, num_reports=count)
            return (*timings[:index], timing, *timings[index + 1 :])
    timing = StepTiming(global_batch_size=batch_size, step_seconds=seconds, num_reports=1)
    return tuple(sorted([*timings, timing], key=lambda kept: kept.global_batch_size)[:_MAX_TIMINGS])


def _goes_on(config: PolicyConfig, state: PolicyState, followed: GroupReading) -> bool:
    """Whether the curve so far is of this quantity: "max" may follow another group than before."""
    return state.smoothed is not None and state.smoothed.continues_with(
        followed, corrected=config.correct_few_groups, growing=config.averaging == "growing"
    )


def _averaged(config: PolicyConfig, before: SmoothedNoiseScale | None, reading: GroupReading) -> SmoothedNoiseScale:
    growing = config.averaging == "growing"
    if before is None or not before.continues_with(reading, corrected=config.correct_few_groups, growing=growing):
        return SmoothedNoiseScale.started_by(reading, corrected=config.correct_few_groups, growing=growing)
    return before.updated(reading, noise_beta=config.noise_beta, signal_beta=config.signal_beta)


def _averaged_curve(
    config: PolicyConfig, before: tuple[ProgressAverage, ...], reading: GroupReading
) -> tuple[ProgressAverage, ...]:
    # One point for each size, whatever was sent.
    found = {point.samples: point.progress for point in reading.progress_curve if math.isfinite(point.samples)}
    if not found:
        return before
    points = [ProgressPoint(samples=samples, progress=found[samples]) for samples in sorted(found)]
    is_finite = all(abs(point.progress) < _LARGEST_AVERAGED for point in points)
    growing = config.averaging == "growing"
    same_kind = all((average.progress.last is not None) == growing for average in before)
    if not same_kind or [point.samples for point in points] != [average.samples for average in before]:
        return tuple(
            ProgressAverage(samples=point.samples, progress=SignedAverage.started_by(point.progress, growing=growing))
            for point in points
            if is_finite
        )
    if not is_finite:
        return before
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
