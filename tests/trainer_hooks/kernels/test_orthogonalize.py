from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer_hooks.kernels import NEWTON_SCHULZ_5, POLAR_EXPRESS_7, OrthogonalizationSchedule, orthogonalize

SCHEDULES = [pytest.param(NEWTON_SCHULZ_5, id="newton_schulz"), pytest.param(POLAR_EXPRESS_7, id="polar_express")]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(values: Tensor, rows: int, columns: int) -> Tensor:
    left, _ = torch.linalg.qr(gaussian(rows, len(values), seed=0))
    right, _ = torch.linalg.qr(gaussian(columns, len(values), seed=1))
    matrix: Tensor = (left * values) @ right.mT
    return matrix


SPECTRA: dict[str, Callable[[], Tensor]] = {
    "well conditioned": lambda: with_singular_values(torch.linspace(0.1, 1, 96, dtype=torch.float64), 96, 300),
    "square gaussian": lambda: gaussian(256, 256),
    "wide gaussian": lambda: gaussian(96, 300),
    "low rank and noise": lambda: gaussian(96, 6) @ gaussian(6, 300, seed=1) + 0.3 * gaussian(96, 300, seed=2),
    "low rank and little noise": lambda: gaussian(96, 6) @ gaussian(6, 300, seed=1) + 1e-2 * gaussian(96, 300, seed=2),
    "condition 1e6": lambda: with_singular_values(torch.logspace(-6, 0, 128, dtype=torch.float64), 128, 128),
    # One large value, and all others where the polynomial falls shortest: 1.7e-4 of the norm.
    "worst": lambda: with_singular_values(
        torch.cat([torch.ones(1, dtype=torch.float64), torch.full((95,), 1.75e-4, dtype=torch.float64)]), 96, 96
    ),
}


def deficit_and_bound(matrix: Tensor, found: Tensor) -> tuple[float, float, float]:
    """||G||_S1 - <G, found>, what POLAR_EXPRESS_7 promises of it in exact arithmetic, and ||G||_S1."""
    values = torch.linalg.svdvals(matrix.double())
    nuclear, f = float(values.sum()), 1.01 * float((values**4).sum().sqrt().sqrt())
    return nuclear - float((matrix.double() * found.double()).sum()), 4e-7 * nuclear + 8e-5 * len(values) * f, nuclear


# ------------------------------------------------------------------ Newton-Schulz: a band, not convergence


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (12, 40), (40, 12)])
def test_singular_values_land_in_the_published_band(rows: int, columns: int) -> None:
    # Band of the five Jordan steps for inputs from 3e-3 of the Frobenius norm upwards: [0.682, 1.202].
    values = torch.logspace(-2.4, 0, 12, dtype=torch.float64)
    matrix = with_singular_values(values, rows, columns)
    found = torch.linalg.svdvals(orthogonalize(matrix))
    assert float(found.min()) > 0.68
    assert float(found.max()) < 1.21


def test_newton_schulz_is_the_textbook_iteration_bit_by_bit() -> None:
    matrix = gaussian(3, 40, 24).float()
    X = matrix.mT / matrix.mT.abs().amax(dim=(-2, -1), keepdim=True)
    X = X / torch.linalg.matrix_norm(X, keepdim=True)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * (A @ A)) @ X
    assert torch.equal(orthogonalize(matrix), X.mT)


# ------------------------------------------------------------------ Polar Express: the nuclear norm


@pytest.mark.parametrize("name", SPECTRA)
def test_polar_express_falls_short_of_the_nuclear_norm_by_no_more_than_it_promises(name: str) -> None:
    matrix = SPECTRA[name]()
    deficit, bound, nuclear = deficit_and_bound(matrix, orthogonalize(matrix, schedule=POLAR_EXPRESS_7))
    # The coefficients have seven digits, so p(1) is 1 to 2e-9 only.
    assert -1e-8 * nuclear <= deficit <= bound


@pytest.mark.parametrize("name", SPECTRA)
def test_polar_express_keeps_its_promise_in_float32(name: str) -> None:
    matrix = SPECTRA[name]().float()
    deficit, bound, nuclear = deficit_and_bound(matrix, orthogonalize(matrix, schedule=POLAR_EXPRESS_7))
    # Rounding: 2^-24 per product of the last step, which does not average out: 3e-7 is seen.
    assert -1e-6 * nuclear <= deficit <= bound + 1e-6 * nuclear


