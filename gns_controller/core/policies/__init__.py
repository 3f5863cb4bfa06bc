"""Policies: pure folds from measurements to decisions, one file each in `rules`, and those that other packages add.

The names below are what the service, the trainer and policies of other packages use.
"""

from gns_controller.core.policies.any_policy import KEEP_UNKNOWN, AnyPolicyConfig, UnavailablePolicyConfig
from gns_controller.core.policies.base import (
    IntervalUse,
    PolicyConfig,
    PolicyNeeds,
    PolicyState,
    Proposal,
    RunFacts,
    Situation,
    hold,
)
from gns_controller.core.policies.decision import initial_plan, plan_for
from gns_controller.core.policies.fold import check_gains, check_policy, decide, initial_state, propose_and_conclude
from gns_controller.core.policies.plug_ins import ENTRY_POINT_GROUP, PlugIn, plug_ins
from gns_controller.core.policies.rules import POLICIES
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

__all__ = [
    "ENTRY_POINT_GROUP",
    "KEEP_UNKNOWN",
    "POLICIES",
    "AnyPolicyConfig",
    "CriticalBatch",
    "CriticalBatchTablePolicyConfig",
    "DecayToRampPolicyConfig",
    "GoodputPolicyConfig",
    "GrowOncePolicyConfig",
    "HoldPolicyConfig",
    "InnerProductTestPolicyConfig",
    "IntervalUse",
    "LinearRampPolicyConfig",
    "NoiseScalePolicyConfig",
    "NormTestPolicyConfig",
    "PlugIn",
    "PolicyConfig",
    "PolicyNeeds",
    "PolicyState",
    "ProgressPolicyConfig",
    "Proposal",
    "RunFacts",
    "Situation",
    "Stage",
    "StagesPolicyConfig",
    "UnavailablePolicyConfig",
    "check_gains",
    "check_policy",
    "decide",
    "hold",
    "initial_plan",
    "initial_state",
    "plan_for",
    "plug_ins",
    "propose_and_conclude",
]
