from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gns_controller.core.errors import GeometryError, InvalidInputError
from tests.benchmarks.kernels import SCHEDULES as BY_NAME
from tests.benchmarks.kernels import gaussian, textbook_newton_schulz, with_singular_values
from trainer_hooks.kernels import (
    EXACT,
    POLAR_EXPRESS_4,
    POLAR_EXPRESS_7,
    Evaluation,
    OrthogonalizationSchedule,
    orthogonalize,
)

SCHEDULES = [pytest.param(schedule, id=name) for name, schedule in BY_NAME.items()]
POLYNOMIAL = [pytest.param(schedule, id=name) for name, schedule in BY_NAME.items() if schedule.coefficients]
EVALUATIONS: tuple[Evaluation, ...] = ("direct", "gram")


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


def deficit_and_bound(matrix: Tensor, factor: Tensor) -> tuple[float, float, float]:
    """||G||_S1 - <G, found>, what POLAR_EXPRESS_7 promises of it in exact arithmetic, and ||G||_S1."""
    values = torch.linalg.svdvals(matrix.double())
    nuclear, f = float(values.sum()), 1.01 * float((values**4).sum().sqrt().sqrt())
    return nuclear - float((matrix.double() * factor.double()).sum()), 4e-7 * nuclear + 8e-5 * len(values) * f, nuclear


# ------------------------------------------------------------------ Newton-Schulz: a band, not convergence


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (12, 40), (40, 12)])
def test_singular_values_land_in_the_published_band(rows: int, columns: int) -> None:
    # Band of the five Jordan steps for inputs from 3e-3 of the Frobenius norm upwards: [0.682, 1.202].
    values = torch.logspace(-2.4, 0, 12, dtype=torch.float64)
    matrix = with_singular_values(values, rows, columns)
    singular_values = torch.linalg.svdvals(orthogonalize(matrix))
    assert float(singular_values.min()) > 0.68
    assert float(singular_values.max()) < 1.21


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 300, 260), (600, 530)])
def test_newton_schulz_is_the_textbook_iteration(shape: tuple[int, ...], evaluation: Evaluation) -> None:
    matrix = gaussian(*shape).float()
    expected = textbook_newton_schulz(matrix.mT).mT
    factor = orthogonalize(matrix, evaluation=evaluation)
    # Entries are about 1/sqrt(600) = 4e-2, and two orders of evaluation differ by some 2e-6 (direct) or 3e-5 (gram) of
    # one; both are products of float32 roundings with slopes of up to 485.
    assert float((factor - expected).abs().max()) < 1e-5


# ------------------------------------------------------------------ Polar Express: the nuclear norm


@pytest.mark.parametrize("name", SPECTRA)
def test_polar_express_falls_short_of_the_nuclear_norm_within_its_bound(name: str) -> None:
    matrix = SPECTRA[name]()
    deficit, bound, nuclear = deficit_and_bound(matrix, orthogonalize(matrix, schedule=POLAR_EXPRESS_7))
    # The coefficients have seven digits, so p(1) is 1 to 2e-9 only.
    assert -1e-8 * nuclear <= deficit <= bound


@pytest.mark.parametrize("name", SPECTRA)
def test_polar_express_keeps_its_bound_in_float32(name: str) -> None:
    matrix = SPECTRA[name]().float()
    deficit, bound, nuclear = deficit_and_bound(matrix, orthogonalize(matrix, schedule=POLAR_EXPRESS_7))
    # Rounding: 2^-24 per product of the last step, which does not average out: 3e-7 is seen.
    assert -1e-6 * nuclear <= deficit <= bound + 1e-6 * nuclear


@pytest.mark.parametrize("name", SPECTRA)
def test_iterating_in_bfloat16_moves_the_nuclear_norm_by_two_thousandths(name: str) -> None:
    matrix = SPECTRA[name]().float()
    factor = orthogonalize(matrix, schedule=POLAR_EXPRESS_7, dtype=torch.bfloat16)
    assert factor.dtype == torch.float32
    deficit, bound, nuclear = deficit_and_bound(matrix, factor)
    assert -2e-3 * nuclear <= deficit <= bound + 2e-3 * nuclear


@pytest.mark.parametrize("name", ["well conditioned", "wide gaussian", "low rank and noise"])
def test_polar_express_is_the_polar_factor_without_tiny_singular_values(name: str) -> None:
    matrix = SPECTRA[name]()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    # |p - 1| <= 4e-7 for singular values above 1e-3 of the norm.
    assert torch.allclose(orthogonalize(matrix, schedule=POLAR_EXPRESS_7), left @ right, atol=4e-7)


