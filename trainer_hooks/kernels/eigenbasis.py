"""Eigenvectors of symmetric positive semidefinite matrices, and when and how to renew them cheaply.

S = side. A = factor, Q = basis, B = Q^T A Q, which is diagonal where Q is A's eigenbasis.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.kernels.inverse_roots import eigenvalues_and_basis


class RefreshedBasis(NamedTuple):
    """Basis that refreshed_basis returns, with its eigenvalues."""

    basis: Tensor
    """Orthonormal columns, (..., S, S)."""
    eigenvalues: Tensor
    """Diagonal of B in this basis, (..., S)."""
    changed: Tensor
    """True where the basis is not the one that was given, (...) bool."""


@torch.no_grad()
def eigenbasis(factor: Tensor) -> Tensor:
    """Return eigenvectors in columns, in descending order of their eigenvalues.

        A = Q diag(l) Q^T,   l_1 >= l_2 >= ... >= l_S

    Args:
        factor: (..., S, S), float32 or float64, symmetric; its lower triangle is read.

    Returns:
        Same shape and dtype. The largest component of each eigenvector, the first of equal ones, is positive. NaN where
        the factor is not finite. A float32 decomposition that fails is done again in float64. On a GPU this waits for
        the host.

    Raises:
        GeometryError: not square matrices.
        InvalidInputError: another dtype.
    """
    _check(factor)
    # A matrix that is not finite is decomposed as zeros, so that the others of its batch are not lost.
    batch_BSS = factor.reshape(-1, *factor.shape[-2:])
    finite = batch_BSS.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    _, basis_BSS = eigenvalues_and_basis(torch.where(finite, batch_BSS, 0))
    # Largest eigenvalue first, and of each eigenvector the largest component positive.
    basis_BSS = basis_BSS.flip(-1)
    largest = basis_BSS.take_along_dim(basis_BSS.abs().argmax(dim=-2, keepdim=True), dim=-2)
    basis_BSS = torch.where(finite, basis_BSS * largest.sign(), math.nan)
    return basis_BSS.to(factor.dtype).view(factor.shape)


@torch.no_grad()
def needs_refresh(factor: Tensor, basis: Tensor, tolerance: float) -> Tensor:
    """Return whether the factor has turned away from this basis.

        ||B - diag(B)||_F > tolerance * ||B||_F,   B = Q^T A Q

    The left side over ||B||_F is the relative error of Q diag(B) Q^T as a copy of A. It is summed over the entries
    beside the diagonal: a difference of two norms would lose every digit where it matters.

    Args:
        factor: (..., S, S), float32 or float64, symmetric.
        basis: same shape and dtype, orthonormal columns.
        tolerance: tau in [0, 1]. 0: refresh whenever B is not exactly diagonal.

    Returns:
        (...) bool, never copied to the host. False where the factor is not finite: keep the basis.

    Raises:
        GeometryError, InvalidInputError: shapes, dtypes or tolerance out of range.

    Source: arXiv:2506.03595.
    """
    _check(factor, basis, tolerance)
    return _exceeds(_rotated(factor, basis)[0], tolerance)


@torch.no_grad()
def refreshed_basis(factor: Tensor, basis: Tensor, *, tolerance: float, max_iterations: int = 1) -> RefreshedBasis:
    """Improve the previous basis by the QR algorithm, for the matrices that need it.

        while needs_refresh:  B = Q_k R_k,  B <- R_k Q_k,  Q <- Q Q_k

    Columns are sorted by diag(B) first. One iteration is one power iteration with orthogonalization, qr(A Q), as in
    SOAP.

    Args:
        factor: (..., S, S), float32 or float64, symmetric.
        basis: same shape and dtype, orthonormal columns.
        tolerance: see needs_refresh.
        max_iterations: QR decompositions of the whole batch, whether all need them or none, so that nothing is copied
            to the host.

    Returns:
        Where changed: columns in descending order of the eigenvalues, equal ones in the order they had, signs so
        that a basis which barely turned keeps its columns' signs; orthonormal to rounding, however often this is
        repeated. Elsewhere the basis as it was, bit by bit, and its eigenvalues in its own order; NaN where the factor
        is not finite.

    Raises:
        GeometryError, InvalidInputError: shapes, dtypes, tolerance or max_iterations out of range.

    Source: arXiv:2506.03595 and its code. Ours: signs, and one step Q (3 I - Q^T Q) / 2 against drift.
    """
    _check(factor, basis, tolerance)
    if max_iterations < 1:
        raise InvalidInputError(f"refreshed_basis needs max_iterations of 1 or more, got {max_iterations}.")
    # B (..., S, S) in the old basis; columns of the stale ones in descending order of its diagonal.
    B, scale = _rotated(factor, basis)
    changed = active = _exceeds(B, tolerance)
    order = _descending(B, changed)
    turned = basis.take_along_dim(order.unsqueeze(-2), dim=-1)
    B = B.take_along_dim(order.unsqueeze(-2), dim=-1).take_along_dim(order.unsqueeze(-1), dim=-2)
    # QR steps with continued signs, for those that still exceed the tolerance.
    for _ in range(max_iterations):
        Q, R = torch.linalg.qr(B)
        signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).to(B.dtype)
        Q, R = Q * signs.unsqueeze(-2), R * signs.unsqueeze(-1)
        next_B = R @ Q
        turned = torch.where(active[..., None, None], turned @ Q, turned)
        B = torch.where(active[..., None, None], (next_B + next_B.mT) / 2, B)
        active = active & _exceeds(B, tolerance)
    # One step towards orthonormal columns, against drift, and the order of the new eigenvalues.
    turned = torch.where(changed[..., None, None], 1.5 * turned - 0.5 * turned @ (turned.mT @ turned), basis)
    order = _descending(B, changed)
    return RefreshedBasis(
        basis=turned.take_along_dim(order.unsqueeze(-2), dim=-1),
        eigenvalues=B.diagonal(dim1=-2, dim2=-1).take_along_dim(order, dim=-1) * scale.squeeze(-1),
        changed=changed,
    )


def _descending(B: Tensor, changed: Tensor) -> Tensor:
    """Return the order of columns by their entry on the diagonal; as it is where nothing is to change."""
    order = B.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    return torch.where(changed.unsqueeze(-1), order, torch.arange(B.shape[-1], device=B.device))


def _rotated(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return B of A over its largest entry, whose squares neither overflow nor vanish, and that entry, (..., 1, 1)."""
    scale = factor.abs().amax(dim=(-2, -1), keepdim=True)
    B = basis.mT @ (factor / torch.where(scale == 0, 1, scale)) @ basis
    return (B + B.mT) / 2, scale


