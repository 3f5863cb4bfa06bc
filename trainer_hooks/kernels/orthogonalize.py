"""Orthogonal factor U V^T of a matrix, approximated by matrix products alone.

S = the shorter side, L = the longer one, B = matrices in a batch.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.kernels.schedules import NEWTON_SCHULZ_5, OrthogonalizationSchedule
from trainer_hooks.kernels.symmetric import (
    gram,
    multiply_add,
    symmetric_polynomial,
    symmetric_product,
)

Evaluation = Literal["auto", "direct", "gram"]
"""Evaluation of the polynomials. Products of S x S matrices and A are half done and mirrored, where that is faster.

direct   X <- a X + (b A + c A^2) X at every step: 3 S^2 L + S^3 multiplications per step.
gram     the polynomials of A alone, multiplied up; X is multiplied, and A computed afresh from it, after steps 2, 5, 8
         and so on. Five steps: 6 S^2 L + 14 S^3, instead of 15 S^2 L + 5 S^3. Not in bfloat16: its rounding of A grows
         from step to step, to a tenth of the result after four steps and to infinity after ten.
auto     gram on a CPU for at most five steps in float32 or float64 where L >= 2 S >= 256: x1.05 to x1.6 as fast, and
         off by 2e-4 at most, a hundredth of what such a schedule leaves; else direct. Not measured on a GPU.
