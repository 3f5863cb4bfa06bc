"""What every estimator must do in every geometry, averaging over patterns, and the benchmark's own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gns_controller.core.contract import Geometry
from gns_controller.core.errors import InvalidInputError, TooFewGroupsError
from tests.benchmarks.estimator_accuracy import batched_split, batched_spread, block_signs
from tests.benchmarks.problems import (
    GEOMETRIES,
    GaussianNoise,
    LinearRegression,
    Population,
    dual_norm,
    signal,
    step_noise,
    textbook_noise,
)
from trainer_hooks.estimators import choose_patterns, progress_curve, rank_variance, split, split_over_patterns
from trainer_hooks.estimators.reference import Estimate

SHAPES = ((5, 3), (4, 9))
WALSH_4 = [[1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
Numbers = list[float]


def random_groups(num_groups: int, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mean = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [
        [centre + torch.randn(centre.shape, generator=generator, dtype=torch.float64) for centre in mean]
        for _ in range(num_groups)
    ]


def numbers(estimate: Estimate) -> Numbers:
    """noise, signal and, where there is one, progress, with the standard errors."""
    fields = (
        estimate.noise,
        estimate.signal,
        estimate.progress,
        estimate.noise_corrected,
        estimate.noise_standard_error,
        estimate.progress_standard_error,
    )
    return [float(field) for field in fields if field is not None]


def by_rank_variance(groups: list[list[Tensor]], sizes: Numbers, geometry: Geometry) -> Numbers:
    return numbers(rank_variance(groups, sizes, geometry=geometry))


def by_split(groups: list[list[Tensor]], sizes: Numbers, geometry: Geometry) -> Numbers:
    return numbers(split(groups[::2], groups[1::2], sizes[::2], sizes[1::2], geometry=geometry))


def by_patterns(groups: list[list[Tensor]], sizes: Numbers, geometry: Geometry) -> Numbers:
    return numbers(split_over_patterns(groups, sizes, WALSH_4, geometry=geometry))


def by_curve(groups: list[list[Tensor]], sizes: Numbers, geometry: Geometry) -> Numbers:
    return [float(progress) for _, progress in progress_curve(groups, sizes, geometry=geometry)]


ESTIMATORS: list[Callable[[list[list[Tensor]], Numbers, Geometry], Numbers]] = [
    by_rank_variance,
    by_split,
    by_patterns,
    by_curve,
]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)


# ------------------------------------------------------------------ properties


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 1000),
    geometry=st.sampled_from(GEOMETRIES),
    estimator=st.sampled_from(ESTIMATORS),
    sizes=st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_norms_and_progress_scale_with_the_loss(
    scale: float,
    seed: int,
    geometry: Geometry,
    estimator: Callable[[list[list[Tensor]], Numbers, Geometry], Numbers],
    sizes: list[int],
) -> None:
    groups = random_groups(4, seed)
    scaled = [[scale * tensor for tensor in group] for group in groups]
    before = [scale * number for number in estimator(groups, [*map(float, sizes)], geometry)]
    assert estimator(scaled, [*map(float, sizes)], geometry) == pytest.approx(before, rel=1e-9)


@every_estimator
@pytest.mark.parametrize("geometry", ["euclidean", "spectral"])
def test_euclidean_and_spectral_numbers_do_not_depend_on_the_basis(
    estimator: Callable[[list[list[Tensor]], Numbers, Geometry], Numbers], geometry: Geometry
) -> None:
    generator = torch.Generator().manual_seed(7)

    def rotation(size: int) -> Tensor:
        rotated: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        return rotated

    turns = [(rotation(rows), rotation(columns)) for rows, columns in SHAPES]
    groups, sizes = random_groups(4), [2.0, 1.0, 3.0, 5.0]
    turned = [[left @ g @ right for g, (left, right) in zip(group, turns, strict=True)] for group in groups]
    assert estimator(turned, sizes, geometry) == pytest.approx(estimator(groups, sizes, geometry), rel=1e-9)


@every_estimator
@every_geometry
def test_transposed_weights_read_the_same(
    estimator: Callable[[list[list[Tensor]], Numbers, Geometry], Numbers], geometry: Geometry
) -> None:
    groups, sizes = random_groups(4), [2.0, 1.0, 3.0, 5.0]
    transposed = [[tensor.mT.contiguous() for tensor in group] for group in groups]
    assert estimator(transposed, sizes, geometry) == pytest.approx(estimator(groups, sizes, geometry), rel=1e-9)


@every_geometry
def test_the_order_of_groups_does_not_matter(geometry: Geometry) -> None:
    groups, sizes, order = random_groups(4), [1.0, 2.0, 3.0, 4.0], [2, 3, 0, 1]
    moved, moved_sizes = [groups[i] for i in order], [sizes[i] for i in order]
    for estimator in (by_rank_variance, by_split):  # the order keeps even groups even
        assert estimator(moved, moved_sizes, geometry) == pytest.approx(estimator(groups, sizes, geometry), rel=1e-12)
    signs = [[pattern[i] for i in order] for pattern in WALSH_4]
    found = numbers(split_over_patterns(moved, moved_sizes, signs, geometry=geometry))
    assert found == pytest.approx(by_patterns(groups, sizes, geometry), rel=1e-12)


@every_geometry
def test_halves_and_their_names_can_be_exchanged(geometry: Geometry) -> None:
    groups, sizes = random_groups(4), [1.0, 2.0, 3.0, 4.0]
    swapped = numbers(split(groups[1::2], groups[::2], sizes[1::2], sizes[::2], geometry=geometry))
    assert swapped == pytest.approx(by_split(groups, sizes, geometry), rel=1e-12)
    negative = [[-sign for sign in pattern] for pattern in WALSH_4]
    found = numbers(split_over_patterns(groups, sizes, negative, geometry=geometry))
    assert found == pytest.approx(by_patterns(groups, sizes, geometry), rel=1e-12)


@every_geometry
def test_a_rank_that_repeats_another_changes_the_noise_by_what_it_claims_to_know(geometry: Geometry) -> None:
    # K groups twice: the mean, hence the signal, stays; the sum of squared deviations doubles over 2K - 1 degrees.
    groups, sizes = random_groups(4), [1.0, 2.0, 3.0, 4.0]
    once = rank_variance(groups, sizes, geometry=geometry)
    twice = rank_variance([*groups, *groups], [*sizes, *sizes], geometry=geometry)
    assert float(twice.signal) == pytest.approx(float(once.signal), rel=1e-12)
    assert float(twice.noise_sq) == pytest.approx(float(once.noise_sq) * 2 * 3 / 7, rel=1e-9)
    # split, copies in the same half: the same halves that claim twice the samples.
    doubled = [group for group in groups for _ in range(2)]
    doubled_sizes = [size for size in sizes for _ in range(2)]
    signs = [[sign for sign in pattern for _ in range(2)] for pattern in WALSH_4]
    before = split_over_patterns(groups, sizes, WALSH_4, geometry=geometry)
    after = split_over_patterns(doubled, doubled_sizes, signs, geometry=geometry)
    assert float(after.noise_sq) == pytest.approx(2 * float(before.noise_sq), rel=1e-9)
    assert numbers(after)[1:3] == pytest.approx(numbers(before)[1:3], rel=1e-9)
    # In opposite halves nothing differs, and the progress is the norm of the mean gradient: noise taken for signal.
    blind = split(groups, groups, sizes, sizes, geometry=geometry)
    assert float(blind.noise) == 0
    assert float(blind.progress or 0) == pytest.approx(float(once.signal), rel=1e-9)


@every_geometry
@settings(max_examples=20, deadline=None)
@given(first=st.integers(1, 50), second=st.integers(1, 50), seed=st.integers(0, 1000))
def test_two_groups_give_both_estimators_the_same_noise(geometry: Geometry, first: int, second: int, seed: int) -> None:
    groups, sizes = random_groups(2, seed), [first, second]
    published = rank_variance(groups, sizes, geometry=geometry)
    ours = split(groups[:1], groups[1:], sizes[:1], sizes[1:], geometry=geometry)
    assert float(ours.noise) == pytest.approx(float(published.noise), rel=1e-7)
    difference = [(a - b).numpy() for a, b in zip(*groups, strict=True)]
    expected = dual_norm(difference, geometry) * math.sqrt(first * second / (first + second))
    assert float(published.noise) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("num_groups", [2, 4, 8])
def test_corrected_sign_noise_does_not_depend_on_the_number_of_groups(num_groups: int) -> None:
    generator = torch.Generator().manual_seed(4)
    groups = torch.randn(num_groups, 200_000, generator=generator, dtype=torch.float64)
    found = rank_variance([[group] for group in groups], [1] * num_groups, geometry="sign")
    assert found.noise_corrected is not None
    # Relative standard error below 0.2 %: 200 000 independent coordinates.
    assert float(found.noise_corrected) / 200_000 == pytest.approx(1, rel=5e-3)
    for geometry in GEOMETRIES:
        if geometry != "sign":
            assert rank_variance(random_groups(num_groups), [1] * num_groups, geometry=geometry).noise_corrected is None


# ------------------------------------------------------------------ an independent implementation


def numpy_direction(tensors: list[np.ndarray], geometry: Geometry) -> list[np.ndarray]:
    if geometry == "euclidean":
        return [tensor / dual_norm(tensors, "euclidean") for tensor in tensors]
    if geometry == "sign":
        return [np.sign(tensor) for tensor in tensors]
    factors = [np.linalg.svd(tensor, full_matrices=False) for tensor in tensors]
    return [left @ right for left, _, right in factors]


def numpy_mean(groups: list[list[Tensor]], sizes: Numbers, chosen: list[int]) -> list[np.ndarray]:
    weights = np.array([sizes[i] for i in chosen]) / sum(sizes[i] for i in chosen)
    return [np.tensordot(weights, np.stack([groups[i][t].numpy() for i in chosen]), 1) for t in range(len(groups[0]))]


def inner(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(left, right, strict=True))


@every_geometry
@pytest.mark.parametrize("sizes", [[2.0, 2.0, 2.0, 2.0], [1.0, 3.0, 2.0, 7.0]])
def test_split_over_patterns_equals_an_independent_implementation(geometry: Geometry, sizes: Numbers) -> None:
    groups = random_groups(4)
    noises, norms, progresses, firsts = [], [], [], []
    for pattern in WALSH_4:
        in_a, in_b = ([i for i in range(4) if pattern[i] == sign] for sign in (1, -1))
        n_a, n_b = sum(sizes[i] for i in in_a), sum(sizes[i] for i in in_b)
        a, b = numpy_mean(groups, sizes, in_a), numpy_mean(groups, sizes, in_b)
        d = [x - y for x, y in zip(a, b, strict=True)]
        p_a, p_b = numpy_direction(a, geometry), numpy_direction(b, geometry)
        noises.append(dual_norm(d, geometry) / math.sqrt(1 / n_a + 1 / n_b))
        norms.append((dual_norm(a, geometry) + dual_norm(b, geometry)) / 2)
        progresses.append((inner(p_a, b) + inner(p_b, a)) / 2)
        along = [(x + y) / 2 for x, y in zip(p_a, p_b, strict=True)]
        firsts.append(math.sqrt(n_a * n_b) / (n_a + n_b) * inner(along, d))
    found = split_over_patterns(groups, sizes, WALSH_4, geometry=geometry)
    assert float(found.noise_sq) == pytest.approx(np.mean(noises) ** 2, rel=1e-10)
    assert float(found.signal_sq) == pytest.approx(np.mean(norms) * np.mean(progresses), rel=1e-10)
    assert float(found.noise_scale) == pytest.approx(float(found.noise_sq / found.signal_sq), rel=1e-12)
    assert float(found.noise_standard_error or 0) == pytest.approx(np.std(noises, ddof=1) / math.sqrt(3), rel=1e-9)
    expected = math.sqrt(np.var(progresses, ddof=1) * (1 + 1 / 3) + np.mean(np.square(firsts)))
    assert float(found.progress_standard_error or 0) == pytest.approx(expected, rel=1e-9)


@every_geometry
def test_one_pattern_is_the_split_and_knows_no_standard_error(geometry: Geometry) -> None:
    groups, sizes = random_groups(4), [1.0, 3.0, 2.0, 7.0]
    found = split_over_patterns(groups, sizes, [[1, -1, 1, -1]], geometry=geometry)
    assert numbers(found) == pytest.approx(by_split(groups, sizes, geometry), rel=1e-12)
    assert found.noise_standard_error is found.progress_standard_error is None


@every_geometry
@pytest.mark.parametrize("num_groups", [2, 3, 4, 7, 8])
def test_the_progress_curve_equals_an_independent_implementation(geometry: Geometry, num_groups: int) -> None:
    groups, sizes = random_groups(num_groups), [float(1 + index % 3) for index in range(num_groups)]
    expected = []
    for length in (1, 2, 4):
        unions = [list(range(i * length, (i + 1) * length)) for i in range(num_groups // length)]
        if 2 * length > num_groups:
            break
        values = []
        for union in unions:
            rest = [i for i in range(num_groups) if i not in union]
            direction = numpy_direction(numpy_mean(groups, sizes, union), geometry)
            values.append(inner(direction, numpy_mean(groups, sizes, rest)))
        samples = np.mean([sum(sizes[i] for i in union) for union in unions])
        expected.append((samples, np.mean(values)))
    found = progress_curve(groups, sizes, geometry=geometry)
    assert [samples for samples, _ in found] == pytest.approx([samples for samples, _ in expected])
    assert [float(p) for _, p in found] == pytest.approx([p for _, p in expected], rel=1e-9)


# ------------------------------------------------------------------ by simulation


def eighths() -> list[list[int]]:
    chosen = choose_patterns(7, num_ranks=8, num_micro_batches=1)
    return [[pattern.sign(rank=rank, micro_batch=0) for rank in range(8)] for pattern in chosen]


@pytest.mark.slow
@every_geometry
def test_the_progress_curve_is_unbiased_at_every_batch(geometry: Geometry) -> None:
    generator = torch.Generator().manual_seed(2)
    problem = LinearRegression(0.2 * torch.randn(4, 6, generator=generator, dtype=torch.float64), noise=1.5, seed=3)
    drawn = problem.groups(500, 8, 4)[0]
    found = [by_curve([[group] for group in groups], [4.0] * 8, geometry) for groups in drawn]
    for samples, estimated in zip((4, 8, 16), np.array(found).T, strict=True):
        directions = [numpy_direction([g[0].numpy()], geometry) for g in problem.groups(1500, 1, samples)[0]]
        direct = [inner(direction, [problem.gradient[0].numpy()]) for direction in directions]
        error = math.hypot(np.std(direct) / math.sqrt(1500), np.std(estimated) / math.sqrt(500))
        assert abs(np.mean(direct) - np.mean(estimated)) < 4 * error


@pytest.mark.slow
@every_geometry
@pytest.mark.parametrize("noise_scale_per_batch", [0.01, 100.0])
def test_standard_errors_tell_the_spread_over_fresh_batches(geometry: Geometry, noise_scale_per_batch: float) -> None:
    # A spread that patterns cannot see, that of the mean gradient, is most of it where signal dominates.
    generator = torch.Generator().manual_seed(6)
    gradient = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    scale = float(gradient.norm()) * math.sqrt(noise_scale_per_batch * 8 / gradient.numel())
    drawn = GaussianNoise(gradient, scale=scale, seed=5).groups(250, 8, 1)[0]
    signs = eighths()
    found = [split_over_patterns([[g] for g in groups], [1] * 8, signs, geometry=geometry) for groups in drawn]
    noises, progresses = ([float(getattr(e, name)) for e in found] for name in ("noise", "progress"))
    noise_errors = [float(e.noise_standard_error or 0) for e in found]
    progress_errors = [float(e.progress_standard_error or 0) for e in found]
    # 250 batches: a standard deviation is known to 4.5 %, so 4 of them are 18 %. The formula errs by -10 to +30 %.
    assert math.sqrt(np.mean(np.square(noise_errors))) == pytest.approx(np.std(noises), rel=0.18)
    assert 0.82 * 0.9 < math.sqrt(np.mean(np.square(progress_errors))) / np.std(progresses) < 1.18 * 1.3


@every_geometry
def test_patterns_sharpen_the_noise_by_their_root_and_progress_by_less(geometry: Geometry) -> None:
    drawn = GaussianNoise(torch.zeros(6, 8), seed=8).groups(150, 8, 1)[0]
    signs = eighths()
    spreads = []
    for count in (1, 7):
        found = [
            split_over_patterns([[g] for g in groups], [1] * 8, signs[:count], geometry=geometry) for groups in drawn
        ]
        spreads.append([np.std([float(getattr(e, name)) for e in found]) for name in ("noise", "progress")])
    (noise_1, progress_1), (noise_7, progress_7) = spreads
    # 150 batches: a ratio of standard deviations is known to 8 %.
    assert noise_1 / noise_7 == pytest.approx(math.sqrt(7), rel=0.32)
    assert 1 < progress_1 / progress_7 < math.sqrt(2) * 1.32


# ------------------------------------------------------------------ the benchmark


def test_the_benchmarks_batched_estimators_equal_the_reference() -> None:
    generator = torch.Generator().manual_seed(11)
    population = Population([torch.randn(20, *shape, generator=generator) + 0.3 for shape in SHAPES], seed=12)
    drawn = population.groups(3, 8, 2)
    blocks = block_signs()
    assert torch.equal(blocks[0], torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=torch.float64))
    assert torch.equal(blocks @ blocks.T, 8 * torch.eye(7, dtype=torch.float64))
    for geometry in GEOMETRIES:
        mean = [tensor.mean(1, keepdim=True) for tensor in drawn]
        differences = [torch.einsum("pk,tkmn->tpmn", blocks / 8, tensor) for tensor in drawn]
        ours = batched_split(mean, differences, batch=16, geometry=geometry)
        spread = batched_spread(drawn, size=2, geometry=geometry)
        for index in range(3):
            groups = [[tensor[index, group] for tensor in drawn] for group in range(8)]
            assert float(spread[index]) == pytest.approx(
                float(rank_variance(groups, [2] * 8, geometry=geometry).noise), rel=1e-6
            )
            for number, pattern in enumerate(blocks.int().tolist()):
                expected = split_over_patterns(groups, [2] * 8, [pattern], geometry=geometry)
                assert ours.progress is not None
                found = [float(part[index, number]) for part in (ours.noise, ours.signal, ours.progress)]
                assert found == pytest.approx(numbers(expected), rel=1e-6)


def test_the_benchmarks_truth_is_the_closed_form_where_there_is_one() -> None:
    scale = 0.7
    normal = GaussianNoise(torch.ones(6, 8), scale=scale)
    assert signal(normal, "sign") == 48
    assert textbook_noise(normal, "sign") == pytest.approx(48 * scale)
    assert textbook_noise(normal, "euclidean") == pytest.approx(math.sqrt(48) * scale)
    assert textbook_noise(normal, "spectral") == pytest.approx(6 * math.sqrt(8) * scale)
    # 2000 draws of 48 normal numbers: 0.25 % of standard error.
    assert step_noise(normal, "sign", batch=16) == pytest.approx(48 * scale * math.sqrt(2 / math.pi), rel=1e-2)
    assert step_noise(normal, "euclidean", batch=16) == textbook_noise(normal, "euclidean")


def test_the_closed_form_and_its_samples_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    problem = LinearRegression(torch.randn(3, 5, generator=generator, dtype=torch.float64), noise=0.8, seed=1)
    for size in (4, 5):  # sample by sample, and by moments
        errors = (problem.groups(20_000, 1, size)[0][:, 0] - problem.gradient[0]).numpy() * math.sqrt(size)
        assert errors.std(axis=0) == pytest.approx(problem.standard_deviations()[0], rel=0.05)
        rows = np.einsum("rmn,rkn->mk", errors, errors) / len(errors)
        assert np.abs(rows - problem.covariances()[0]).max() < 0.05 * np.abs(rows).max()
        assert np.abs(errors.mean(axis=0)).max() < 5 * errors.std() / math.sqrt(20_000)


# ------------------------------------------------------------------ bad input


def test_bad_patterns_get_a_sentence() -> None:
    groups, sizes = random_groups(4), [1.0] * 4
    with pytest.raises(InvalidInputError, match="needs one sign pattern or more"):
        split_over_patterns(groups, sizes, [], geometry="sign")
    with pytest.raises(InvalidInputError, match=r"over 4 groups is as many numbers 1 or -1, got \[1, -1, 0, 1\]"):
        split_over_patterns(groups, sizes, [[1, -1, 0, 1]], geometry="sign")
    with pytest.raises(TooFewGroupsError, match=r"a group in each half, got the pattern \[1, 1, 1, 1\]"):
        split_over_patterns(groups, sizes, [[1, 1, 1, 1]], geometry="sign")
    with pytest.raises(InvalidInputError, match="3 sizes for 2 groups and 1 for 2"):
        split(groups[:2], groups[2:], [1, 1, 1], [1], geometry="sign")
    with pytest.raises(TooFewGroupsError, match="two sample groups or more, got 1"):
        progress_curve(groups[:1], [1], geometry="sign")
