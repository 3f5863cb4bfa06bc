"""Noise and signal for spectral optimizers (Muon, Shampoo), in the nuclear norm, the dual of Schatten-infinity.

M = rows, N = columns, S = min(M, N) the shorter side, L = the longer one, B = matrices of one shape in a batch, whose
sums are added.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.kernels import POLAR_EXPRESS_7, orthogonalize

SpectralNorms = Literal["exact", "polar_express"]
"""How p(G) = U V^T and the nuclear norm are computed.

exact           float64: singular value decompositions. float32: eigendecompositions of G G^T in float64, which see a
                singular value down to 1e-8 of the largest and cost a third to all of an SVD. U V^T over the singular
                values that are not rounding (above eps * L * the largest). Raises on NaN; on a GPU it waits for the
                host.
polar_express   POLAR_EXPRESS_7, matrix products only: all matrices in one batch, ||G||_S1 = <G, p(G)>, NaN in, NaN out,
                never waits for the host. float32 on CUDA iterates in bfloat16: the cheapest products there are, while
                TF32 would have to be switched on for the whole process. Everything else iterates in its own dtype.
                Norms are low by at most 4e-7 ||G||_S1 + 8e-5 S f, f = 1.01 ||G G^T||_F^(1/2), give or take rounding:
                1e-6 of the norm in float32, 2e-3 in bfloat16. Below 1e-3 f a singular value counts less than fully.
