"""Policies: pure folds from measurements to decisions, one file each.

    decide(config, state, measurement, facts=...) -> (state, decision)

The service, the trainer and replay call this one function on the same ordered measurements, so they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, Any

from pydantic import Field

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import Decision, Geometry, NoiseScaleMeasurement, Override, Reason
from gns_controller.core.errors import CouplingError, InvalidInputError
from gns_controller.core.policies.base import PolicyConfig, PolicyState, Proposal, RunFacts, Situation
from gns_controller.core.policies.decision import conclude, initial_plan, plan_for
from gns_controller.core.policies.guards import guarded, reachable
from gns_controller.core.policies.rules import (
    critical_batch_table,
    decay_to_ramp,
    goodput,
    grow_once,
    hold,
    inner_product_test,
    linear_ramp,
    noise_scale,
    norm_test,
    progress,
    stages,
)
from gns_controller.core.policies.rules.critical_batch_table import CriticalBatch, CriticalBatchTablePolicyConfig
from gns_controller.core.policies.rules.decay_to_ramp import DecayToRampPolicyConfig
from gns_controller.core.policies.rules.goodput import GoodputPolicyConfig
from gns_controller.core.policies.rules.grow_once import GrowOncePolicyConfig
from gns_controller.core.policies.rules.hold import HoldPolicyConfig
from gns_controller.core.policies.rules.inner_product_test import InnerProductTestPolicyConfig
from gns_controller.core.policies.rules.linear_ramp import LinearRampPolicyConfig
from gns_controller.core.policies.rules.noise_scale import NoiseScalePolicyConfig
from gns_controller.core.policies.rules.norm_test import NormTestPolicyConfig
from gns_controller.core.policies.rules.progress import ProgressPolicyConfig
from gns_controller.core.policies.rules.stages import Stage, StagesPolicyConfig
from gns_controller.core.policies.state_update import adopt, observe, timed_on_these_ranks
from gns_controller.core.policies.units import counts_tokens
from gns_controller.core.statistics import NOTHING_SEEN, Judgement

__all__ = [
    "AnyPolicyConfig",
    "CriticalBatch",
    "CriticalBatchTablePolicyConfig",
    "DecayToRampPolicyConfig",
    "GoodputPolicyConfig",
    "GrowOncePolicyConfig",
    "HoldPolicyConfig",
    "InnerProductTestPolicyConfig",
    "LinearRampPolicyConfig",
    "NoiseScalePolicyConfig",
    "NormTestPolicyConfig",
    "PolicyState",
    "ProgressPolicyConfig",
    "RunFacts",
    "Stage",
    "StagesPolicyConfig",
    "check_gains",
    "check_policy",
    "decide",
    "initial_plan",
    "initial_state",
    "plan_for",
    "propose_and_conclude",
]

AnyPolicyConfig = Annotated[
    HoldPolicyConfig
    | StagesPolicyConfig
    | LinearRampPolicyConfig
    | GrowOncePolicyConfig
    | DecayToRampPolicyConfig
    | CriticalBatchTablePolicyConfig
    | NoiseScalePolicyConfig
    | ProgressPolicyConfig
    | NormTestPolicyConfig
    | InnerProductTestPolicyConfig
    | GoodputPolicyConfig,
    Field(discriminator="policy"),
]
"""Chosen by its `policy` field."""

_PROPOSE: dict[type[PolicyConfig], Callable[[Any, Situation], Proposal]] = {
    HoldPolicyConfig: hold.propose,
    StagesPolicyConfig: stages.propose,
    LinearRampPolicyConfig: linear_ramp.propose,
    GrowOncePolicyConfig: grow_once.propose,
    DecayToRampPolicyConfig: decay_to_ramp.propose,
    CriticalBatchTablePolicyConfig: critical_batch_table.propose,
    NoiseScalePolicyConfig: noise_scale.propose,
    ProgressPolicyConfig: progress.propose,
    NormTestPolicyConfig: norm_test.propose,
    InnerProductTestPolicyConfig: inner_product_test.propose,
    GoodputPolicyConfig: goodput.propose,
}

OPEN_LOOP = (
    HoldPolicyConfig,
    StagesPolicyConfig,
    LinearRampPolicyConfig,
    GrowOncePolicyConfig,
    DecayToRampPolicyConfig,
    CriticalBatchTablePolicyConfig,
)
"""Policies that go on where a measurement holds nothing to learn from."""


def initial_state(rules: BatchRules, *, data_parallel_size: int) -> PolicyState:
    """The state before the first measurement."""
    return PolicyState(plan=initial_plan(rules, data_parallel_size=data_parallel_size))


def check_policy(config: AnyPolicyConfig, facts: RunFacts) -> None:
    """Whether this policy can steer this run.

    Raises:
        InvalidInputError: it counts tokens and the run does not; or its coupling would be a second rule on one change.
    """
    if facts.tokens_per_sample is None and counts_tokens(config):
        raise InvalidInputError("the policy counts tokens: the run has to say its tokens_per_sample.")
    least, most = config.minimum_batch_size, config.maximum_batch_size
    if least is not None and most is not None and least > most:
        raise InvalidInputError("minimum_batch_size is above maximum_batch_size: no batch is left.")
    if isinstance(config, DecayToRampPolicyConfig) and config.decay != "follow":
        first = 1.0 if config.alpha is None else 1 / config.alpha
        if first < config.decay_below or config.decay_below == 1:
            raise InvalidInputError(
                f"decay_to_ramp grows from {first:.3g} of the peak rate down, and decay={config.decay!r} takes "
                f"growth back below {config.decay_below:g} of it: it would never ramp. Use decay='follow', with a "
                "maximum_batch_size, or a lower decay_below."
            )
    couplings = {"learning_rate_coupling": facts.rules.learning_rate_coupling}
    couplings |= {f"optimizer_couplings[{name!r}]": rule for name, rule in facts.rules.optimizer_couplings.items()}
    for where, coupling in couplings.items():
        if isinstance(config, DecayToRampPolicyConfig):
            if coupling not in ("sqrt", "seesaw"):
                raise InvalidInputError(
                    f"decay_to_ramp trades decay for batch along lr / sqrt(batch); {where}={coupling!r} "
                    "would be another trade. Use 'sqrt' or 'seesaw'."
                )
        elif coupling == "seesaw":
            raise InvalidInputError(f"{where}='seesaw' belongs to the policy decay_to_ramp; other ramps want 'sqrt'.")


def check_gains(config: AnyPolicyConfig, facts: RunFacts, geometries: Collection[Geometry]) -> None:
    """Whether the gain of a coupling is made for the noise scale that this policy follows.

    Args:
        config: that steers the run.
        facts: of the run.
        geometries: of its parameter groups, where they are known.

    Raises:
        CouplingError: adascale by a noise scale that is not the euclidean one.
    """
    used = {facts.rules.learning_rate_coupling, *facts.rules.optimizer_couplings.values()}
    followed = set(geometries) if config.geometry is None else {config.geometry}
    if "adascale" in used and followed != {"euclidean"}:
        raise CouplingError(
            "adascale is a gain in the euclidean norm, and the policy follows readings in the geometry "
            f"{' and '.join(sorted(followed)) or 'of any group'}. Use 'adamscale', or a policy with "
            "geometry='euclidean'."
        )


def decide(
    config: AnyPolicyConfig,
    state: PolicyState,
    measurement: NoiseScaleMeasurement,
    *,
    facts: RunFacts,
    policy_revision: int = 0,
    follow_trainer: bool = True,
    override: Override | None = None,
) -> tuple[PolicyState, Decision]:
    """One step of the fold.

    Args:
        config: which policy, and its settings.
        state: what the last step returned, or `initial_state`.
        measurement: the next one in order; readings that are missing or not finite leave the averages alone.
        facts: which batches exist, the budget, tokens per sample.
        policy_revision: recorded in the decision.
        follow_trainer: take the batch in force from the measurement (service, trainer). False asks what this policy
            would have done on a recording made under another one (replay).
        override: an operator's word, above the policy and its guards.
    """
    state = timed_on_these_ranks(state, measurement)
    if follow_trainer:
        state = adopt(state, measurement, facts=facts)
    state, learned = observe(config, state, measurement, facts=facts)
    judged = state.smoothed.judged() if state.smoothed else NOTHING_SEEN
    return propose_and_conclude(
        config,
        state,
        measurement,
        judged,
        facts=facts,
        policy_revision=policy_revision,
        override=override,
        learned=learned,
    )


def propose_and_conclude(
    config: AnyPolicyConfig,
    state: PolicyState,
    measurement: NoiseScaleMeasurement,
    judged: Judgement,
    *,
    facts: RunFacts,
    policy_revision: int = 0,
    override: Override | None = None,
    learned: Reason = "hold",
) -> tuple[PolicyState, Decision]:
    """The second half of the fold: nothing is learned any more. `learned` says why not, where nothing was."""
    situation = Situation(state, measurement, judged, facts)
    if override is not None:
        proposal = _overridden(override, situation)
    elif learned != "hold" and not isinstance(config, OPEN_LOOP):
        proposal = guarded(config, situation, Proposal(None, learned, _nothing_learned(config, measurement, learned)))
    else:
        proposal = guarded(config, situation, _PROPOSE[type(config)](config, situation))
    return conclude(situation, proposal, policy=config.policy, policy_revision=policy_revision)


def _nothing_learned(config: AnyPolicyConfig, measurement: NoiseScaleMeasurement, reason: Reason) -> str:
    if reason == "hold_not_finite":
        return "this reading is not finite and is left out"
    if not measurement.readings:
        return "a progress report, nothing was measured at this step"
    return f"this report holds no {config.estimator} reading that this policy follows"


def _overridden(override: Override, situation: Situation) -> Proposal:
    if override.kind == "hold" or override.global_batch_size is None:
        return Proposal(None, "override", "an operator holds this batch")
    pinned = override.global_batch_size
    batch_size = reachable(pinned, situation.facts.rules, situation.measurement.data_parallel_size, up=False)
    because = f"an operator pins {pinned} samples"
    return Proposal(None if batch_size == situation.batch_size else batch_size, "override", because, pinned)
