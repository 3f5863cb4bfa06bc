"""Matrix functions for spectral optimizers and for norms."""

from trainer_hooks.kernels.orthogonalize import (
    NEWTON_SCHULZ_5,
    POLAR_EXPRESS_7,
    OrthogonalizationSchedule,
    orthogonalize,
)

__all__ = ["NEWTON_SCHULZ_5", "POLAR_EXPRESS_7", "OrthogonalizationSchedule", "orthogonalize"]
