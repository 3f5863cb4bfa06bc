"""The built-in policies, one file each. Everything else about them follows from the tuple below."""

from gns_controller.core.policies.base import PolicyConfig
from gns_controller.core.policies.rules.critical_batch_table import CriticalBatchTablePolicyConfig
from gns_controller.core.policies.rules.decay_to_ramp import DecayToRampPolicyConfig
from gns_controller.core.policies.rules.goodput import GoodputPolicyConfig
from gns_controller.core.policies.rules.grow_once import GrowOncePolicyConfig
from gns_controller.core.policies.rules.hold import HoldPolicyConfig
from gns_controller.core.policies.rules.inner_product_test import InnerProductTestPolicyConfig
from gns_controller.core.policies.rules.linear_ramp import LinearRampPolicyConfig
from gns_controller.core.policies.rules.noise_scale import NoiseScalePolicyConfig
from gns_controller.core.policies.rules.norm_test import NormTestPolicyConfig
from gns_controller.core.policies.rules.progress import ProgressPolicyConfig
from gns_controller.core.policies.rules.stages import StagesPolicyConfig

POLICIES: tuple[type[PolicyConfig], ...] = (
    HoldPolicyConfig,
    StagesPolicyConfig,
    LinearRampPolicyConfig,
    GrowOncePolicyConfig,
    DecayToRampPolicyConfig,
    CriticalBatchTablePolicyConfig,
    NoiseScalePolicyConfig,
    ProgressPolicyConfig,
    NormTestPolicyConfig,
    InnerProductTestPolicyConfig,
    GoodputPolicyConfig,
)
"""The built-in policies, in the order of the documents."""

BUILT_IN_NAMES = tuple(str(policy.model_fields["policy"].default) for policy in POLICIES)
