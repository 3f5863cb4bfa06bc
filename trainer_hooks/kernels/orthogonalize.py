"""Approximate U V^T of a matrix by matrix products alone.

S = the shorter side, L = the longer one, B = matrices in a batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

_SMALLEST_SIDE_ALONE = 256
"""On a CPU, products from this size on fill all cores one matrix at a time, faster than torch.bmm over the batch does:
x1.3 at three 768 x 768 on two cores. Below, the batch is twice as fast."""


class OrthogonalizationSchedule(NamedTuple):
    """Odd quintic polynomials X <- a X + (b A + c A^2) X, A = X X^T, applied one after another to X = G / f."""

    coefficients: tuple[tuple[float, float, float], ...]
    """(a, b, c) of each step."""
    source: str
    """Where they were published, and what they promise."""
    normalization: Literal["frobenius", "gram"] = "frobenius"
    """f = norm_margin * ||G||_F, or norm_margin * ||G G^T||_F^(1/2), the Schatten-4 norm, which is closer to the
    largest singular value."""
    norm_margin: float = 1.0
    """Part of the same fit as the coefficients, as is the normalization: never change one alone."""


NEWTON_SCHULZ_5 = OrthogonalizationSchedule(
    coefficients=((3.4445, -4.7750, 2.0315),) * 5,
    source="Jordan et al. 2024, Muon: slope at zero maximal, so singular values land in about [0.7, 1.2], not at 1",
)

POLAR_EXPRESS_7 = OrthogonalizationSchedule(
    coefficients=(
        (8.237334, -23.157829, 16.680627),
        (4.081925, -2.892924, 0.525306),
        (3.922399, -2.853827, 0.531994),
        (3.277661, -2.409529, 0.484654),
        (2.271060, -1.613822, 0.397845),
        (1.871895, -1.229972, 0.358444),
        (1.875001, -1.25, 0.374999),
    ),
    source="method of arXiv:2505.16932; minimax for s/f in [1e-3, 1], where |p(s/f) - 1| <= 4e-7; "
    "below, s (1 - p(s/f)) is in [0, 8e-5 f]",
    normalization="gram",
    norm_margin=1.01,
)


def orthogonalize(
    matrix: Tensor, *, schedule: OrthogonalizationSchedule = NEWTON_SCHULZ_5, dtype: torch.dtype | None = None
) -> Tensor:
    """Move every singular value of a matrix towards 1 and keep its singular vectors.

        G = U diag(s) V^T   ->   U diag(p(s/f)) V^T

    Nothing is copied to the host. A NaN stays in its own matrix of the batch.

    Args:
        matrix: (M, N) or (B, M, N), wide or tall, float32 or float64; bfloat16 is iterated as it is.
        schedule: which polynomials p and norm f. Their contract is that of the source: NEWTON_SCHULZ_5 is not
            converged; POLAR_EXPRESS_7 is, and <G, result> falls short of the nuclear norm of G by
            at most 4e-7 ||G||_S1 + 8e-5 S f in exact arithmetic, and in bfloat16 by about 2e-3 ||G||_S1.
        dtype: iterate in this one. Default: the matrix's own.

    Returns:
        Same shape and dtype as the matrix. A zero matrix stays zero. The scale of the input does not matter between
        1e-30 and 1e30. Gradients do not flow through POLAR_EXPRESS_7.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    X_BSL = matrix.mT if tall else matrix
    largest = X_BSL.abs().amax(dim=(-2, -1), keepdim=True)
    X_BSL = X_BSL / _one_for_zero(largest)
    if schedule.normalization == "frobenius":
        frobenius = torch.linalg.matrix_norm(X_BSL, keepdim=True)
        X_BSL = (X_BSL / _one_for_zero(schedule.norm_margin * frobenius)).to(dtype or matrix.dtype)
        for a, b, c in schedule.coefficients:
            A_BSS = X_BSL @ X_BSL.mT
            X_BSL = a * X_BSL + (b * A_BSS + c * (A_BSS @ A_BSS)) @ X_BSL
    else:
        X_BSL = X_BSL.to(dtype or matrix.dtype)
        batch_BSL = X_BSL.view(-1, *X_BSL.shape[-2:])
        alone = matrix.device.type == "cpu" and batch_BSL.shape[-2] >= _SMALLEST_SIDE_ALONE
        for piece_BSL in torch.split(batch_BSL, 1 if alone else len(batch_BSL)):
            piece_BSL.copy_(_iterate_from_gram_norm(piece_BSL, schedule))
    X_BSL = X_BSL.to(matrix.dtype)
    return X_BSL.mT if tall else X_BSL


def _iterate_from_gram_norm(X_BSL: Tensor, schedule: OrthogonalizationSchedule) -> Tensor:
    """Largest entry 1 or all zero; overwrites its argument. The first step's A gives the norm for nothing."""
    A_BSS = torch.bmm(X_BSL, X_BSL.mT)
    gram_norm = torch.linalg.matrix_norm(A_BSS, keepdim=True, dtype=torch.promote_types(X_BSL.dtype, torch.float32))
    f = _one_for_zero(schedule.norm_margin * gram_norm.sqrt())
    X_BSL.div_(f)
    A_BSS.div_(f.square())
    for step, (a, b, c) in enumerate(schedule.coefficients):
        if step:
            A_BSS = torch.bmm(X_BSL, X_BSL.mT)
        polynomial_BSS = torch.baddbmm(A_BSS, A_BSS, A_BSS, beta=b, alpha=c)
        X_BSL = torch.baddbmm(X_BSL, polynomial_BSS, X_BSL, beta=a)
    return X_BSL


def _one_for_zero(norm: Tensor) -> Tensor:
    """NaN is no zero."""
    return torch.where(norm == 0, 1, norm)