def _exceeds(B: Tensor, tolerance: float) -> Tensor:
    """Return whether the entries beside the diagonal are too large, (...) bool. NaN exceeds nothing."""
    beside = B.clone()
    beside.diagonal(dim1=-2, dim2=-1).zero_()
    is_stale: Tensor = torch.linalg.matrix_norm(beside) > tolerance * torch.linalg.matrix_norm(B)
    return is_stale


def _check(factor: Tensor, basis: Tensor | None = None, tolerance: float = 0.0) -> None:
    if factor.ndim < 2 or factor.shape[-1] != factor.shape[-2]:
        raise GeometryError(f"an eigenbasis is of square matrices, (..., S, S), got shape {tuple(factor.shape)}.")
    if factor.dtype not in (torch.float32, torch.float64):
        raise InvalidInputError(f"eigenbases are in float32 or float64, got {factor.dtype}: convert the factor.")
    if basis is not None and (basis.shape != factor.shape or basis.dtype != factor.dtype):
        raise GeometryError(
            f"a basis has the shape and dtype of its factor, {tuple(factor.shape)} {factor.dtype}; got "
            f"{tuple(basis.shape)} {basis.dtype}."
        )
    if not 0 <= tolerance <= 1:
        raise InvalidInputError(f"tolerance is a relative error between 0 and 1, got {tolerance}.")
