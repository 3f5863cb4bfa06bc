"""The spectral sums against singular value decompositions in float64, exact and by matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gns_controller.core.errors import GeometryError, InvalidInputError
from tests.benchmarks.measurement_cost import LiveBytes
from trainer_hooks.estimators import spectral
from trainer_hooks.estimators.spectral import SpectralNorms

NORMS: list[SpectralNorms] = ["exact", "polar_express"]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank_and_noise(rows: int, columns: int, *, seed: int) -> Tensor:
    """Like a real layer's gradient: a few strong directions that two halves share, and noise of their own."""
    shared = gaussian(rows, 5) @ gaussian(5, columns, seed=1)
    return shared + 0.5 * gaussian(rows, columns, seed=10 + seed)


def ill_conditioned(size: int, *, seed: int) -> Tensor:
    left, right = torch.linalg.qr(gaussian(size, size, seed=seed))[0], torch.linalg.qr(gaussian(size, size, seed=9))[0]
    matrix: Tensor = (left * torch.logspace(-6, 0, size, dtype=torch.float64)) @ right
    return matrix


HALVES: dict[str, Callable[[int], Tensor]] = {
    "gaussian": lambda seed: gaussian(96, 256, seed=seed),
    "gaussian, square": lambda seed: gaussian(128, 128, seed=seed),
    "low rank and noise, attention": lambda seed: low_rank_and_noise(96, 96, seed=seed),
    "low rank and noise, gate": lambda seed: low_rank_and_noise(256, 96, seed=seed),
    "low rank and noise, down": lambda seed: low_rank_and_noise(96, 256, seed=seed),
    "large": lambda seed: low_rank_and_noise(256, 300, seed=seed),
    "ill conditioned": lambda seed: ill_conditioned(96, seed=seed),
}


def numpy_sums(half_a: Tensor, half_b: Tensor) -> np.ndarray:
    """Written from the definition, in float64."""
    a, b = half_a.double().numpy(), half_b.double().numpy()
    (left_a, values_a, right_a), (left_b, values_b, right_b) = (np.linalg.svd(g, full_matrices=False) for g in (a, b))
    noise = np.linalg.svd(a - b, compute_uv=False).sum()
    return np.array(
        [
            noise,
            values_a.sum(),
            values_b.sum(),
            ((left_a @ right_a) * b).sum(),
            ((left_b @ right_b) * a).sum(),
        ]
    )


def promise(matrix: Tensor) -> float:
    """What POLAR_EXPRESS_7 may fall short of the nuclear norm by, in exact arithmetic."""
    values = torch.linalg.svdvals(matrix.double())
    f = 1.01 * float((values**4).sum().sqrt().sqrt())
    return 4e-7 * float(values.sum()) + 8e-5 * len(values) * f


# ------------------------------------------------------------------ against the definition


@pytest.mark.parametrize("name", HALVES)
def test_exact_sums_are_those_of_the_definition(name: str) -> None:
    half_a, half_b = HALVES[name](1), HALVES[name](2)
    found = spectral.split_sums(half_a, half_b, half_a - half_b)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), numpy_sums(half_a, half_b), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polar_express_sums_are_within_the_stated_bound_of_the_definition(name: str, dtype: torch.dtype) -> None:
    half_a, half_b = HALVES[name](1).to(dtype), HALVES[name](2).to(dtype)
    found = spectral.split_sums(half_a, half_b, half_a - half_b, norms="polar_express").numpy()
    expected = numpy_sums(half_a, half_b)
    rounding = 1e-6 if dtype == torch.float32 else 1e-8
    for index, matrix in enumerate((half_a - half_b, half_a, half_b)):
        assert -rounding * expected[index] <= expected[index] - found[index]
        assert expected[index] - found[index] <= promise(matrix) + rounding * expected[index]


def weak_progress(half: Tensor, target: Tensor) -> float:
    """Progress along directions that POLAR_EXPRESS_7 counts in part, singular values below 1e-3 f, all of one sign."""
    left, values, right = torch.linalg.svd(half, full_matrices=False)
    weak = values < 1e-3 * 1.01 * (values**4).sum() ** 0.25
    along = (left.mT @ target @ right.mT).diagonal().abs()
    return float(along[weak].sum() + 4e-7 * along.sum())


