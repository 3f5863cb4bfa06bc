"""Inverse roots of symmetric positive semidefinite matrices, for preconditioners of the Shampoo family.

S = side, B = matrices in a batch.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.kernels.schedules import POLAR_EXPRESS_8

InverseRootMethod = Literal["eigh", "newton", "polar_express"]
"""Method by which (A + e I)^(-1/root) is computed.

eigh            eigendecompositions: any root. A float32 decomposition that fails is done again in float64. On a GPU it
                waits for the host.
newton          coupled Newton iteration, products only: a whole root. 35 iterations in float32 and 60 in float64, of
                2 + log2(root) to 1 + 2 log2(root) products. Never waits for the host.
polar_express   coupled iteration with the eight polynomials of POLAR_EXPRESS_8, 32 products: root 2 only, and converged
                for eigenvalues down to 1e-6 of ||A + e I||_F; below, the root comes out too small, by 1 % at 1e-7, by
                43 % at 1e-8. Never waits for the host.
"""

_NEWTON_ITERATIONS = {torch.float32: 35, torch.float64: 60}
"""Number of iterations: each multiplies a small eigenvalue by (1 + 1/root)^root >= 2 until it is near 1, enough for
3e-10 and 1e-17 of the largest, below what rounding leaves. Iterating on changes nothing."""
_POWER_ITERATIONS = 20
"""Products by which iterative methods estimate the largest eigenvalue."""


@torch.no_grad()
def inverse_root(
    factor: Tensor,
    *,
    root: float,
    epsilon: float,
    relative: bool = False,
    method: InverseRootMethod = "eigh",
) -> Tensor:
    """Compute the inverse root of symmetric positive semidefinite matrices, damped.

        A = Q diag(l) Q^T   ->   Q diag((max(l, 0) + e)^(-1/root)) Q^T

    Negative eigenvalues of a factor are rounding: eigh puts them to zero before e is added; the other two methods add
    e to what is there.

    Args:
        factor: (..., S, S), float32 or float64, symmetric; of it eigh reads the lower triangle.
        root: positive. 2 and 4 are Shampoo's; 4/3 needs eigh.
        epsilon: e, in the units of the factor, zero or more. Without it, a factor that lacks full rank has no root.
        relative: e = epsilon * (largest eigenvalue of this matrix), which the iterative methods estimate to 10 % from
            20 power iterations. Of a zero matrix that is zero.
        method: see InverseRootMethod.

    Returns:
        Same shape and dtype, symmetric. A matrix without a finite answer is NaN all over and leaves the others of its
        batch alone: it held what is not finite, it and e lack full rank, or the iteration did not converge. Keep the
        previous root there: torch.where(new.isfinite().all(-1, True).all(-2, True), new, previous).

    Raises:
        GeometryError: not square matrices.
        InvalidInputError: root, epsilon, dtype or method out of range.

    Errors: eigh is off by 3e-7 of the largest eigenvalue in float32. With e at 1e-3 of the largest the root is off by
        2e-4 of its Frobenius norm, at 1e-5 by 1e-2; the iterations by no more. Smaller e needs float64.
    Source: eigh and newton, arXiv:2309.06497 and its code; polar_express, arXiv:2505.16932 as ASGO uses it.
    """
    _check(factor, root=root, epsilon=epsilon, method=method)
    # One batch, in which the identity stands in for matrices that are not finite: they must not disturb the others.
    batch_BSS = factor.reshape(-1, *factor.shape[-2:])
    finite = batch_BSS.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    batch_BSS = torch.where(finite, batch_BSS, torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device))
    # Entries of order 1, and epsilon in the same units, (B, 1).
    scale_B11 = _power_of_two(batch_BSS, least=0 if relative else epsilon)
    batch_BSS = batch_BSS / scale_B11
    epsilon_B1 = torch.full_like(scale_B11[..., 0], epsilon) if relative else epsilon / scale_B11[..., 0]
    # Eigenvalues are damped after the decomposition, iterations damp the matrix.
    if method == "eigh":
        roots_BSS = _by_eigenvalues(batch_BSS, root, epsilon_B1, relative)
    else:
        damping = epsilon_B1 * _largest_eigenvalue(batch_BSS) if relative else epsilon_B1
        damped_BSS = batch_BSS + torch.diag_embed(damping.expand(-1, factor.shape[-1]))
        roots_BSS = _by_newton(damped_BSS, round(root)) if method == "newton" else _by_polar_express(damped_BSS)
    # Symmetric, in the units of the factor, and NaN all over where the answer is not finite.
    roots_BSS = (roots_BSS + roots_BSS.mT) * (scale_B11.pow(-1 / root) / 2)
    roots_BSS = torch.where(finite & roots_BSS.isfinite().all(-1, True).all(-2, True), roots_BSS, math.nan)
    return roots_BSS.view(factor.shape)


def _check(factor: Tensor, *, root: float, epsilon: float, method: str) -> None:
    if factor.ndim < 2 or factor.shape[-1] != factor.shape[-2]:
        raise GeometryError(f"inverse_root takes square matrices, (..., S, S), got shape {tuple(factor.shape)}.")
    if factor.dtype not in (torch.float32, torch.float64):
        raise InvalidInputError(f"inverse_root computes in float32 or float64, got {factor.dtype}: convert the factor.")
    if not (0 < root < math.inf and 0 <= epsilon < math.inf):
        raise InvalidInputError(f"inverse_root needs root > 0 and epsilon >= 0, both finite, got {root=}, {epsilon=}.")
    if method not in get_args(InverseRootMethod):
        raise InvalidInputError(f"{method=} is none of {', '.join(get_args(InverseRootMethod))}.")
    if (method == "newton" and root != round(root)) or (method == "polar_express" and root != 2):
        fitting = "a whole root" if method == "newton" else "root=2"
        raise InvalidInputError(f"{method=} takes {fitting}, got {root=}; method='eigh' takes any.")


def _power_of_two(batch_BSS: Tensor, *, least: float) -> Tensor:
    """Return powers of two to divide by, (B, 1, 1), so that norms and products neither overflow nor vanish.

    Dividing by them rounds nothing. Half to all of the largest entry or of `least`, whatever is larger.
    """
    size_B11 = batch_BSS.abs().amax(dim=(-2, -1), keepdim=True)
    size_B11 = size_B11.clamp_min(max(least, torch.finfo(batch_BSS.dtype).tiny))
    mantissa_B11, _ = torch.frexp(size_B11)
    power_B11: Tensor = size_B11 / (2 * mantissa_B11)
    return power_B11


def _by_eigenvalues(batch_BSS: Tensor, root: float, epsilon_B1: Tensor, relative: bool) -> Tensor:
    """Return Q diag((max(l, 0) + e)^(-1/root)) Q^T."""
    values_BS, basis_BSS = eigenvalues_and_basis(batch_BSS)
    values_BS = values_BS.clamp_min(0)
    values_BS = values_BS + (epsilon_B1 * values_BS[:, -1:] if relative else epsilon_B1)
    roots_BSS = (basis_BSS * values_BS.pow(-1 / root).unsqueeze(-2)) @ basis_BSS.mT
    return roots_BSS.to(batch_BSS.dtype)


def eigenvalues_and_basis(batch_BSS: Tensor) -> tuple[Tensor, Tensor]:
    """Run torch.linalg.eigh, ascending; what fails in float32 is done again in float64, and returned in it.

    A matrix that fails in float64 as well is NaN; the rest of its batch is not.
    """
    try:
        values_BS, basis_BSS = torch.linalg.eigh(batch_BSS)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, not re-exported
        if batch_BSS.dtype != torch.float64:
            return eigenvalues_and_basis(batch_BSS.double())
        if len(batch_BSS) == 1:
            return torch.full_like(batch_BSS[:, 0], math.nan), torch.full_like(batch_BSS, math.nan)
        pairs = [eigenvalues_and_basis(matrix.unsqueeze(0)) for matrix in batch_BSS]
        return torch.cat([values for values, _ in pairs]), torch.cat([basis for _, basis in pairs])
    return values_BS, basis_BSS


def _by_newton(damped_BSS: Tensor, root: int) -> Tensor:
    """Iterate M -> I and X -> A^(-1/p):  T = ((p + 1) I - M) / p,  X <- X T,  M <- T^p M."""
    # Start with a multiple of A whose eigenvalues are between 0 and (p + 1) / 2.
    side = damped_BSS.shape[-1]
    identity_SS = torch.eye(side, dtype=damped_BSS.dtype, device=damped_BSS.device)
    scale = (root + 1) / (2 * torch.linalg.matrix_norm(damped_BSS, keepdim=True))
    M_BSS, X_BSS = scale * damped_BSS, scale.pow(1 / root) * identity_SS
    for _ in range(_NEWTON_ITERATIONS[damped_BSS.dtype]):
        T_BSS = ((root + 1) * identity_SS - M_BSS) / root
        X_BSS = X_BSS @ T_BSS
        M_BSS = torch.linalg.matrix_power(T_BSS, root) @ M_BSS
    # What did not come near the identity did not converge.
    residual = (M_BSS - identity_SS).abs().amax(dim=(-2, -1), keepdim=True)
    roots_BSS: Tensor = torch.where(residual < 0.1, X_BSS, math.nan)
    return roots_BSS


def _by_polar_express(damped_BSS: Tensor) -> Tensor:
    """Iterate Y -> A^(1/2) and Z -> A^(-1/2), A divided by its norm; polynomials act on the root of an eigenvalue."""
    norm = POLAR_EXPRESS_8.norm_margin * torch.linalg.matrix_norm(damped_BSS, keepdim=True)
    Y_BSS = damped_BSS / norm
    Z_BSS = torch.eye(damped_BSS.shape[-1], dtype=damped_BSS.dtype, device=damped_BSS.device).expand_as(Y_BSS)
    # p(Z Y) multiplies both, so that Z Y -> I.
    for a, b, c in POLAR_EXPRESS_8.coefficients:
        product_BSS = Z_BSS @ Y_BSS
        polynomial_BSS = torch.baddbmm(product_BSS, product_BSS, product_BSS, beta=b, alpha=c)
        Y_BSS = torch.baddbmm(Y_BSS, Y_BSS, polynomial_BSS, beta=a)
        Z_BSS = torch.baddbmm(Z_BSS, polynomial_BSS, Z_BSS, beta=a)
    roots_BSS: Tensor = Z_BSS / norm.sqrt()
    return roots_BSS


def _largest_eigenvalue(batch_BSS: Tensor) -> Tensor:
    """Estimate largest eigenvalues, (B, 1), low by a few per cent, from the column of the largest diagonal entry."""
    column = batch_BSS.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[:, None, None]
    vector_BS1 = batch_BSS.take_along_dim(column, dim=-1)
    for _ in range(_POWER_ITERATIONS):
        length = torch.linalg.vector_norm(vector_BS1, dim=-2, keepdim=True)
        vector_BS1 = batch_BSS @ (vector_BS1 / torch.where(length == 0, 1, length))
    values_B1: Tensor = torch.linalg.vector_norm(vector_BS1, dim=-2)
    return values_B1
