"""The split sums of one tensor, by geometry."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gns_controller.core.contract import Geometry
from trainer_hooks.estimators import euclidean, sign, spectral

SPLIT_SUMS: dict[Geometry, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "euclidean": euclidean.split_sums,
    "sign": sign.split_sums,
    "spectral": spectral.split_sums,
}
"""(half_a, half_b, half_a - half_b) -> (5,) float64; see trainer_hooks.estimators.sums."""