def test_polar_express_is_exact_for_a_matrix_of_rank_one() -> None:
    # The largest singular value is the norm itself, the far end of the interval of the fit.
    matrix = gaussian(30, 1) @ gaussian(1, 50, seed=1)
    deficit, _, nuclear = deficit_and_bound(matrix, orthogonalize(matrix, schedule=POLAR_EXPRESS_7))
    assert abs(deficit) <= 1e-8 * nuclear


# ------------------------------------------------------------------ every schedule


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("schedule", POLYNOMIAL)
def test_singular_values_go_through_the_polynomials(
    schedule: OrthogonalizationSchedule, evaluation: Evaluation
) -> None:
    values = torch.logspace(-4, 0, 30, dtype=torch.float64)
    matrix = with_singular_values(values, 30, 70)
    fourth = float((values**4).sum()) ** 0.25
    f = schedule.norm_margin * (fourth if schedule.normalization == "gram" else float(values.norm()))
    expected = values / f
    for a, b, c in schedule.coefficients:
        expected = a * expected + b * expected**3 + c * expected**5
    left, _ = torch.linalg.qr(gaussian(30, 30, seed=0))
    right, _ = torch.linalg.qr(gaussian(70, 30, seed=1))
    core = left.mT @ orthogonalize(matrix, schedule=schedule, evaluation=evaluation) @ right
    assert torch.allclose(core, torch.diag(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("schedule", POLYNOMIAL)
@pytest.mark.parametrize("name", SPECTRA)
def test_float32_differs_by_rounding_alone_however_it_is_evaluated(
    name: str, schedule: OrthogonalizationSchedule, evaluation: Evaluation
) -> None:
    matrix = SPECTRA[name]()
    exact = orthogonalize(matrix, schedule=schedule, evaluation="direct")
    factor = orthogonalize(matrix.float(), schedule=schedule, evaluation=evaluation)
    # Rounding of 2^-23 of the norm, times the slope of the polynomial at 0, the product of its first coefficients: 500
    # to 1000 in five steps, up to 8e4 in ten, of which values that have arrived keep little. On the Gram matrix squares
    # are rounded, two steep steps earlier.
    slope = math.prod(first for first, _, _ in schedule.coefficients)
    bound = min(2**-23 * slope * {"direct": 1, "gram": 4}[evaluation], 3e-3)
    assert float(torch.linalg.matrix_norm(factor.double() - exact, ord=2)) < bound


def test_auto_evaluates_on_the_gram_matrix_only_where_it_pays() -> None:
    long, square = gaussian(128, 256).float(), gaussian(256, 256).float()

    def chosen(matrix: Tensor, schedule: OrthogonalizationSchedule) -> list[bool]:
        factor = orthogonalize(matrix, schedule=schedule)
        return [torch.equal(factor, orthogonalize(matrix, schedule=schedule, evaluation=name)) for name in EVALUATIONS]

    assert chosen(long, POLAR_EXPRESS_4) == [False, True]
    assert chosen(square, POLAR_EXPRESS_4) == [True, False]
    assert chosen(long, POLAR_EXPRESS_7) == [True, False]


def test_exact_is_the_polar_factor_and_gives_zero_where_rounding_begins() -> None:
    values = torch.tensor([1.0, 1e-3, 3e-6, 0.8e-6], dtype=torch.float64)
    # eps * L * s_max is 2^-23 * 8 = 9.5e-7 for float32.
    matrix = torch.zeros(4, 8, dtype=torch.float64)
    matrix.diagonal().copy_(values)
    factor = orthogonalize(matrix.float(), schedule=EXACT)
    expected = torch.eye(4, 8)
    expected[3, 3] = 0
    assert torch.allclose(factor, expected, atol=1e-7)
    # In float64 all of them count.
    assert torch.allclose(orthogonalize(matrix, schedule=EXACT), torch.eye(4, 8, dtype=torch.float64))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e30])
def test_the_scale_of_the_input_does_not_matter(
    scale: float, dtype: torch.dtype, schedule: OrthogonalizationSchedule
) -> None:
    # A power of two near it, so that scaling rounds nothing.
    matrix = gaussian(6, 9, seed=1).to(dtype)
    scaled = matrix * 2.0 ** round(math.log2(scale))
    assert torch.equal(orthogonalize(scaled, schedule=schedule), orthogonalize(matrix, schedule=schedule))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero(dtype: torch.dtype, schedule: OrthogonalizationSchedule) -> None:
    batch = gaussian(3, 5, 8, seed=2).to(dtype)
    batch[1] = 0
    assert torch.equal(orthogonalize(batch, schedule=schedule)[1], torch.zeros(5, 8, dtype=dtype))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 260, 300), (2, 520, 530), (2, 3, 8, 5), (1, 4, 9), (2, 1, 12, 12)])
