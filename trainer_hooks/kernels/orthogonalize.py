"""Approximate U V^T of a matrix by matrix products alone.

S = the shorter side, L = the longer one, B = matrices in a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OrthogonalizationSchedule(NamedTuple):
    """Odd quintic polynomials X <- a X + (b A + c A^2) X, A = X X^T, applied one after another."""

    coefficients: tuple[tuple[float, float, float], ...]
    source: str


NEWTON_SCHULZ_5 = OrthogonalizationSchedule(
    coefficients=((3.4445, -4.7750, 2.0315),) * 5,
    source="Jordan et al. 2024, Muon: slope at zero maximal, so singular values land in about [0.7, 1.2], not at 1",
)


def orthogonalize(matrix: Tensor, *, schedule: OrthogonalizationSchedule = NEWTON_SCHULZ_5) -> Tensor:
    """Move every singular value of a matrix towards 1 and keep its singular vectors.

    Args:
        matrix: (M, N) or (B, M, N), float32 or float64; bfloat16 is iterated as it is.
        schedule: which polynomials. Their contract is that of the source: approximate, not converged.

    Returns:
        Same shape and dtype. A zero matrix stays zero. The scale of the input does not matter between 1e-30 and 1e30.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    X_BSL = matrix.mT if tall else matrix
    largest = X_BSL.abs().amax(dim=(-2, -1), keepdim=True)
    X_BSL = X_BSL / torch.where(largest > 0, largest, 1)
    frobenius = torch.linalg.matrix_norm(X_BSL, keepdim=True)
    X_BSL = X_BSL / torch.where(frobenius > 0, frobenius, 1)
    for a, b, c in schedule.coefficients:
        A_BSS = X_BSL @ X_BSL.mT
        X_BSL = a * X_BSL + (b * A_BSS + c * (A_BSS @ A_BSS)) @ X_BSL
    return X_BSL.mT if tall else X_BSL
