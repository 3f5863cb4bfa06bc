"""Policies: pure folds from measurements to decisions, one file each.

    decide(config, state, measurement, rules=...) -> (state, decision)

The service, the trainer and replay call this one function on the same ordered measurements, so they agree.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import Decision, NoiseScaleMeasurement
from gns_controller.core.policies import hold, noise_scale, stages
from gns_controller.core.policies.fold import PolicyState, Proposal, adopt, conclude, initial_plan, observe, plan_for
from gns_controller.core.policies.hold import HoldPolicyConfig
from gns_controller.core.policies.noise_scale import NoiseScalePolicyConfig
from gns_controller.core.policies.stages import Stage, StagesPolicyConfig
from gns_controller.core.smoothing import NOTHING_SEEN, Judgement

__all__ = [
    "AnyPolicyConfig",
    "HoldPolicyConfig",
    "NoiseScalePolicyConfig",
    "PolicyState",
    "Stage",
    "StagesPolicyConfig",
    "decide",
    "initial_plan",
    "initial_state",
    "plan_for",
]

AnyPolicyConfig = Annotated[
    HoldPolicyConfig | StagesPolicyConfig | NoiseScalePolicyConfig, Field(discriminator="policy")
]
"""Chosen by its `policy` field."""


def initial_state(rules: BatchRules, *, data_parallel_size: int) -> PolicyState:
    """The state before the first measurement."""
    return PolicyState(plan=initial_plan(rules, data_parallel_size=data_parallel_size))


def decide(
    config: AnyPolicyConfig,
    state: PolicyState,
    measurement: NoiseScaleMeasurement,
    *,
    rules: BatchRules,
    policy_revision: int = 0,
    follow_trainer: bool = True,
) -> tuple[PolicyState, Decision]:
    """One step of the fold.

    Args:
        config: which policy, and its settings.
        state: what the last step returned, or `initial_state`.
        measurement: the next one in order; readings that are missing or not finite leave the averages alone.
        rules: which batches exist.
        policy_revision: recorded in the decision.
        follow_trainer: take the batch in force from the measurement (service, trainer). False asks what this policy
            would have done on a recording made under another one (replay).
    """
    if follow_trainer:
        state = adopt(state, measurement, rules=rules)
    state, learned = observe(config, state, measurement)
    judged = state.smoothed.judged() if state.smoothed else NOTHING_SEEN
    proposal = _propose(config, state, measurement, judged)
    if learned != "hold" and isinstance(config, NoiseScalePolicyConfig):
        because = {
            "hold_not_finite": "this reading is not finite and is left out.",
            "hold_no_reading": f"this report holds no {config.estimator} reading that this policy follows.",
        }[learned]
        proposal = Proposal(None, learned, because)
    return conclude(
        state, measurement, proposal, judged, rules=rules, policy=config.policy, policy_revision=policy_revision
    )


def _propose(
    config: AnyPolicyConfig,
    state: PolicyState,
    measurement: NoiseScaleMeasurement,
    judged: Judgement,
) -> Proposal:
    match config:
        case HoldPolicyConfig():
            return hold.propose(config, state, measurement)
        case StagesPolicyConfig():
            return stages.propose(config, state, measurement)
        case NoiseScalePolicyConfig():
            return noise_scale.propose(config, state, measurement, judged)
