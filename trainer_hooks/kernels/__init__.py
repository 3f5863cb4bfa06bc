"""Matrix functions for spectral optimizers and for norms."""

from trainer_hooks.kernels.eigenbasis import RefreshedBasis, eigenbasis, needs_refresh, refreshed_basis
from trainer_hooks.kernels.inverse_roots import InverseRootMethod, inverse_root
from trainer_hooks.kernels.orthogonalize import Evaluation, orthogonalize
from trainer_hooks.kernels.schedules import (
    DEEPSEEK_10,
    EXACT,
    NEWTON_SCHULZ_5,
    POLAR_EXPRESS_4,
    POLAR_EXPRESS_5,
    POLAR_EXPRESS_7,
    POLAR_EXPRESS_8,
    OrthogonalizationSchedule,
)

__all__ = [
    "DEEPSEEK_10",
    "EXACT",
    "NEWTON_SCHULZ_5",
    "POLAR_EXPRESS_4",
    "POLAR_EXPRESS_5",
    "POLAR_EXPRESS_7",
    "POLAR_EXPRESS_8",
    "Evaluation",
    "InverseRootMethod",
    "OrthogonalizationSchedule",
    "RefreshedBasis",
    "eigenbasis",
    "inverse_root",
    "needs_refresh",
    "orthogonalize",
    "refreshed_basis",
]