@pytest.mark.parametrize("name", HALVES)
def test_polar_express_progress_differs_by_the_weak_directions_only(name: str) -> None:
    half_a, half_b = HALVES[name](1), HALVES[name](2)
    found = spectral.split_sums(half_a, half_b, half_a - half_b, norms="polar_express").numpy()
    expected = numpy_sums(half_a, half_b)
    assert abs(found[3] - expected[3]) <= weak_progress(half_a, half_b)
    assert abs(found[4] - expected[4]) <= weak_progress(half_b, half_a)


def test_both_ways_agree_on_a_matrix_of_rank_one() -> None:
    # Directions that are rounding must not count: U V^T of rank one is u v^T, and progress has a closed form.
    u, v, w = gaussian(40, 1), gaussian(1, 60, seed=1), gaussian(1, 60, seed=2)
    half_a, half_b = u @ v, u @ w
    norm_u, norm_v, norm_w = (float(vector.norm()) for vector in (u, v, w))
    inner = norm_u * float((v * w).sum())
    expected = [norm_u * float((v - w).norm()), norm_u * norm_v, norm_u * norm_w, inner / norm_v, inner / norm_w]
    for norms in NORMS:
        found = spectral.split_sums(half_a, half_b, half_a - half_b, norms=norms)
        # float64 rounding in the null directions is lifted 4e3 times by the polynomials.
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8)


@pytest.mark.parametrize("norms", NORMS)
def test_zero_gradients_have_no_norm_and_make_no_progress(norms: SpectralNorms) -> None:
    zero = torch.zeros(2, 6, 4)
    assert torch.equal(spectral.split_sums(zero, zero, zero, norms=norms), torch.zeros(5, dtype=torch.float64))
    assert torch.equal(spectral.progress_sums(zero, zero, norms=norms), torch.zeros(2, dtype=torch.float64))


# ------------------------------------------------------------------ invariance, batches, targets


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 1000), scale=st.floats(-12, 12))
@pytest.mark.parametrize("norms", NORMS)
def test_rotations_of_rows_and_columns_change_nothing(
    norms: SpectralNorms, rows: int, columns: int, seed: int, scale: float
) -> None:
    left, right = torch.linalg.qr(gaussian(rows, rows, seed=seed))[0], torch.linalg.qr(gaussian(columns, columns))[0]
    half_a, half_b = (10**scale * gaussian(rows, columns, seed=seed + i) for i in (1, 2))
    turned_a, turned_b = left @ half_a @ right, left @ half_b @ right
    found = spectral.split_sums(half_a, half_b, half_a - half_b, norms=norms)
    turned = spectral.split_sums(turned_a, turned_b, turned_a - turned_b, norms=norms)
    np.testing.assert_allclose(turned.numpy(), found.numpy(), rtol=0, atol=1e-9 * float(found[1:3].max()))


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_batch_gives_the_sum_over_its_matrices(norms: SpectralNorms, shape: tuple[int, int]) -> None:
    half_a, half_b, target_a, target_b = (gaussian(3, *shape, seed=seed) for seed in range(4))
    batched = spectral.split_sums(half_a, half_b, half_a - half_b, target_a=target_a, target_b=target_b, norms=norms)
    singles = [
        spectral.split_sums(a, b, a - b, target_a=to_a, target_b=to_b, norms=norms)
        for a, b, to_a, to_b in zip(half_a, half_b, target_a, target_b, strict=True)
    ]
    assert torch.allclose(batched, torch.stack(singles).sum(0), rtol=1e-10)
    progress = [spectral.progress_sums(a, b, norms=norms) for a, b in zip(half_a, half_b, strict=True)]
    assert torch.allclose(spectral.progress_sums(half_a, half_b, norms=norms), torch.stack(progress).sum(0))
    covariance = half_a[..., :12, :12] @ half_a[..., :12, :12].mT
    spreads = [spectral.spread_sums(b, c, norms=norms) for b, c in zip(half_b, covariance, strict=True)]
    assert torch.allclose(spectral.spread_sums(half_b, covariance, norms=norms), torch.stack(spreads).sum(0))


