"""Measure the gradient noise scale of a torchrun job in its optimizer's norm, and follow the plan it leads to.

A training script imports everything it needs from here, and optimizers from `trainer_hooks.optim`. Also public, for
other uses: `trainer_hooks.kernels` (matrix functions) and `trainer_hooks.estimators` (the eager reference).
"""

from gns_controller.core.errors import MissingDependencyError

try:
    import torch as _torch  # noqa: F401
except ImportError:
    raise MissingDependencyError(
        "trainer_hooks needs PyTorch: pip install 'gns-controller[trainer]' (on CPU: pip install torch==2.13.0)."
    ) from None

from gns_controller.core.batch_arithmetic import BetaCoupling, LearningRateCoupling
from gns_controller.core.contract import BatchPlan, Decision, GroupReading, Span
from gns_controller.core.errors import (
    BatchShapeError,
    CouplingError,
    GeometryError,
    GnsError,
    InvalidInputError,
    PlanDivergedError,
    RunConflictError,
    SelfTestError,
    TooFewGroupsError,
)
from gns_controller.core.policies import (
    CriticalBatch,
    CriticalBatchTablePolicyConfig,
    DecayToRampPolicyConfig,
    GoodputPolicyConfig,
    GrowOncePolicyConfig,
    HoldPolicyConfig,
    InnerProductTestPolicyConfig,
    LinearRampPolicyConfig,
    NoiseScalePolicyConfig,
    NormTestPolicyConfig,
    ProgressPolicyConfig,
    Stage,
    StagesPolicyConfig,
)
from trainer_hooks.client.options import ConnectionOptions
from trainer_hooks.data import SampleStream, cut_micro_batches, warmup_cosine
from trainer_hooks.distributed.clipping import clip_grad_norm
from trainer_hooks.measurement.options import MeasurementOptions
from trainer_hooks.session.adaptive_batch import AdaptiveBatch
from trainer_hooks.session.branch import branch_state
from trainer_hooks.session.options import CouplingOptions
from trainer_hooks.session.step import Step

__all__ = [
    "AdaptiveBatch",
    "BatchPlan",
    "BatchShapeError",
    "BetaCoupling",
    "ConnectionOptions",
    "CouplingError",
    "CouplingOptions",
    "CriticalBatch",
    "CriticalBatchTablePolicyConfig",
    "DecayToRampPolicyConfig",
    "Decision",
    "GeometryError",
    "GnsError",
    "GoodputPolicyConfig",
    "GroupReading",
    "GrowOncePolicyConfig",
    "HoldPolicyConfig",
    "InnerProductTestPolicyConfig",
    "InvalidInputError",
    "LearningRateCoupling",
    "LinearRampPolicyConfig",
    "MeasurementOptions",
    "MissingDependencyError",
    "NoiseScalePolicyConfig",
    "NormTestPolicyConfig",
    "PlanDivergedError",
    "ProgressPolicyConfig",
    "RunConflictError",
    "SampleStream",
    "SelfTestError",
    "Span",
    "Stage",
    "StagesPolicyConfig",
    "Step",
    "TooFewGroupsError",
    "branch_state",
    "clip_grad_norm",
    "cut_micro_batches",
    "warmup_cosine",
]