@pytest.mark.parametrize("name", SPECTRA)
def test_iterating_in_bfloat16_moves_the_nuclear_norm_by_two_thousandths(name: str) -> None:
    matrix = SPECTRA[name]().float()
    found = orthogonalize(matrix, schedule=POLAR_EXPRESS_7, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    deficit, bound, nuclear = deficit_and_bound(matrix, found)
    assert -2e-3 * nuclear <= deficit <= bound + 2e-3 * nuclear


@pytest.mark.parametrize("name", ["well conditioned", "wide gaussian", "low rank and noise"])
def test_polar_express_is_the_polar_factor_where_no_singular_value_is_tiny(name: str) -> None:
    matrix = SPECTRA[name]()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    # |p - 1| <= 4e-7 for singular values above 1e-3 of the norm.
    assert torch.allclose(orthogonalize(matrix, schedule=POLAR_EXPRESS_7), left @ right, atol=4e-7)


def test_polar_express_is_exact_for_a_matrix_of_rank_one() -> None:
    # The largest singular value is the norm itself, the far end of the interval of the fit.
    matrix = gaussian(30, 1) @ gaussian(1, 50, seed=1)
    deficit, _, nuclear = deficit_and_bound(matrix, orthogonalize(matrix, schedule=POLAR_EXPRESS_7))
    assert abs(deficit) <= 1e-8 * nuclear


# ------------------------------------------------------------------ both


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_singular_vectors_are_kept(schedule: OrthogonalizationSchedule) -> None:
    matrix = with_singular_values(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 3, 5)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.mT @ orthogonalize(matrix, schedule=schedule) @ right.mT
    assert torch.allclose(core, torch.diag(core.diagonal()), atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e30])
def test_the_scale_of_the_input_does_not_matter(scale: float, schedule: OrthogonalizationSchedule) -> None:
    matrix = gaussian(6, 9, seed=1).float()
    found = orthogonalize(scale * matrix, schedule=schedule)
    assert torch.allclose(found, orthogonalize(matrix, schedule=schedule), atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_batch_is_orthogonalized_matrix_by_matrix_and_zero_stays_zero(schedule: OrthogonalizationSchedule) -> None:
    batch = gaussian(3, 5, 8, seed=2).float()
    batch[1] = 0
    found = orthogonalize(batch, schedule=schedule)
    assert torch.equal(found[1], torch.zeros(5, 8))
    assert torch.allclose(found[2], orthogonalize(batch[2], schedule=schedule), atol=1e-6)


@pytest.mark.parametrize("side", [24, 260])
def test_small_and_large_matrices_of_a_batch_equal_one_by_one(side: int) -> None:
    batch = gaussian(3, side, side + 40, seed=3)
    found = orthogonalize(batch, schedule=POLAR_EXPRESS_7)
    alone = torch.stack([orthogonalize(matrix, schedule=POLAR_EXPRESS_7) for matrix in batch])
    assert torch.allclose(found, alone, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [(40, 24), (2, 300, 260)])
def test_a_tall_matrix_is_the_transpose_of_a_wide_one(
    shape: tuple[int, ...], schedule: OrthogonalizationSchedule
) -> None:
    tall = gaussian(*shape, seed=4)
    wide = tall.mT.contiguous()
    found = orthogonalize(tall, schedule=schedule)
    assert found.shape == tall.shape
    assert torch.allclose(found, orthogonalize(wide, schedule=schedule).mT, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_input_is_left_alone_and_nan_stays_in_its_matrix(schedule: OrthogonalizationSchedule) -> None:
    batch = gaussian(2, 4, 6, seed=5)
    batch[0, 1, 2] = float("nan")
    before = batch.clone()
    found = orthogonalize(batch, schedule=schedule)
    assert torch.equal(batch.nan_to_num(99), before.nan_to_num(99))
    assert found[0].isnan().all()
    assert torch.allclose(found[1], orthogonalize(batch[1], schedule=schedule), atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_read_on_the_host(schedule: OrthogonalizationSchedule) -> None:
    # A meta tensor has no values: reading one raises.
    found = orthogonalize(torch.empty(3, 300, 260, device="meta"), schedule=schedule, dtype=torch.bfloat16)
    assert found.shape == (3, 300, 260)
