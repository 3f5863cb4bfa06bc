"""The fold of a policy over measurements.

    decide(config, state, measurement, facts=...) -> (state, decision)

The service, the trainer and replay call this one function on the same ordered measurements, so they agree. No policy is
named here: each proposes, checks and declares in its own class.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import get_args

from gns_controller.core.batch_arithmetic import BatchRules
from gns_controller.core.contract import Decision, Geometry, NoiseScaleMeasurement, Override, Reason
from gns_controller.core.errors import CouplingError, InvalidInputError, PolicyPlugInError
from gns_controller.core.policies.any_policy import UnavailablePolicyConfig
from gns_controller.core.policies.base import PolicyConfig, PolicyState, Proposal, RunFacts, Situation
from gns_controller.core.policies.decision import conclude, initial_plan
from gns_controller.core.policies.guards import guarded, reachable
from gns_controller.core.policies.plug_ins import plug_in_named
from gns_controller.core.policies.rules import POLICIES
from gns_controller.core.policies.state_update import adopt, observe, timed_on_these_ranks
from gns_controller.core.policies.units import counts_tokens
from gns_controller.core.statistics import NOTHING_SEEN, Judgement

logger = logging.getLogger(__name__)

_BUILT_IN = frozenset(POLICIES)
_REASONS = frozenset(get_args(Reason))


def initial_state(rules: BatchRules, *, data_parallel_size: int) -> PolicyState:
    """Return the state before the first measurement."""
    return PolicyState(plan=initial_plan(rules, data_parallel_size=data_parallel_size))


def check_policy(config: PolicyConfig, facts: RunFacts) -> None:
    """Check that this policy can steer this run.

    Raises:
        InvalidInputError: it counts tokens and the run does not, its bounds leave no batch, or it refuses the run.
    """
    if isinstance(config, UnavailablePolicyConfig):
        return  # accepted where its package was installed
    if facts.tokens_per_sample is None and counts_tokens(config):
        raise InvalidInputError("the policy counts tokens: the run has to say its tokens_per_sample.")
    least, most = config.minimum_batch_size, config.maximum_batch_size
    if least is not None and most is not None and least > most:
        raise InvalidInputError("minimum_batch_size is above maximum_batch_size: no batch is left.")
    try:
        config.check(facts)
    except InvalidInputError:
        raise
    except Exception as error:
        if type(config) in _BUILT_IN:
            raise
        logger.warning("policy plug-in failed: policy=%s", config.policy, exc_info=error)
        raise InvalidInputError(f"{_called(config)} failed where it checks a run: {type(error).__name__}.") from error


def check_gains(config: PolicyConfig, facts: RunFacts, geometries: Collection[Geometry]) -> None:
    """Check that the gain of a coupling is made for the noise scale that this policy follows.

    Args:
        config: the policy.
        facts: of the run.
        geometries: of its parameter groups, where they are known.

    Raises:
        CouplingError: adascale by a noise scale that is not the euclidean one.
    """
    if isinstance(config, UnavailablePolicyConfig):
        return
    used = {facts.rules.learning_rate_coupling, *facts.rules.optimizer_couplings.values()}
    followed = set(geometries) if config.geometry is None else {config.geometry}
    if "adascale" in used and followed != {"euclidean"}:
        raise CouplingError(
            "adascale is a gain in the euclidean norm, and the policy follows readings in the geometry "
            f"{' and '.join(sorted(followed)) or 'of any group'}. Use 'adamscale', or a policy with "
            "geometry='euclidean'."
        )


def decide(
    config: PolicyConfig,
    state: PolicyState,
    measurement: NoiseScaleMeasurement,
    *,
    facts: RunFacts,
    policy_revision: int = 0,
    follow_trainer: bool = True,
    override: Override | None = None,
) -> tuple[PolicyState, Decision]:
    """Take one step of the fold.

    Args:
        config: which policy, and its settings.
        state: what the last step returned, or `initial_state`.
        measurement: the next one in order; readings that are missing or not finite leave the averages alone.
        facts: which batches exist, the budget, tokens per sample.
        policy_revision: recorded in the decision.
        follow_trainer: take the batch in force from the measurement (service, trainer). False asks what this policy
            would have done on a recording made under another one (replay).
        override: put by an operator above the policy and its guards.

    Raises:
        PolicyPlugInError: the policy is of another package and cannot be run here, or failed.
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
    config: PolicyConfig,
    state: PolicyState,
    measurement: NoiseScaleMeasurement,
    judged: Judgement,
    *,
    facts: RunFacts,
    policy_revision: int = 0,
    override: Override | None = None,
    learned: Reason = "hold",
) -> tuple[PolicyState, Decision]:
    """Take the second half of a step, which learns nothing more: propose, guard, conclude.

    Args:
        config: as for `decide`, like the arguments without an entry here.
        state: with this measurement in its averages.
        measurement: the newest.
        judged: what the averages say.
        facts: of the run.
        policy_revision: recorded in the decision.
        override: put by an operator above the policy.
        learned: "hold" where the measurement had a reading to learn from, else the reason why it had none.
    """
    if isinstance(config, UnavailablePolicyConfig):
        raise PolicyPlugInError(config.reason)
    situation = Situation(state, measurement, judged, facts)
    if override is not None:
        proposal = _overridden(override, situation)
    elif learned != "hold" and not config.open_loop:
        proposal = guarded(config, situation, Proposal(None, learned, _nothing_learned(config, measurement, learned)))
    else:
        proposal = guarded(config, situation, _proposed(config, situation))
    return conclude(situation, proposal, policy=config.policy, policy_revision=policy_revision)


def _proposed(config: PolicyConfig, situation: Situation) -> Proposal:
    """Return the policy's proposal; whatever goes wrong in a plug-in is an error that names it."""
    if type(config) in _BUILT_IN:
        return config.propose(situation)
    try:
        proposal = config.propose(situation)
    except Exception as error:
        raise PolicyPlugInError(f"{_called(config)} failed where it proposes a batch.", cause=error) from error
    if not isinstance(proposal, Proposal) or proposal.reason not in _REASONS:
        raise PolicyPlugInError(
            f"{_called(config)} did not return a Proposal whose reason is one of {', '.join(sorted(_REASONS))}."
        )
    return proposal


def _called(config: PolicyConfig) -> str:
    plug_in = plug_in_named(config.policy)
    return f"the policy {config.policy!r}" + ("" if plug_in is None else f" of {plug_in.distribution}")


def _nothing_learned(config: PolicyConfig, measurement: NoiseScaleMeasurement, reason: Reason) -> str:
    if reason == "hold_not_finite":
        return "this reading is not finite and is left out"
    if not measurement.readings:
        return "a progress report, nothing was measured at this step"
    return f"this report holds no {config.estimator} reading that this policy follows"


def _overridden(override: Override, situation: Situation) -> Proposal:
    if override.kind == "hold" or override.global_batch_size is None:
        return Proposal(None, "override", "an operator holds this batch")
    pinned = override.global_batch_size
    batch_size = reachable(pinned, situation.grid, up=False)
    because = f"an operator pins {pinned} samples"
    return Proposal(None if batch_size == situation.batch_size else batch_size, "override", because, pinned)