@pytest.mark.parametrize("norms", NORMS)
def test_targets_judge_the_directions_and_leave_the_norms_alone(norms: SpectralNorms) -> None:
    half_a, half_b, target_a, target_b = (gaussian(8, 14, seed=seed) for seed in range(4))
    plain = spectral.split_sums(half_a, half_b, half_a - half_b, norms=norms)
    judged = spectral.split_sums(half_a, half_b, half_a - half_b, target_a=target_a, target_b=target_b, norms=norms)
    assert torch.equal(judged[:3], plain[:3])
    assert float(judged[3]) == pytest.approx(float(spectral.progress_sums(half_a, target_b, norms=norms)[0]))
    assert float(judged[4]) == pytest.approx(float(spectral.progress_sums(half_b, target_a, norms=norms)[0]))
    only_b = spectral.split_sums(half_a, half_b, half_a - half_b, target_b=target_b, norms=norms)
    assert torch.equal(only_b, torch.stack([*judged[:4], plain[4]]))


@pytest.mark.parametrize("norms", NORMS)
def test_progress_of_a_matrix_on_itself_is_its_nuclear_norm(norms: SpectralNorms) -> None:
    matrix = gaussian(3, 10, 7)
    expected = float(np.linalg.svd(matrix.numpy(), compute_uv=False).sum())
    assert spectral.progress_sums(matrix, matrix, norms=norms).tolist() == pytest.approx([expected, 0], rel=1e-6)
    assert float(spectral.nuclear_norm(matrix, norms=norms)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("norms", NORMS)
def test_spread_sums_are_the_trace_of_a_root_and_a_nuclear_norm(norms: SpectralNorms) -> None:
    # C = diag(9, 4, 0): tr C^(1/2) = 5. A slightly negative eigenvalue is rounding and counts as zero.
    covariance = torch.diag(torch.tensor([9.0, 4.0, -1e-18], dtype=torch.float64))
    mean = torch.diag(torch.tensor([2.0, 1.0, 0.5]))
    assert spectral.spread_sums(mean, covariance, norms=norms).tolist() == pytest.approx([5, 3.5], rel=1e-6)


# ------------------------------------------------------------------ what the caller relies on


def test_polar_express_reads_nothing_on_the_host() -> None:
    # A meta tensor has no values: reading one raises.
    half = torch.empty(2, 300, 260, device="meta")
    assert spectral.split_sums(half, half, half, target_a=half, norms="polar_express").shape == (5,)
    assert spectral.progress_sums(half, half, norms="polar_express").shape == (2,)


def test_polar_express_turns_nan_into_nan() -> None:
    half_a, half_b = gaussian(6, 9), gaussian(6, 9, seed=1)
    half_b[0, 0] = math.nan
    found = spectral.split_sums(half_a, half_b, half_a - half_b, norms="polar_express")
    assert found.isnan().tolist() == [True, False, True, True, True]


def test_what_is_no_matrix_and_what_is_no_way_are_refused() -> None:
    vector, matrix = torch.ones(3), torch.ones(3, 3)
    for norms in NORMS:
        with pytest.raises(GeometryError, match="2-D tensors, got shape \\(3,\\)"):
            spectral.split_sums(vector, vector, vector, norms=norms)
    with pytest.raises(InvalidInputError, match="neither 'exact' nor 'polar_express'"):
        spectral.nuclear_norm(matrix, norms="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4, 96, 160), (160, 96), (2, 256, 256), (256, 700)])
def test_temporary_memory_stays_below_the_stated_bound(shape: tuple[int, ...]) -> None:
    half_a, half_b = gaussian(*shape).float(), gaussian(*shape, seed=1).float()
    difference = half_a - half_b
    with LiveBytes() as live:
        spectral.split_sums(half_a, half_b, difference, norms="polar_express")
    assert 0.4 * spectral.split_temporary_bytes(half_a) < live.peak <= spectral.split_temporary_bytes(half_a)
