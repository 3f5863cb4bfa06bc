"""The ramp ahead, and what the ramp so far was worth.

A projection folds the policy over measurements that have not been made: everything measured stays as it is now, the
schedule goes on as registered. The interval repeats that with both ends of the noise scale's interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from gns_controller.core.contract import Count, FiniteFloat, FrozenModel, NoiseScaleMeasurement, Override, PositiveCount
from gns_controller.core.policies import AnyPolicyConfig, PolicyState, RunFacts, propose_and_conclude
from gns_controller.core.statistics import NOTHING_SEEN, Judgement

NUM_POINTS = 128
"""Most measurements imagined ahead; never more than there are steps left at the present batch."""


class ProjectedStage(FrozenModel):
    """A batch that is expected from here on."""

    samples_seen: Count
    global_batch_size: PositiveCount
    low: PositiveCount
    """With the noise scale at the lower end of its interval; the same for policies that measure nothing."""
    high: PositiveCount
    """At the upper end, or at what can be resolved where there is no upper end."""
    learning_rate_factor: FiniteFloat


class StepsLeft(FrozenModel):
    """Optimizer steps to the end of the budget."""

    expected: Count
    least: Count
    most: Count


class Projection(FrozenModel):
    """What is expected to come if everything measured stays as it is."""

    stages: tuple[ProjectedStage, ...]
    """From the present batch on; one more at each change of any of the three paths."""
    steps_left: StepsLeft


class Savings(FrozenModel):
    """The run so far beside a run that kept the batch of the start, at the same samples."""

    constant_batch_size: PositiveCount
    constant_steps: Count
    """Optimizer steps that the constant batch would have taken by now."""
    steps_saved: int
    """Negative for a batch that shrank."""
    steps_saved_share: FiniteFloat
    seconds_saved: FiniteFloat | None
    """None until a step of the constant batch was timed. Measuring is not counted, nor are steps of which the time is
    not known, or not that of the constant batch on the same ranks."""


class _Path(NamedTuple):
    points: list[tuple[int, int, float]]
    """(samples seen, batch, learning-rate factor) at every imagined measurement."""
    steps: float


def project(
    config: AnyPolicyConfig,
    state: PolicyState,
    last: NoiseScaleMeasurement,
    *,
    facts: RunFacts,
    schedule: Sequence[float] = (),
    override: Override | None = None,
    shadow: bool = False,
) -> Projection:
    """Fold the policy over what has not happened yet.

    Args:
        config: the policy.
        state: after `last`.
        last: the newest measurement; those ahead repeat its readings.
        facts: with the budget, samples.
        schedule: learning-rate factors at evenly spaced points from the first to the last sample of the budget; without
            them the present one stays.
        override: an operator's word is expected to stay.
        shadow: nobody follows the policy: the stages are what it would do, the steps left those at the batch of `last`.
    """
    judged = state.smoothed.judged() if state.smoothed else NOTHING_SEEN
    expected = _walk(config, state, last, judged, facts=facts, schedule=schedule, override=override)
    low, high = expected, expected
    if judged.low is not None and not judged.unresolved:
        at_low = judged._replace(noise_scale=judged.low)
        low = _walk(config, state, last, at_low, facts=facts, schedule=schedule, override=override)
    above = judged.high if judged.high is not None else judged.ceiling_samples
    if above is not None and above > (judged.noise_scale or 0.0):
        at_high = judged._replace(noise_scale=above, low=above, unresolved=False)
        high = _walk(config, state, last, at_high, facts=facts, schedule=schedule, override=override)
    stages: list[ProjectedStage] = []
    for (samples, batch, factor), (_, low_batch, _), (_, high_batch, _) in zip(
        expected.points, low.points, high.points, strict=True
    ):
        stage = ProjectedStage(
            samples_seen=samples,
            global_batch_size=batch,
            low=min(batch, low_batch, high_batch),
            high=max(batch, low_batch, high_batch),
            learning_rate_factor=factor,
        )
        before = stages[-1] if stages else None
        if before is None or (before.global_batch_size, before.low, before.high) != (
            stage.global_batch_size,
            stage.low,
            stage.high,
        ):
            stages.append(stage)
    if shadow:
        left = max((facts.budget_samples or last.samples_seen) - last.samples_seen, 0)
        counts = [-(-left // last.global_batch_size)]
    else:
        counts = [whole_steps(path.steps) for path in (expected, low, high)]
    steps_left = StepsLeft(expected=counts[0], least=min(counts), most=max(counts))
    return Projection(stages=tuple(stages), steps_left=steps_left)


def whole_steps(steps: float) -> int:
    """A sum of shares of steps as a count: a last step of a few samples is a step, rounding in the sum is not."""
    return math.ceil(steps * (1 - 1e-9))


def _walk(
    config: AnyPolicyConfig,
    state: PolicyState,
    last: NoiseScaleMeasurement,
    judged: Judgement,
    *,
    facts: RunFacts,
    schedule: Sequence[float],
    override: Override | None,
) -> _Path:
    budget = facts.budget_samples or last.samples_seen
    left = max(budget - last.samples_seen, 0)
    points = [(last.samples_seen, state.plan.global_batch_size, state.plan.learning_rate_factor)]
    steps = 0.0
    num_points = min(NUM_POINTS, -(-left // state.plan.global_batch_size))
    for point in range(1, num_points + 1):
        samples = last.samples_seen + left * point // num_points
        steps += (samples - points[-1][0]) / points[-1][1]
        plan = state.plan
        imagined = last.model_copy(
            update={
                "samples_seen": samples,
                "optimizer_step": last.optimizer_step + int(steps),
                "plan_version": plan.version,
                "global_batch_size": plan.global_batch_size,
                "micro_batch_size": plan.micro_batch_size,
                "gradient_accumulation_steps": plan.gradient_accumulation_steps,
                "schedule_factor": schedule_at(schedule, samples / budget if budget else 1.0, last.schedule_factor),
            }
        )
        peak = max(state.peak_schedule_factor, imagined.schedule_factor)
        state = state.model_copy(update={"peak_schedule_factor": peak})
        state, _ = propose_and_conclude(config, state, imagined, judged, facts=facts, override=override)
        points.append((samples, state.plan.global_batch_size, state.plan.learning_rate_factor))
    return _Path(points, steps)


def schedule_at(schedule: Sequence[float], share: float, otherwise: float) -> float:
    """The schedule between its evenly spaced points, linearly; `otherwise` without points."""
    if not schedule:
        return otherwise
    if len(schedule) == 1:
        return schedule[0]
    position = min(max(share, 0.0), 1.0) * (len(schedule) - 1)
    index = min(int(position), len(schedule) - 2)
    return schedule[index] + (schedule[index + 1] - schedule[index]) * (position - index)


def savings(state: PolicyState, last: NoiseScaleMeasurement, *, facts: RunFacts) -> Savings:
    """Steps and seconds saved so far."""
    first = facts.rules.global_batch_size
    constant_steps = -(-last.samples_seen // first)
    saved = constant_steps - last.optimizer_step
    return Savings(
        constant_batch_size=first,
        constant_steps=constant_steps,
        steps_saved=saved,
        steps_saved_share=saved / constant_steps if constant_steps else 0.0,
        seconds_saved=state.seconds_saved,
    )


def advised_data_parallel_size(
    state: PolicyState, last: NoiseScaleMeasurement | None, *, facts: RunFacts, shadow: bool = False
) -> int:
    """The most ranks that the present batch keeps busy with whole micro-batches: B / micro_batch_size.

    Beyond it ranks would get smaller micro-batches than the hardware was chosen for; below it batches are accumulated.
    The present ranks, where B is no whole number of micro-batches. Advice for autoscalers: nothing here applies it.

    Args:
        state: after `last`.
        last: the newest measurement, if there is one.
        facts: of the run.
        shadow: nobody follows the policy: B is the batch of `last`, not that of the plan.
    """
    plan, micro_batch_size = state.plan, facts.rules.micro_batch_size
    batch_size = last.global_batch_size if shadow and last else plan.global_batch_size
    if batch_size % micro_batch_size == 0:
        return batch_size // micro_batch_size
    if last is not None:
        return last.data_parallel_size
    return plan.global_batch_size // (plan.micro_batch_size * plan.gradient_accumulation_steps)
