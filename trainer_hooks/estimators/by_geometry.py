"""The sums of one tensor (or of a batch of equal matrices), by geometry; see trainer_hooks.estimators.sums."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gns_controller.core.contract import Geometry
from trainer_hooks.estimators import euclidean, sign, spectral


class SplitSums(Protocol):
    """Five sums over two halves; the targets default to the halves themselves."""

    def __call__(  # noqa: D102
        self,
        half_a: Tensor,
        half_b: Tensor,
        difference: Tensor,
        *,
        target_a: Tensor | None = None,
        target_b: Tensor | None = None,
    ) -> Tensor: ...


class ProgressSums(Protocol):
    """Two sums over a direction and an independent gradient."""

    def __call__(self, direction: Tensor, target: Tensor) -> Tensor: ...  # noqa: D102


SPLIT_SUMS: dict[Geometry, SplitSums] = {
    "euclidean": euclidean.split_sums,
    "sign": sign.split_sums,
    "spectral": spectral.split_sums,
}
"""(half_a, half_b, half_a - half_b) -> (5,) float64."""

PROGRESS_SUMS: dict[Geometry, ProgressSums] = {
    "euclidean": euclidean.progress_sums,
    "sign": sign.progress_sums,
    "spectral": spectral.progress_sums,
}
"""(direction, target) -> (2,) float64."""