def test_a_batch_equals_its_matrices_one_by_one(shape: tuple[int, ...], schedule: OrthogonalizationSchedule) -> None:
    batch = gaussian(*shape, seed=3)
    factor = orthogonalize(batch, schedule=schedule)
    assert factor.shape == shape
    alone = [orthogonalize(matrix, schedule=schedule) for matrix in batch.flatten(0, -3)]
    assert torch.allclose(factor.flatten(0, -3), torch.stack(alone), atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [(40, 24), (2, 300, 260), (2, 3, 9, 4)])
def test_a_tall_matrix_is_the_transpose_of_a_wide_one(
    shape: tuple[int, ...], schedule: OrthogonalizationSchedule
) -> None:
    tall = gaussian(*shape, seed=4)
    wide = tall.mT.contiguous()
    factor = orthogonalize(tall, schedule=schedule)
    assert factor.shape == tall.shape
    assert torch.allclose(factor, orthogonalize(wide, schedule=schedule).mT, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_layout_of_the_input_does_not_matter(schedule: OrthogonalizationSchedule) -> None:
    whole = gaussian(6, 9, 14, seed=6)
    expected = orthogonalize(whole[::2, 1:8, ::3].contiguous(), schedule=schedule)
    assert torch.allclose(orthogonalize(whole[::2, 1:8, ::3], schedule=schedule), expected, atol=1e-10)
    repeated = orthogonalize(whole[:1].expand(3, 9, 14), schedule=schedule)
    assert torch.allclose(repeated, orthogonalize(whole[:1], schedule=schedule).expand(3, 9, 14), atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_the_input_is_left_alone_and_nan_stays_in_its_matrix(hole: float, schedule: OrthogonalizationSchedule) -> None:
    batch = gaussian(2, 4, 6, seed=5)
    batch[0, 1, 2] = hole
    before = batch.clone()
    factor = orthogonalize(batch, schedule=schedule)
    assert torch.equal(batch.nan_to_num(99), before.nan_to_num(99))
    assert factor[0].isnan().all()
    assert torch.allclose(factor[1], orthogonalize(batch[1], schedule=schedule), atol=1e-10)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("schedule", POLYNOMIAL)
def test_orthogonalize_reads_nothing_on_the_host(schedule: OrthogonalizationSchedule, evaluation: Evaluation) -> None:
    # A fake tensor has no values: reading one raises.
    with FakeTensorMode():
        for shape in ((3, 30, 26), (2, 530, 600)):
            factor = orthogonalize(torch.empty(shape), schedule=schedule, evaluation=evaluation)
            assert factor.shape == shape
    factor = orthogonalize(torch.empty(3, 300, 260, device="meta"), schedule=schedule, dtype=torch.bfloat16)
    assert factor.shape == (3, 300, 260)


def test_matrices_without_entries_come_back_as_they_are() -> None:
    for shape in ((0, 4, 6), (4, 0)):
        assert orthogonalize(torch.empty(shape)).shape == shape


@pytest.mark.parametrize(
    ("matrix", "settings", "message"),
    [
        (torch.ones(3, 3, dtype=torch.float16), {}, "float32, float64 or bfloat16"),
        (torch.ones(3, 3), {"dtype": torch.float16}, "float32, float64 or bfloat16"),
        (torch.ones(3, 3), {"schedule": EXACT, "dtype": torch.bfloat16}, "EXACT not in bfloat16"),
        (torch.ones(3, 3), {"evaluation": "fast"}, "none of auto, direct, gram"),
        (torch.ones(3, 3), {"schedule": EXACT, "evaluation": "gram"}, "no meaning for EXACT"),
        (torch.ones(3, 3), {"dtype": torch.bfloat16, "evaluation": "gram"}, "rounding would take over"),
    ],
)
def test_orthogonalize_refuses_dtypes_and_evaluations_that_do_not_fit(
    matrix: Tensor, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        orthogonalize(matrix, **settings)


def test_orthogonalize_refuses_a_vector() -> None:
    with pytest.raises(GeometryError, match=r"\(\.\.\., M, N\), got shape \(3,\)"):
        orthogonalize(torch.ones(3))
