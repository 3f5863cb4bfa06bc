"""Fold a policy over recorded measurements: what it did, or what another one would have done."""

from __future__ import annotations

from collections.abc import Iterable

from gns_controller.core.contract import Decision, NoiseScaleMeasurement
from gns_controller.core.policies import decide, initial_state
from gns_controller.core.runs import RunSpecification


def replay(
    config: RunSpecification, measurements: Iterable[NoiseScaleMeasurement], *, follow_trainer: bool = False
) -> list[Decision]:
    """The decisions of `config.policy` on these measurements, in order, from the start of the run.

    Pure and deterministic: the same input gives the same decisions bit for bit, and replay of a prefix is a prefix
    of the replay.

    Args:
        config: the run's specification, with the policy to ask;
            `config.model_copy(update={"policy": ...})` asks another.
        measurements: of one attempt, in order of optimizer_step.
        follow_trainer: True takes the batch in force from each measurement, as the service does: exact for a run
            whose batch somebody else changed. False lets the policy's own earlier decisions stand: what it would have
            done.
    """
    decisions = []
    state = None
    for measurement in measurements:
        if state is None:
            state = initial_state(config.batch, data_parallel_size=measurement.data_parallel_size)
        state, decision = decide(config.policy, state, measurement, rules=config.batch, follow_trainer=follow_trainer)
        decisions.append(decision)
    return decisions
