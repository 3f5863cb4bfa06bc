"""Noise and signal for spectral optimizers (Muon, Shampoo), in the nuclear norm, the dual of Schatten-infinity.

M = rows, N = columns, S = min(M, N) the shorter side, L = the longer one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gns_controller.core.errors import GeometryError


def wide(matrix: Tensor) -> Tensor:
    """(M, N) -> (S, L): transposed where that puts the shorter side first.

    Raises:
        GeometryError: not a matrix.
    """
    if matrix.ndim != 2:
        raise GeometryError(f"the spectral geometry takes 2-D tensors, got shape {tuple(matrix.shape)}.")
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def split_sums(half_a: Tensor, half_b: Tensor, difference: Tensor) -> Tensor:
    """(5,) float64: nuclear norms and matsign inner products of two half gradients, (M, N) float32 or float64.

    p(G) = U V^T over the singular values that are not rounding (above eps * L * the largest). `difference` is
    half_a - half_b. Exact: one thin SVD per half, singular values only for the difference.
    """
    norm_a, inner_ab = _norm_and_inner(half_a, half_b)
    norm_b, inner_ba = _norm_and_inner(half_b, half_a)
    return torch.stack([nuclear_norm(difference), norm_a, norm_b, inner_ab, inner_ba])


def spread_sums(mean_grad: Tensor, covariance: Tensor) -> Tensor:
    """(2,) float64: tr C^(1/2) and ||Gbar||_S1.

    Args:
        mean_grad: (M, N) float32 or float64.
        covariance: (S, S) float64, the per-sample covariance of the shorter side.

    Bias: tr C^(1/2) needs about as many sample groups as the noise has directions: 0.24..0.57 of the truth with 8.
        It depends on the side; the shorter one is the convention.
    """
    eigenvalues = torch.linalg.eigvalsh(covariance.double())
    return torch.stack([eigenvalues.clamp_min(0).sqrt().sum(), nuclear_norm(mean_grad)])


def nuclear_norm(matrix: Tensor) -> Tensor:
    """() float64: the sum of singular values."""
    values: Tensor = torch.linalg.svdvals(wide(matrix))
    return values.sum(dtype=torch.float64)


def _norm_and_inner(matrix: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    left_SS, values_S, right_SL = torch.linalg.svd(wide(matrix), full_matrices=False)
    tolerance = torch.finfo(values_S.dtype).eps * right_SL.shape[1] * values_S[:1]
    kept_S = (values_S > tolerance).to(values_S.dtype)
    matsign_SL = (left_SS * kept_S) @ right_SL
    return values_S.sum(dtype=torch.float64), (matsign_SL * wide(other)).sum(dtype=torch.float64)
