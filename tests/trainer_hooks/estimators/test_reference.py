"""The estimators against closed forms, published vectors and an independent NumPy implementation."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gns_controller.core.contract import Geometry
from gns_controller.core.errors import GeometryError, InvalidInputError, TooFewGroupsError
from tests.benchmarks.problems import LinearRegression, signal, textbook_noise
from trainer_hooks.estimators import rank_variance, split

GEOMETRIES: list[Geometry] = ["euclidean", "sign", "spectral"]


def random_groups(
    num_groups: int, seed: int = 0, shapes: tuple[tuple[int, int], ...] = ((5, 3), (4, 9))
) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mean = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [
        [centre + torch.randn(centre.shape, generator=generator, dtype=torch.float64) for centre in mean]
        for _ in range(num_groups)
    ]


def numpy_dual_norm(tensors: list[np.ndarray], geometry: Geometry) -> float:
    if geometry == "euclidean":
        return math.sqrt(sum(float((tensor**2).sum()) for tensor in tensors))
    if geometry == "sign":
        return sum(float(np.abs(tensor).sum()) for tensor in tensors)
    return sum(float(np.linalg.norm(tensor, "nuc")) for tensor in tensors)


def numpy_rank_variance(groups: list[list[np.ndarray]], sizes: list[float], geometry: Geometry) -> tuple[float, float]:
    """Written from the formulas: per-sample covariances from groups of unequal size, roots by eigendecomposition."""
    total, num_groups = sum(sizes), len(groups)
    means: list[np.ndarray] = [
        np.tensordot(sizes, np.stack([group[t] for group in groups]), 1) / total for t in range(len(groups[0]))
    ]
    noise = 0.0
    for index, mean in enumerate(means):
        deviations = [group[index] - mean for group in groups]
        if geometry == "spectral":
            if mean.shape[0] > mean.shape[1]:
                deviations = [deviation.T for deviation in deviations]
            covariance = np.sum([n * d @ d.T for n, d in zip(sizes, deviations, strict=True)], 0) / (num_groups - 1)
            noise += float(np.sqrt(np.clip(np.linalg.eigvalsh(covariance), 0, None)).sum())
        else:
            variance = np.sum([n * d**2 for n, d in zip(sizes, deviations, strict=True)], 0) / (num_groups - 1)
            noise += float(variance.sum()) if geometry == "euclidean" else float(np.sqrt(variance).sum())
    return (noise if geometry == "euclidean" else noise**2), numpy_dual_norm(means, geometry) ** 2


def numpy_split(
    half_a: list[np.ndarray], half_b: list[np.ndarray], n_a: float, n_b: float, geometry: Geometry
) -> tuple[float, float, float]:
    noise_sq = numpy_dual_norm([a - b for a, b in zip(half_a, half_b, strict=True)], geometry) ** 2 / (
        1 / n_a + 1 / n_b
    )

    def inner(of: list[np.ndarray], along: list[np.ndarray]) -> float:
        if geometry == "euclidean":
            directions = [tensor / numpy_dual_norm(of, "euclidean") for tensor in of]
        elif geometry == "sign":
            directions = [np.sign(tensor) for tensor in of]
        else:
            directions = []
            for tensor in of:
                left, _, right = np.linalg.svd(tensor, full_matrices=False)
                directions.append(left @ right)
        return sum(float((d * g).sum()) for d, g in zip(directions, along, strict=True))

    progress = 0.5 * (inner(half_a, half_b) + inner(half_b, half_a))
    mean_norm = 0.5 * (numpy_dual_norm(half_a, geometry) + numpy_dual_norm(half_b, geometry))
    return noise_sq, mean_norm * progress, progress


def as_numpy(groups: list[list[Tensor]]) -> list[list[np.ndarray]]:
    return [[tensor.numpy() for tensor in group] for group in groups]


def scalars(*values: float) -> list[list[Tensor]]:
    return [[torch.tensor([value], dtype=torch.float64)] for value in values]


# ------------------------------------------------------------------ small vectors with answers by hand


def test_four_scalars_give_the_noise_and_signal_computed_by_hand() -> None:
    found = rank_variance(scalars(0, 2, 4, 6), [1, 1, 1, 1], geometry="euclidean")
    assert float(found.noise_sq) == pytest.approx(20 / 3)
    assert float(found.signal_sq) == pytest.approx(9)
    assert float(found.noise_scale) == pytest.approx(20 / 27)
    assert found.unbiased_signal_sq is not None
    assert float(found.noise_sq / found.unbiased_signal_sq) == pytest.approx(10 / 11)


def test_diagonal_matrices_give_the_spectral_noise_computed_by_hand() -> None:
    base = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    bumps = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
    groups = [[base + torch.diag(torch.tensor(bump, dtype=torch.float64))] for bump in bumps]
    found = rank_variance(groups, [1] * 4, geometry="spectral")
    assert float(found.noise_sq) == pytest.approx(8 / 3)
    assert float(found.noise_scale) == pytest.approx(8 / 27)


def test_two_halves_of_scalars_give_the_split_computed_by_hand() -> None:
    # A = mean(0, 2) = 1, B = mean(4, 6) = 5: noise^2 = 4^2 / (1/2 + 1/2), progress = (5 + 1) / 2, signal^2 = 3 * 3.
    found = split(scalars(0, 2), scalars(4, 6), [1, 1], [1, 1], geometry="sign")
    assert [float(found.noise_sq), float(found.progress or 0), float(found.signal_sq)] == pytest.approx([16, 3, 9])


def test_a_large_mean_does_not_drown_the_noise() -> None:
    groups = [[10_000 + torch.tensor([value])] for value in (-1.0, 1.0, -1.0, 1.0)]
    assert float(rank_variance(groups, [1] * 4, geometry="sign").noise_sq) == pytest.approx(4 / 3)


# ------------------------------------------------------------------ an independent implementation


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [1, 3, 2, 7]])
def test_rank_variance_equals_an_independent_implementation(geometry: Geometry, sizes: list[float]) -> None:
    groups = random_groups(4)
    found = rank_variance(groups, sizes, geometry=geometry)
    noise_sq, signal_sq = numpy_rank_variance(as_numpy(groups), sizes, geometry)
    assert float(found.noise_sq) == pytest.approx(noise_sq, rel=1e-10)
    assert float(found.signal_sq) == pytest.approx(signal_sq, rel=1e-10)
    assert float(found.noise_scale) == pytest.approx(noise_sq / signal_sq, rel=1e-10)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_split_equals_an_independent_implementation(geometry: Geometry) -> None:
    groups = random_groups(5)
    sizes_a, sizes_b = [2.0, 3.0], [1.0, 1.0, 6.0]
    found = split(groups[:2], groups[2:], sizes_a, sizes_b, geometry=geometry)
    arrays = as_numpy(groups)
    half_a = [np.average([g[t] for g in arrays[:2]], axis=0, weights=sizes_a) for t in range(2)]
    half_b = [np.average([g[t] for g in arrays[2:]], axis=0, weights=sizes_b) for t in range(2)]
    noise_sq, signal_sq, progress = numpy_split(half_a, half_b, 5, 8, geometry)
    assert float(found.noise_sq) == pytest.approx(noise_sq, rel=1e-10)
    assert float(found.signal_sq) == pytest.approx(signal_sq, rel=1e-10)
    assert float(found.progress or 0) == pytest.approx(progress, rel=1e-10)


def test_any_averaging_weights_keep_the_variance_unbiased() -> None:
    rng = np.random.default_rng(0)
    sizes, weights = [1, 2, 5], [1 / 3, 1 / 3, 1 / 3]
    estimates = []
    for _ in range(20_000):
        values = [float(rng.normal(0.3, 2 / math.sqrt(size))) for size in sizes]
        estimates.append(_weighted_variance(values, sizes, weights))
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - 4.0) < 4 * error
    groups = scalars(0.5, -1.0, 2.0)
    found = rank_variance(groups, sizes, geometry="euclidean", weights=weights)
    assert float(found.noise_sq) == pytest.approx(_weighted_variance([0.5, -1.0, 2.0], sizes, weights))


def _weighted_variance(values: list[float], sizes: list[int], weights: list[float]) -> float:
    mean = sum(w * x for w, x in zip(weights, values, strict=True))
    spread = sum(w * w / n for w, n in zip(weights, sizes, strict=True))
    degrees = sum(n * (1 / n - 2 * w / n + spread) for n, w in zip(sizes, weights, strict=True))
    return sum(n * (x - mean) ** 2 for n, x in zip(sizes, values, strict=True)) / degrees


# ------------------------------------------------------------------ unbiasedness, by simulation of a solved problem


def regression(*, signal: float, seed: int) -> LinearRegression:
    generator = torch.Generator().manual_seed(seed)
    return LinearRegression(signal * torch.randn(4, 6, generator=generator, dtype=torch.float64), noise=1.5, seed=seed)


def one_group(problem: LinearRegression, size: int) -> list[Tensor]:
    return [problem.groups(1, 1, size)[0][0, 0]]


def z_score(samples: list[float], truth: float) -> float:
    return float((np.mean(samples) - truth) / (np.std(samples, ddof=1) / math.sqrt(len(samples))))


@pytest.mark.slow
def test_euclidean_noise_and_debiased_signal_are_unbiased() -> None:
    problem = regression(signal=0.3, seed=1)
    noise_sq, signal_sq = textbook_noise(problem, "euclidean") ** 2, signal(problem, "euclidean") ** 2
    found = [
        rank_variance([one_group(problem, 4) for _ in range(4)], [4] * 4, geometry="euclidean") for _ in range(3000)
    ]
    assert abs(z_score([float(e.noise_sq) for e in found], noise_sq)) < 4
    assert abs(z_score([float(e.unbiased_signal_sq) for e in found if e.unbiased_signal_sq is not None], signal_sq)) < 4
    # The plug-in signal is not: it is high by tr C / B, which is what makes the published noise scale saturate.
    plug_in_bias = noise_sq / 16
    assert abs(z_score([float(e.signal_sq) for e in found], signal_sq + plug_in_bias)) < 4


@pytest.mark.slow
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_split_progress_is_unbiased_for_the_progress_of_a_half_batch(geometry: Geometry) -> None:
    problem = regression(signal=0.2, seed=2)
    direct, estimated = [], []
    for _ in range(3000):
        half_a, half_b = one_group(problem, 16), one_group(problem, 16)
        estimated.append(float(split([half_a], [half_b], [16], [16], geometry=geometry).progress or 0.0))
        # Truth without the estimator: the true gradient along the direction of an independent half batch.
        direction = one_group(problem, 16)[0]
        if geometry == "euclidean":
            direction = direction / direction.norm()
        elif geometry == "sign":
            direction = direction.sign()
        else:
            left, _, right = torch.linalg.svd(direction, full_matrices=False)
            direction = left @ right
        direct.append(float((problem.gradient[0] * direction).sum()))
    error = math.hypot(np.std(direct), np.std(estimated)) / math.sqrt(len(direct))
    assert abs(np.mean(direct) - np.mean(estimated)) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_split_noise_is_unbiased_for_the_error_of_the_mean_gradient(geometry: Geometry) -> None:
    # Gaussian noise, so that the error of the mean is symmetric and of the same shape at every batch.
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(3, 7, generator=generator, dtype=torch.float64) + 0.1
    noises, errors = [], []
    for _ in range(4000):
        draws = scale * torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) / math.sqrt(8)
        noises.append(float(split([[draws[0]]], [[draws[1]]], [8], [8], geometry=geometry).noise))
        fresh = scale * torch.randn(3, 7, generator=generator, dtype=torch.float64) / 4
        errors.append(4 * numpy_dual_norm([fresh.numpy()], geometry))
    error = math.hypot(np.std(noises), np.std(errors)) / math.sqrt(len(noises))
    assert abs(np.mean(noises) - np.mean(errors)) < 4 * error


@pytest.mark.parametrize(("num_groups", "published_factor"), [(2, 0.637), (4, 0.849), (8, 0.931), (16, 0.967)])
def test_sign_noise_of_few_groups_is_low_by_the_published_factor(num_groups: int, published_factor: float) -> None:
    generator = torch.Generator().manual_seed(4)
    groups = torch.randn(num_groups, 200_000, generator=generator, dtype=torch.float64)
    found = rank_variance([[group] for group in groups], [1] * num_groups, geometry="sign")
    # 200 000 independent coordinates: relative standard error of the sum below 0.2 %.
    assert float(found.noise_sq) / 200_000**2 == pytest.approx(published_factor, rel=5e-3)


# ------------------------------------------------------------------ properties


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000), geometry=st.sampled_from(GEOMETRIES))
def test_the_noise_scale_does_not_depend_on_the_scale_of_the_loss(scale: float, seed: int, geometry: Geometry) -> None:
    groups = random_groups(4, seed)
    scaled = [[scale * tensor for tensor in group] for group in groups]
    for estimate in (rank_variance, lambda g, s, geometry: split(g[:2], g[2:], s[:2], s[2:], geometry=geometry)):
        before, after = estimate(groups, [2] * 4, geometry=geometry), estimate(scaled, [2] * 4, geometry=geometry)
        assert float(after.noise_scale) == pytest.approx(float(before.noise_scale), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_spectral_readings_do_not_depend_on_the_basis(seed: int) -> None:
    groups = random_groups(4, seed, shapes=((4, 6),))
    left, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    turned = [[left @ tensor @ right for tensor in group] for group in groups]
    before, after = (rank_variance(g, [1] * 4, geometry="spectral") for g in (groups, turned))
    assert float(after.noise_sq) == pytest.approx(float(before.noise_sq), rel=1e-9)
    assert float(after.signal_sq) == pytest.approx(float(before.signal_sq), rel=1e-9)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_order_of_ranks_does_not_matter(geometry: Geometry) -> None:
    groups, sizes = random_groups(4), [1, 2, 3, 4]
    order = [2, 0, 3, 1]
    before = rank_variance(groups, sizes, geometry=geometry)
    after = rank_variance([groups[i] for i in order], [sizes[i] for i in order], geometry=geometry)
    assert float(after.noise_scale) == pytest.approx(float(before.noise_scale), rel=1e-12)


def test_two_ranks_spectral_noise_is_the_nuclear_norm_of_half_their_difference() -> None:
    groups = random_groups(2, shapes=((4, 6),))
    half_difference = (groups[0][0] - groups[1][0]).numpy() / 2
    found = rank_variance(groups, [3, 3], geometry="spectral")
    assert float(found.noise_sq) == pytest.approx(6 * np.linalg.norm(half_difference, "nuc") ** 2, rel=1e-10)


def test_the_shorter_side_is_the_convention() -> None:
    groups = random_groups(4, shapes=((3, 8),))
    transposed = [[tensor.mT for tensor in group] for group in groups]
    assert float(rank_variance(groups, [1] * 4, geometry="spectral").noise_sq) == pytest.approx(
        float(rank_variance(transposed, [1] * 4, geometry="spectral").noise_sq), rel=1e-12
    )


def test_norms_are_summed_over_tensors_before_they_are_squared() -> None:
    groups = random_groups(4)
    for geometry in ("sign", "spectral"):
        parts = [
            math.sqrt(float(rank_variance([[g[i]] for g in groups], [1] * 4, geometry=geometry).noise_sq))
            for i in range(2)
        ]
        whole = rank_variance(groups, [1] * 4, geometry=geometry)
        assert float(whole.noise_sq) == pytest.approx(sum(parts) ** 2, rel=1e-12)


def test_a_longer_signal_lowers_the_split_noise_scale() -> None:
    noise = random_groups(2, shapes=((4, 4),))
    signal = torch.randn(4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    scales = [
        float(
            split([[noise[0][0] + c * signal]], [[noise[1][0] + c * signal]], [8], [8], geometry="spectral").noise_scale
        )
        for c in (5.0, 10.0, 20.0, 40.0)
    ]
    assert all(earlier > later > 0 for earlier, later in pairwise(scales))


def test_a_rank_deficient_half_is_measured_on_the_directions_it_has() -> None:
    left, right = torch.eye(4, dtype=torch.float64)[:, :1], torch.eye(5, dtype=torch.float64)[:1]
    half_a, half_b = 3 * left @ right, 2 * left @ right
    found = split([[half_a]], [[half_b]], [1], [1], geometry="spectral")
    assert float(found.progress or 0) == pytest.approx((2 + 3) / 2)


# ------------------------------------------------------------------ bad input


def test_bad_input_gets_a_sentence() -> None:
    groups = random_groups(2)
    with pytest.raises(TooFewGroupsError, match="two sample groups or more, got 1"):
        rank_variance(groups[:1], [1], geometry="sign")
    with pytest.raises(TooFewGroupsError, match="a group in each half, got 0 and 2"):
        split([], groups, [], [1, 1], geometry="sign")
    with pytest.raises(GeometryError, match="not one of euclidean, sign, spectral"):
        rank_variance(groups, [1, 1], geometry="cubic")  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="no 2-D tensor"):
        rank_variance(scalars(1, 2), [1, 1], geometry="spectral")
    with pytest.raises(InvalidInputError, match="2 groups need 2 positive sizes"):
        rank_variance(groups, [1, 0], geometry="sign")