"""

MAX_BATCH_ELEMENTS = 2**24
"""Elements of one half (B * M * N) worth handing over at once: 0.7 GB of temporaries in float32 on a GPU, and products
large enough to fill it. A single larger matrix goes alone. See split_temporary_bytes."""


def wide(matrix: Tensor) -> Tensor:
    """(M, N) -> (S, L), or (B, M, N) -> (B, S, L): transposed where that puts the shorter side first.

    Raises:
        GeometryError: not a matrix.
    """
    if matrix.ndim not in (2, 3):
        raise GeometryError(f"the spectral geometry takes 2-D tensors, got shape {tuple(matrix.shape)}.")
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT


def split_sums(
    half_a: Tensor,
    half_b: Tensor,
    difference: Tensor,
    *,
    target_a: Tensor | None = None,
    target_b: Tensor | None = None,
    norms: SpectralNorms = "exact",
) -> Tensor:
    """Nuclear norms and matsign inner products of two half gradients.

        [||difference||_S1, ||half_a||_S1, ||half_b||_S1, <p(half_a), target_b>, <p(half_b), target_a>]

    Args:
        half_a: (M, N) or (B, M, N), float32 or float64. All arguments have one shape and dtype.
        half_b: likewise.
        difference: half_a - half_b, handed in because the signed reduction knows it without cancellation.
        target_a: what p(half_b) is judged by. Default: half_a.
        target_b: what p(half_a) is judged by. Default: half_b.
        norms: see SpectralNorms. exact decomposes each half, and takes values only of the difference.

    Returns:
        (5,) float64 on the inputs' device, summed over the batch.

    Raises:
        GeometryError: not matrices.
        InvalidInputError: unknown norms.
    """
    if _is_exact(norms):
        noise = nuclear_norm(difference)
        direction_a, norm_a = _exact_direction_and_norm(half_a)
        direction_b, norm_b = _exact_direction_and_norm(half_b)
    else:
        tensors = [_batch(tensor) for tensor in (half_a, half_b, difference)]
        direction_a, direction_b, direction_d = (
            direction.view_as(half_a) for direction in _polar_direction(torch.cat(tensors)).chunk(3)
        )
        noise = _inner(difference, direction_d)
        norm_a, norm_b = _inner(half_a, direction_a), _inner(half_b, direction_b)
    progress_a = _inner(direction_a, half_b if target_b is None else target_b)
    progress_b = _inner(direction_b, half_a if target_a is None else target_a)
    return torch.stack([noise, norm_a, norm_b, progress_a, progress_b])


def progress_sums(direction: Tensor, target: Tensor, *, norms: SpectralNorms = "exact") -> Tensor:
    """(2,) float64: <p(direction), target> and 0, which keeps the place of the square the euclidean geometry needs.

    Args:
        direction: (M, N) or (B, M, N), float32 or float64: what the optimizer would move along p of.
        target: the gradient that judges it, same shape and dtype.
        norms: see SpectralNorms.
    """
    p = _exact_direction_and_norm(direction)[0] if _is_exact(norms) else _polar_direction(direction)
    inner = _inner(p, target)
    return torch.stack([inner, torch.zeros_like(inner)])


def spread_sums(mean_grad: Tensor, covariance: Tensor, *, norms: SpectralNorms = "exact") -> Tensor:
    """(2,) float64: tr C^(1/2) and ||Gbar||_S1.

    Args:
        mean_grad: (M, N) or (B, M, N), float32 or float64.
        covariance: (S, S) or (B, S, S), the per-sample covariance of the shorter side; eigenvalues only, in float64.
        norms: of the mean gradient; see SpectralNorms. The eigenvalues are exact either way, raise on NaN, and wait.

    Bias: tr C^(1/2) needs about as many sample groups as the noise has directions: 0.24..0.57 of the truth with 8.
        It depends on the side; the shorter one is the convention.
    """
    eigenvalues = torch.linalg.eigvalsh(covariance.double())
    return torch.stack([eigenvalues.clamp_min(0).sqrt().sum(), nuclear_norm(mean_grad, norms=norms)])


def nuclear_norm(matrix: Tensor, *, norms: SpectralNorms = "exact") -> Tensor:
    """() float64: the sum of singular values of (M, N), or of all matrices of (B, M, N)."""
    if _is_exact(norms):
        if matrix.dtype == torch.float64:
            values: Tensor = torch.linalg.svdvals(wide(matrix))
        else:
            values = torch.linalg.eigvalsh(_gram(matrix)).clamp_min(0).sqrt()
        return values.sum()
    return _inner(matrix, _polar_direction(matrix))


def split_temporary_bytes(half: Tensor) -> int:
    """Upper bound of what split_sums(norms="polar_express") allocates beside its arguments, at its peak.

        3 B ((i + 3 d) M N + 2 d S^2 + 64),   i, d = bytes per element of the input, and of what is iterated

    i = 4, d = 2 for float32 on CUDA: 30 to 42 bytes per element of one half. On a CPU, matrices with S >= 256 are
    iterated one by one, which needs about 2 i instead of i + 3 d.
    """
    num_rows, num_columns = wide(half).shape[-2:]
    num_matrices = 3 * (half.shape[0] if half.ndim == 3 else 1)
    iterated = _iterated_dtype(half).itemsize
    per_matrix = (half.dtype.itemsize + 3 * iterated) * num_rows * num_columns + 2 * iterated * num_rows**2 + 64
    return num_matrices * per_matrix


def _is_exact(norms: SpectralNorms) -> bool:
    if norms not in ("exact", "polar_express"):
        raise InvalidInputError(f"norms={norms!r} is neither 'exact' nor 'polar_express'.")
    return norms == "exact"


def _exact_direction_and_norm(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if matrix.dtype != torch.float64:
        return _eigen_direction_and_norm(matrix)
    left_SS, values_S, right_SL = torch.linalg.svd(wide(matrix), full_matrices=False)
    tolerance = torch.finfo(values_S.dtype).eps * right_SL.shape[-1] * values_S[..., :1]
    kept_S = (values_S > tolerance).to(values_S.dtype)
    direction_SL = (left_SS * kept_S.unsqueeze(-2)) @ right_SL
    return _as_it_was(direction_SL, matrix), values_S.sum()


def _eigen_direction_and_norm(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(G G^T)^(-1/2) G and the trace of (G G^T)^(1/2), by eigenvalues in float64."""
    squares_S, basis_SS = torch.linalg.eigh(_gram(matrix))
    values_S = squares_S.clamp_min(0).sqrt()
    tolerance = torch.finfo(matrix.dtype).eps * max(matrix.shape[-2:]) * values_S[..., -1:]
    inverse_S = torch.where(values_S > tolerance, 1 / values_S.clamp_min(torch.finfo(torch.float64).tiny), 0)
    inverse_root_SS = (basis_SS * inverse_S.unsqueeze(-2)) @ basis_SS.mT
    direction_SL = inverse_root_SS.to(matrix.dtype) @ wide(matrix)
    return _as_it_was(direction_SL, matrix), values_S.sum()


def _gram(matrix: Tensor) -> Tensor:
    wide_SL = wide(matrix).double()
    return wide_SL @ wide_SL.mT


def _as_it_was(direction_SL: Tensor, matrix: Tensor) -> Tensor:
    return direction_SL.mT if matrix.shape[-2] > matrix.shape[-1] else direction_SL


def _polar_direction(matrix: Tensor) -> Tensor:
    return orthogonalize(_batch(matrix), schedule=POLAR_EXPRESS_7, dtype=_iterated_dtype(matrix)).view_as(matrix)


def _iterated_dtype(matrix: Tensor) -> torch.dtype:
    return torch.bfloat16 if matrix.is_cuda and matrix.dtype == torch.float32 else matrix.dtype


def _batch(matrix: Tensor) -> Tensor:
    wide(matrix)
    return matrix if matrix.ndim == 3 else matrix.unsqueeze(0)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Rows in the inputs' dtype, their sum in float64: ten times faster on a CPU than a float64 sum of float32 entries,
    and its rounding is 1e-7 of a row."""
    rows: Tensor = torch.linalg.vecdot(first, second)
    return rows.sum(dtype=torch.float64)