"""

_SERVED = (torch.float32, torch.float64, torch.bfloat16)
_SMALLEST_SIDE_ALONE = 256
"""Shortest side from which on a CPU takes one matrix at a time: products fill all cores, as fast as torch.bmm does or
faster, and need less memory. Below, the batch is up to ten times as fast."""
_FRESH_STEPS = (0, 2, 5, 8)
"""Steps whose A is computed from X. By the third, small singular values have grown thirtyfold, and their squares stand
clear of the rounding of A."""


@torch.no_grad()
def orthogonalize(
    matrix: Tensor,
    *,
    schedule: OrthogonalizationSchedule = NEWTON_SCHULZ_5,
    dtype: torch.dtype | None = None,
    evaluation: Evaluation = "auto",
) -> Tensor:
    """Move every singular value of a matrix towards 1 and keep its singular vectors.

        G = U diag(s) V^T   ->   U diag(p(s/f)) V^T

    Nothing is copied to the host, except by EXACT on a GPU. What is not finite makes its own matrix of the batch NaN,
    and no other. Gradients do not flow.

    Args:
        matrix: (..., M, N), wide or tall, in any layout; float32, float64 or bfloat16. Leading dims are a batch, so
            a convolution's (O, I, kh, kw) goes in as weight.flatten(1).
        schedule: which polynomials p and norm f. Their contract is that of the source: NEWTON_SCHULZ_5 is not
            converged; POLAR_EXPRESS_7 is, and <G, result> falls short of the nuclear norm of G by
            at most 4e-7 ||G||_S1 + 8e-5 S f in exact arithmetic, and in bfloat16 by about 2e-3 ||G||_S1.
        dtype: iterate in this one. Default: the matrix's own; for EXACT float64.
        evaluation: see Evaluation.

    Returns:
        Same shape and dtype as the matrix. Zero stays zero, and so do null directions of a matrix without full rank:
        p(0) = 0, and p is steep there, so that rounding of relative size e comes out at up to slope * e. EXACT gives 0
        where s <= eps * L * s_max, eps that of float32 for a float32 or bfloat16 matrix. The scale of the input
        does not matter between 1e-30 and 1e30.

    Raises:
        GeometryError: fewer than two dims.
        InvalidInputError: a dtype that is not served, an unknown evaluation, or one for EXACT.

    Errors: with five steps float32 is off by 5e-5 at most, in the spectral norm. bfloat16 is off by 1e-2 to 3e-2 of the
        Frobenius norm, by more where the matrix has nearly null directions. See docs/reference/kernels.md.
    Source: of the iteration, the schedule's. Evaluation on the Gram matrix with a restart: Dao-AILab, Gram
        Newton-Schulz, 2026. Ours: A in upper blocks, the Schatten-4 norm from the first A.
    """
    iterated = _iterated_dtype(matrix, schedule, dtype, evaluation)
    if matrix.numel() == 0:
        return matrix.clone()
    # Wide matrices in one batch, (B, S, L): products are then of the shorter side.
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide_SL = matrix.mT if tall else matrix
    wide_BSL = wide_SL.reshape(-1, *wide_SL.shape[-2:])
    # Divide by the largest entry while casting, so that no norm overflows or vanishes.
    largest = torch.linalg.vector_norm(wide_BSL, ord=math.inf, dim=(-2, -1), keepdim=True)
    layout = torch.contiguous_format if matrix.device.type == "cpu" else torch.preserve_format
    X_BSL = torch.empty_like(wide_BSL, dtype=iterated, memory_format=layout)
    torch.div(wide_BSL, _one_for_zero(largest), out=X_BSL)
    # By decomposition, or by polynomials.
    if not schedule.coefficients:
        X_BSL = _decomposed(X_BSL, torch.promote_types(matrix.dtype, torch.float32))
    else:
        _evaluate(X_BSL, schedule, evaluation)
    result_SL = X_BSL.to(matrix.dtype).view(wide_SL.shape)
    return result_SL.mT if tall else result_SL


def _iterated_dtype(
    matrix: Tensor, schedule: OrthogonalizationSchedule, dtype: torch.dtype | None, evaluation: str
) -> torch.dtype:
    """Return the dtype of the iteration; refuse what cannot be iterated so."""
    if matrix.ndim < 2:
        raise GeometryError(f"orthogonalize takes matrices, (..., M, N), got shape {tuple(matrix.shape)}.")
    exact = not schedule.coefficients
    iterated = dtype or (torch.float64 if exact else matrix.dtype)
    if matrix.dtype not in _SERVED or iterated not in (_SERVED[:2] if exact else _SERVED):
        raise InvalidInputError(
            f"orthogonalize takes and iterates in float32, float64 or bfloat16, EXACT not in bfloat16; got "
            f"{matrix.dtype=}, {dtype=}. Convert the matrix."
        )
    if evaluation not in get_args(Evaluation):
        raise InvalidInputError(f"{evaluation=} is none of {', '.join(get_args(Evaluation))}.")
    if (exact and evaluation != "auto") or (evaluation == "gram" and iterated == torch.bfloat16):
        raise InvalidInputError(
            f"{evaluation=} evaluates polynomials: 'direct' and 'gram' have no meaning for EXACT, and 'gram' none in "
            "bfloat16, where rounding would take over. Leave it at 'auto'."
        )
    return iterated


def _evaluate(X_BSL: Tensor, schedule: OrthogonalizationSchedule, evaluation: str) -> None:
    """Apply the polynomials in place: to one batch, or matrix by matrix where a matrix fills the cores."""
    on_gram = evaluation == "gram" or (evaluation == "auto" and _gram_is_faster(X_BSL, schedule))
    evaluated = _evaluated_on_gram if on_gram else _evaluated_directly
    alone = len(X_BSL) == 1 or (X_BSL.device.type == "cpu" and X_BSL.shape[-2] >= _SMALLEST_SIDE_ALONE)
    for piece in X_BSL.unbind() if alone else [X_BSL]:
        piece.copy_(evaluated(piece, schedule))


def _evaluated_directly(X: Tensor, schedule: OrthogonalizationSchedule) -> Tensor:
    """Apply the polynomials to X (S, L) or (B, S, L), of largest entry 1 or all zero; overwrites its argument."""
    A = _normalized_gram(X, schedule)
    polynomial, other = torch.empty_like(A), torch.empty_like(X)
    for step, (a, b, c) in enumerate(schedule.coefficients):
        # X <- a X + (b A + c A^2) X, with A = X X^T of this step.
        if step:
            gram(X, out=A)
        symmetric_polynomial(A, linear=b, square=c, out=polynomial)
        multiply_add(X, polynomial, X, scale=a, out=other)
        X, other = other, X
    return X


def _evaluated_on_gram(X: Tensor, schedule: OrthogonalizationSchedule) -> Tensor:
    """Apply the same polynomials by products of A alone: P(A) and A commute, so their products are symmetric."""
    A = _normalized_gram(X, schedule)
    product = A
    last = len(schedule.coefficients) - 1
    for step, (a, b, c) in enumerate(schedule.coefficients):
        # P(A) = a I + b A + c A^2, multiplied up since X was last computed.
        polynomial = symmetric_polynomial(A, linear=b, square=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if step in _FRESH_STEPS else symmetric_product(product, polynomial)
        # X itself at the end, and where the next A is computed from it; else A <- P(A)^2 A.
        if step == last or step + 1 in _FRESH_STEPS:
            X = product @ X
        if step < last:
            A = gram(X) if step + 1 in _FRESH_STEPS else symmetric_product(symmetric_product(polynomial, A), polynomial)
    return X


def _normalized_gram(X: Tensor, schedule: OrthogonalizationSchedule) -> Tensor:
    """Divide X by f in place and return X X^T. Both norms are read off X X^T, in float32 or better."""
    # Frobenius norms of X, or of A, from A alone: its trace, or its own norm.
    A = gram(X)
    precision = torch.promote_types(A.dtype, torch.float32)
    if schedule.normalization == "gram":
        norm = torch.linalg.matrix_norm(A, keepdim=True, dtype=precision).sqrt()
    else:
        norm = A.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=precision).sqrt()[..., None, None]
    f = _one_for_zero(schedule.norm_margin * norm)
    X.div_(f)
    return A.div_(f.square())


def _gram_is_faster(X_BSL: Tensor, schedule: OrthogonalizationSchedule) -> bool:
    """Return whether "gram" was measured to be faster here, and loses no digits that matter."""
    short, long = X_BSL.shape[-2:]
    fits = X_BSL.device.type == "cpu" and X_BSL.dtype != torch.bfloat16 and long >= 2 * short >= 256
    return fits and len(schedule.coefficients) <= 5


def _decomposed(X_BSL: Tensor, precision: torch.dtype) -> Tensor:
    """Return U V^T by a singular value decomposition, without directions whose singular value is rounding."""
    finite = X_BSL.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    left, values_BS, right = torch.linalg.svd(torch.where(finite, X_BSL, 0), full_matrices=False)
    eps = max(torch.finfo(precision).eps, torch.finfo(X_BSL.dtype).eps)
    kept_BS = values_BS > eps * X_BSL.shape[-1] * values_BS[:, :1]
    return torch.where(finite, (left * kept_BS.unsqueeze(-2)) @ right, math.nan)


def _one_for_zero(norm: Tensor) -> Tensor:
    """Return the norm, 1 where it is 0. NaN stays NaN."""
    return torch.where(norm == 0, 1, norm)
