"""Matrix functions for spectral optimizers."""

from trainer_hooks.kernels.orthogonalize import NEWTON_SCHULZ_5, OrthogonalizationSchedule, orthogonalize

__all__ = ["NEWTON_SCHULZ_5", "OrthogonalizationSchedule", "orthogonalize"]
