"""Against bases that are known by construction, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gns_controller.core.errors import GeometryError, InvalidInputError
from tests.benchmarks.kernels import gaussian
from trainer_hooks.kernels import eigenbasis, needs_refresh, refreshed_basis

VALUES = torch.logspace(0, -4, 24, dtype=torch.float64)


def rotation(side: int = 24, seed: int = 0) -> Tensor:
    basis: Tensor = torch.linalg.qr(gaussian(side, side, seed=seed))[0]
    return basis


def turned(basis: Tensor, angle: float) -> Tensor:
    """The basis, every column turned by about this angle."""
    skew = gaussian(len(basis), len(basis), seed=7)
    rotated: Tensor = basis @ torch.linalg.matrix_exp(angle * (skew - skew.mT) / (2 * len(basis)) ** 0.5)
    return rotated


def with_basis(basis: Tensor, values: Tensor = VALUES) -> Tensor:
    return (basis * values) @ basis.mT


def relative_error(factor: Tensor, basis: Tensor) -> float:
    """||Q diag(Q^T A Q) Q^T - A|| / ||A||, which needs_refresh compares with its tolerance."""
    diagonal = (basis.mT @ factor @ basis).diagonal()
    return float(((basis * diagonal) @ basis.mT - factor).norm() / factor.norm())


# ------------------------------------------------------------------ eigenbasis


def test_eigenbasis_descends_and_its_largest_components_are_positive() -> None:
    basis = rotation()
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    assert torch.allclose(eigenbasis(with_basis(basis)), basis * signs, atol=1e-9)


def test_signs_do_not_depend_on_those_that_lapack_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = with_basis(rotation())
    expected = eigenbasis(factor)
    real = torch.linalg.eigh

    def flipped(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, basis = real(matrix)
        return values, basis * torch.where(torch.arange(24) % 3 == 0, -1.0, 1.0)

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    assert torch.equal(eigenbasis(factor), expected)


def test_a_factor_that_is_not_finite_gives_nan_and_leaves_its_batch_alone() -> None:
    factors = with_basis(rotation()).repeat(2, 3, 1, 1).float()
    factors[1, 2, 4, 0] = math.nan
    bases = eigenbasis(factors)
    assert bases.dtype == torch.float32
    assert bases[1, 2].isnan().all()
    assert torch.equal(bases[0, 1], bases[1, 1])
    assert bases[0].isfinite().all()


# ------------------------------------------------------------------ needs_refresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [1e-3, 1e-2, 0.1])
def test_a_basis_becomes_stale_at_its_relative_error(angle: float, dtype: torch.dtype) -> None:
    basis = rotation()
    factor, old = with_basis(basis), turned(basis, angle)
    error = relative_error(factor, old)
    # 2 % beside it, where a difference of norms in float32 would be 3e-4 of the norm off: a third of the first error.
    assert needs_refresh(factor.to(dtype), old.to(dtype), 0.98 * error)
    assert not needs_refresh(factor.to(dtype), old.to(dtype), 1.02 * error)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_staleness_does_not_depend_on_the_scale(scale: float) -> None:
    basis = rotation()
    factor, old = with_basis(basis), turned(basis, 0.1)
    error = relative_error(factor, old)
    stale = needs_refresh((scale * factor).float(), old.float(), 0.9 * error)
    fresh = needs_refresh((scale * factor).float(), old.float(), 1.1 * error)
    assert (bool(stale), bool(fresh)) == (True, False)


def test_zero_and_infinite_factors_need_no_refresh() -> None:
    factors = torch.stack([torch.zeros(4, 4), torch.full((4, 4), math.nan), torch.full((4, 4), math.inf)])
    assert needs_refresh(factors, torch.eye(4).expand(3, 4, 4), 0.0).tolist() == [False] * 3


# ------------------------------------------------------------------ refreshed_basis


def test_one_iteration_is_one_power_iteration_with_orthogonalization() -> None:
    basis = rotation()
    factor, old = with_basis(basis), turned(basis, 0.05)
    Q, R = torch.linalg.qr(factor @ old[:, (old.mT @ factor @ old).diagonal().argsort(descending=True)])
    Q = Q * R.diagonal().sign()
    refreshed = refreshed_basis(factor, old, tolerance=0.0)
    rayleigh = (Q.mT @ factor @ Q).diagonal()
    order = rayleigh.argsort(descending=True)
    assert bool(refreshed.changed)
    assert torch.allclose(refreshed.basis, Q[:, order], atol=1e-11)
    assert torch.allclose(refreshed.eigenvalues, rayleigh[order], atol=1e-13)


def test_iterations_stop_where_the_tolerance_is_met() -> None:
    basis = rotation()
    factor, old = with_basis(basis), turned(basis, 0.1)
    errors = [
        relative_error(factor, refreshed_basis(factor, old, tolerance=1e-9, max_iterations=n).basis)
        for n in range(1, 7)
    ]
    assert errors == sorted(errors, reverse=True)
    tolerance = 1.1 * errors[3]
    stopped = refreshed_basis(factor, old, tolerance=tolerance, max_iterations=100)
    assert relative_error(factor, stopped.basis) == pytest.approx(errors[3], rel=1e-6)


def test_many_iterations_end_at_the_eigenbasis_with_signs_continued() -> None:
    basis = rotation()
    refreshed = refreshed_basis(with_basis(basis), turned(basis, 0.01), tolerance=0.0, max_iterations=60)
    assert torch.allclose(refreshed.basis, basis, atol=1e-9)
    assert torch.allclose(refreshed.eigenvalues, VALUES, rtol=1e-9)


def test_only_stale_bases_of_a_batch_change() -> None:
    basis = rotation()
    holed = with_basis(basis)
    holed[2, 2] = math.nan
    ascending = basis.flip(1)
    factors = torch.stack([with_basis(basis), with_basis(basis), holed])
    old = torch.stack([turned(basis, 0.2), ascending, turned(basis, 0.2)])
    refreshed = refreshed_basis(factors, old, tolerance=1e-3, max_iterations=3)
    assert refreshed.changed.tolist() == [True, False, False]
    assert torch.equal(refreshed.basis[1:], old[1:])
    # Unchanged: in its own order.
    assert torch.allclose(refreshed.eigenvalues[1], VALUES.flip(0), atol=1e-12)
    assert refreshed.eigenvalues[2].isnan().any()
    assert refreshed.basis[0].isfinite().all()


def test_equal_eigenvalues_keep_the_order_of_their_columns() -> None:
    # A = diag(1, 3, 3, 2) in a basis of unit vectors but for the first and the last, which are turned.
    factor = torch.diag(torch.tensor([1.0, 3.0, 3.0, 2.0], dtype=torch.float64))
    old = torch.eye(4, dtype=torch.float64)
    old[0, 0] = old[3, 3] = math.cos(0.1)
    old[3, 0], old[0, 3] = math.sin(0.1), -math.sin(0.1)
    refreshed = refreshed_basis(factor, old, tolerance=0.0, max_iterations=60)
    assert torch.allclose(refreshed.basis, torch.eye(4, dtype=torch.float64)[:, [1, 2, 3, 0]], atol=1e-9)


def test_a_basis_stays_orthonormal_however_often_it_is_refreshed() -> None:
    basis = rotation().float()
    generator = torch.Generator().manual_seed(0)
    factor = torch.eye(24)
    for _ in range(500):
        gradient = torch.randn(24, 30, generator=generator)
        factor = 0.9 * factor + 0.1 * gradient @ gradient.mT
        basis = refreshed_basis(factor, basis, tolerance=0.0).basis
    # 2^-24 per entry of one product over 24; without the correction 500 of them had added up.
    assert float((basis.double().mT @ basis.double() - torch.eye(24)).abs().max()) < 1e-6


def test_kernels_read_nothing_on_the_host() -> None:
    # A fake tensor has no values: reading one raises.
    with FakeTensorMode():
        factor, basis = torch.empty(3, 8, 8), torch.empty(3, 8, 8)
        assert needs_refresh(factor, basis, 0.1).shape == (3,)
        assert refreshed_basis(factor, basis, tolerance=0.1, max_iterations=2).basis.shape == (3, 8, 8)


@pytest.mark.parametrize("settings", [{"tolerance": -0.1}, {"tolerance": 1.1}, {"tolerance": 0.1, "max_iterations": 0}])
def test_eigenbases_refuse_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"got (-0\.1|1\.1|0)\."):
        refreshed_basis(torch.eye(3), torch.eye(3), **settings)


def test_eigenbases_refuse_shapes_and_dtypes_that_do_not_fit() -> None:
    with pytest.raises(GeometryError, match="square"):
        eigenbasis(torch.ones(2, 3))
    with pytest.raises(InvalidInputError, match="bfloat16: convert"):
        eigenbasis(torch.eye(2, dtype=torch.bfloat16))
    with pytest.raises(GeometryError, match=r"\(3, 3\).* got \(2, 2\)"):
        needs_refresh(torch.eye(3), torch.eye(2), 0.1)
    with pytest.raises(GeometryError, match=r"torch\.float32; got .* torch\.float64"):
        needs_refresh(torch.eye(3), torch.eye(3, dtype=torch.float64), 0.1)
