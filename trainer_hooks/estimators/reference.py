"""Eager reference: explicit groups in, noise and signal out, everything in float64 and by exact SVD.

    groups      a list over sample groups of a list over tensors: that group's MEAN gradient
    sizes       the samples behind each group

What the hooks compute under DDP equals these functions on the gathered gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gns_controller.core.contract import Geometry
from gns_controller.core.errors import GeometryError, InvalidInputError, TooFewGroupsError
from gns_controller.core.statistics import c4
from trainer_hooks.estimators import euclidean, sign, spectral
from trainer_hooks.estimators.by_geometry import PROGRESS_SUMS, SPLIT_SUMS
from trainer_hooks.estimators.sums import DualNorms, finished_progress, split_dual_norms, spread_dual_norms

Gradients = Sequence[Tensor | None]
"""One sample group's mean gradient, tensor by tensor. None: this tensor got no gradient, which counts as zero."""

_GEOMETRIES = ("euclidean", "sign", "spectral")


@dataclass(frozen=True)
class Estimate:
    """() float64 tensors."""

    noise_sq: Tensor
    """Squared dual norm of the per-sample spread."""
    signal_sq: Tensor
    """rank_variance: ||gbar||_*^2. split: debiased and signed."""
    noise_scale: Tensor
    """noise_sq / signal_sq, samples. Not meaningful while signal_sq is not positive: average first, divide last."""
    noise: Tensor
    """Not squared."""
    signal: Tensor
    """Not squared. split: the mean norm of the halves."""
    progress: Tensor | None = None
    """split only."""
    unbiased_signal_sq: Tensor | None = None
    """rank_variance in the euclidean geometry only: ||gbar||^2 - V tr C, unbiased for ||grad L||_2^2, signed."""
    noise_corrected: Tensor | None = None
    """rank_variance in the sign geometry only: noise / c4(K-1), so that another number of groups reads the same."""
    noise_standard_error: Tensor | None = None
    """split over two patterns or more."""
    progress_standard_error: Tensor | None = None
    """split over two patterns or more."""


def rank_variance(
    groups: Sequence[Gradients],
    sizes: Sequence[float],
    *,
    geometry: Geometry,
    weights: Sequence[float] | None = None,
) -> Estimate:
    """The published estimator: spread of the groups' mean gradients around their average.

        sigma_i^2 = sum_j n_j (g_ji - gbar_i)^2 / sum_j n_j (1/n_j - 2 w_j/n_j + V),   V = sum_j w_j^2/n_j
        euclidean: noise_sq = sum_i sigma_i^2       sign: (sum_i sigma_i)^2
        spectral:  (sum over matrices tr C^(1/2))^2, C the same expression with (G_j - Gbar)(G_j - Gbar)^T, shorter side
        signal_sq = ||gbar||_*^2,   gbar = sum_j w_j g_j

    Equal sizes give B/(K-1) mean_j (g_ji - gbar_i)^2.

    Args:
        groups: K lists of tensors, any float dtype; computed in float64. spectral takes the 2-D tensors, and only them.
        sizes: n_j > 0, K numbers.
        geometry: "euclidean", "sign" or "spectral".
        weights: w_j of the average gbar, summing to 1. Default n_j / B. Plain DDP averages ragged ranks with 1/K.

    Raises:
        TooFewGroupsError: fewer than two groups.
        GeometryError: unknown geometry, or spectral without a matrix.
        InvalidInputError: lists that do not match.

    Bias: euclidean noise_sq is unbiased. sign is low by c4(K-1)^2 for normal noise; spectral lower still while K is
        below the noise's rank. signal_sq is high by the norm of the noise in gbar, so noise_scale saturates near B.
    Source: arXiv:2602.03001v1, section "Noise Estimation". Ours: deviations before squares, unequal groups.
    """
    tensors = _columns(groups, sizes, geometry)
    if weights is None:
        total = sum(sizes)
        weights = [size / total for size in sizes]
    elif len(weights) != len(sizes):
        raise InvalidInputError(f"{len(weights)} weights for {len(sizes)} groups.")
    spread_of_mean = sum(weight**2 / size for weight, size in zip(weights, sizes, strict=True))
    degrees = sum(
        size * (1 / size - 2 * weight / size + spread_of_mean) for size, weight in zip(sizes, weights, strict=True)
    )
    sums = torch.zeros(2, dtype=torch.float64, device=tensors[0][0].device)
    for group_grads in tensors:
        mean = sum((weight * grad for weight, grad in zip(weights, group_grads, strict=True)), torch.zeros(()))
        scaled = [(size / degrees) ** 0.5 * (grad - mean) for size, grad in zip(sizes, group_grads, strict=True)]
        if geometry == "spectral":
            stacked = torch.cat([spectral.wide(deviation) for deviation in scaled], dim=1)
            sums += torch.stack([spectral.nuclear_norm(stacked), spectral.nuclear_norm(mean)])
        else:
            variance = torch.stack(scaled).square().sum(0)
            sums += (euclidean if geometry == "euclidean" else sign).spread_sums(mean, variance)
    norms = spread_dual_norms(sums, geometry=geometry)
    unbiased = norms.signal**2 - spread_of_mean * norms.noise**2 if geometry == "euclidean" else None
    corrected = norms.noise / c4(len(groups) - 1) if geometry == "sign" else None
    return replace(_estimate(norms, norms.signal**2), unbiased_signal_sq=unbiased, noise_corrected=corrected)


def inner_product_variance(groups: Sequence[Gradients], sizes: Sequence[float]) -> Tensor:
    """Per-sample variance of <g_i, gbar>, for the inner-product test: () float64.

        x_j = <g_j, gbar>,   gbar = sum_j n_j g_j / B,   variance = sum_j n_j (x_j - |gbar|^2)^2 / (K - 1)

    Equal sizes of b samples give b / (K - 1) sum_j (x_j - mean x)^2.

    Args:
        groups: K lists of tensors, together one vector; computed in float64.
        sizes: n_j > 0, K numbers.

    Raises:
        TooFewGroupsError, InvalidInputError: as `rank_variance`.

    Bias: none for gbar^T C gbar at this gbar, for normal noise. Over batches that is g^T C g + tr(C^2) / B: high near
        the noise scale, as |gbar|^2 is by tr C / B.
    Source: Bollapragada, Byrd, Nocedal 2018, whose sum runs over single samples. Ours: over groups of samples.
    """
    columns = _columns(groups, sizes, "euclidean")
    deviations = torch.zeros(len(groups), dtype=torch.float64, device=columns[0][0].device)
    for grads in columns:
        mean = _mean_of(grads, sizes, [True] * len(grads))
        deviations += torch.stack([((grad - mean) * mean).sum() for grad in grads])
    weights = torch.tensor(list(sizes), dtype=torch.float64, device=deviations.device)
    return (weights * deviations.square()).sum() / (len(groups) - 1)


def split(
    groups_a: Sequence[Gradients],
    groups_b: Sequence[Gradients],
    sizes_a: Sequence[float],
    sizes_b: Sequence[float],
    *,
    geometry: Geometry,
) -> Estimate:
    """Our estimator: two disjoint halves of the samples, at the same weights, judge each other.

        g_A, g_B    sample-weighted mean gradients of the halves, n_A and n_B samples
        noise_sq  = ||g_A - g_B||_*^2 / (1/n_A + 1/n_B)
        progress  = (<p(g_A), g_B> + <p(g_B), g_A>) / 2          p: the duality map: sign, U V^T, g/||g||_2
        signal_sq = (||g_A||_* + ||g_B||_*) / 2 * progress

    Args:
        groups_a: at least one list of tensors, each a group's mean gradient; computed in float64.
        groups_b: likewise, of other samples.
        sizes_a: samples behind each group of A.
        sizes_b: and of B.
        geometry: "euclidean", "sign" or "spectral" (2-D tensors only).

    Raises:
        TooFewGroupsError: a half without groups.
        GeometryError: unknown geometry, or spectral without a matrix.
        InvalidInputError: lists that do not match.

    Bias: the root of noise_sq is unbiased for sqrt(B) E||gbar - grad L||_* (symmetric noise), progress for the
        first-order progress of a batch of n_A samples. Both hold for any number of groups.
    """
    if not groups_a or not groups_b:
        raise TooFewGroupsError(
            f"the split estimator needs a group in each half, got {len(groups_a)} and {len(groups_b)}."
        )
    if len(sizes_a) != len(groups_a) or len(sizes_b) != len(groups_b):
        raise InvalidInputError(
            f"{len(sizes_a)} sizes for {len(groups_a)} groups and {len(sizes_b)} for {len(groups_b)}."
        )
    sums = _split_sums(
        [*groups_a, *groups_b], [*sizes_a, *sizes_b], [1] * len(groups_a) + [-1] * len(groups_b), geometry
    )
    norms = split_dual_norms(sums, geometry=geometry, num_samples_a=sum(sizes_a), num_samples_b=sum(sizes_b))
    return _split_estimate(norms)


def split_over_patterns(
    groups: Sequence[Gradients], sizes: Sequence[float], signs: Sequence[Sequence[int]], *, geometry: Geometry
) -> Estimate:
    """The split estimator, averaged over several ways to deal the same groups out into halves.

        noise    = mean_p noise_p          noise_sq  = noise^2: the root is what is unbiased
        signal   = mean_p signal_p         progress  = mean_p progress_p         signal_sq = signal * progress
        noise_standard_error    = s_noise / sqrt(P)
        progress_standard_error = sqrt(s_progress^2 (1 + 1/P) + mean_p u_p^2)
        u_p = sqrt(n_A n_B)/B <p(g_A) + p(g_B), g_A - g_B> / 2

    with s the standard deviation over the P patterns (divisor P - 1). Given the mean gradient gbar the signed
    differences of orthogonal patterns are independent, so the noise gains sqrt(P). Progress gains less, because all
    patterns share the noise of gbar. What that noise adds is not seen between patterns, but each difference
    g_A - g_B is a stand-in for it, being as large and as shaped: where noise dominates, progress is an antisymmetric
    function of the two and gbar adds at most one more s^2 (just that in l2); where signal dominates, gbar adds
    Var <p(grad L), gbar>, which is the mean of u_p^2. In between the sum errs by -10 to +30 % of the standard error.

    Args:
        groups: K lists of tensors, each a group's mean gradient; computed in float64.
        sizes: samples behind each group, K numbers.
        signs: P lists of K numbers +1 (half A) or -1 (half B), as from `choose_patterns`.
        geometry: "euclidean", "sign" or "spectral" (2-D tensors only).

    Raises:
        TooFewGroupsError: a half without groups.
        GeometryError: unknown geometry, or spectral without a matrix.
        InvalidInputError: lists that do not match, no pattern, a sign other than 1 and -1.

    Bias: that of `split`. Standard errors assume normal noise and orthogonal patterns, and mean the spread over fresh
        batches at the same weights.
    """
    if not signs:
        raise InvalidInputError("split_over_patterns needs one sign pattern or more, got none.")
    _columns(groups, sizes, geometry)
    rows, first_order = [], []
    for pattern in signs:
        if len(pattern) != len(groups) or not {1, -1}.issuperset(pattern):
            raise InvalidInputError(
                f"a pattern over {len(groups)} groups is as many numbers 1 or -1, got {list(pattern)}."
            )
        size_a = sum(size for size, way in zip(sizes, pattern, strict=True) if way > 0)
        size_b = sum(size for size, way in zip(sizes, pattern, strict=True) if way < 0)
        if not size_a or not size_b:
            raise TooFewGroupsError(f"the split estimator needs a group in each half, got the pattern {list(pattern)}.")
        sums = _split_sums(groups, sizes, pattern, geometry)
        rows.append(split_dual_norms(sums, geometry=geometry, num_samples_a=size_a, num_samples_b=size_b))
        first_order.append((size_a * size_b) ** 0.5 / (size_a + size_b) * _shared_first_order(sums, geometry=geometry))
    noise, signal, progress = (torch.stack(column) for column in zip(*rows, strict=True))
    estimate = _split_estimate(DualNorms(noise.mean(), signal.mean(), progress.mean()))
    if len(signs) < 2:
        return estimate
    shared = torch.stack(first_order).square().mean()
    return replace(
        estimate,
        noise_standard_error=noise.std() / len(signs) ** 0.5,
        progress_standard_error=(progress.var() * (1 + 1 / len(signs)) + shared).sqrt(),
    )


def progress_curve(
    groups: Sequence[Gradients], sizes: Sequence[float], *, geometry: Geometry
) -> list[tuple[float, Tensor]]:
    """First-order progress at several batch sizes from one set of groups: (samples, progress), smallest first.

        progress(m) = mean over unions u of m groups in a row of <p(g_u), g_rest>,   m = 1, 2, 4, ... <= K/2

    with g_u and g_rest the sample-weighted means over the union and over all other groups. Groups that fill no union
    only judge. `samples` is the mean number behind a union.

    Args:
        groups: K lists of tensors, each a group's mean gradient; computed in float64.
        sizes: samples behind each group, K numbers.
        geometry: "euclidean", "sign" or "spectral" (2-D tensors only).

    Returns:
        floor(log2 K) points; progress is () float64.

    Raises:
        TooFewGroupsError, GeometryError, InvalidInputError: as `rank_variance`.

    Bias: none for E<grad L, p(g)> at that many samples, because g_rest does not know the noise in g_u. For unequal
        sizes it is that mean over the sizes of the unions.
    """
    columns = _columns(groups, sizes, geometry)
    num_groups, curve, length = len(groups), [], 1
    while 2 * length <= num_groups:
        found, samples = [], []
        for start in range(0, num_groups - length + 1, length):
            inside = [start <= index < start + length for index in range(num_groups)]
            outside = [not flag for flag in inside]
            sums = torch.stack(
                [
                    PROGRESS_SUMS[geometry](_mean_of(grads, sizes, inside), _mean_of(grads, sizes, outside))
                    for grads in columns
                ]
            ).sum(0)
            found.append(finished_progress(sums, geometry=geometry))
            samples.append(sum(sizes[start : start + length]))
        curve.append((sum(samples) / len(samples), torch.stack(found).mean()))
        length *= 2
    return curve


def _split_sums(
    groups: Sequence[Gradients], sizes: Sequence[float], signs: Sequence[int], geometry: Geometry
) -> Tensor:
    """(5,) float64 over all tensors; half A where the sign is positive."""
    in_a = [sign > 0 for sign in signs]
    in_b = [not flag for flag in in_a]
    rows = []
    for grads in _columns(groups, sizes, geometry):
        half_a, half_b = _mean_of(grads, sizes, in_a), _mean_of(grads, sizes, in_b)
        rows.append(SPLIT_SUMS[geometry](half_a, half_b, half_a - half_b))
    return torch.stack(rows).sum(0)


def _shared_first_order(sums: Tensor, *, geometry: Geometry) -> Tensor:
    """<p(g_A) + p(g_B), g_A - g_B> / 2 from split sums: (||g_A|| - ||g_B|| + <p(g_B), g_A> - <p(g_A), g_B>) / 2."""
    if geometry == "euclidean":
        norms = sums[1:3].sqrt()
        inner = finished_progress(torch.stack([sums[3:5], sums[1:3]], dim=-1), geometry=geometry)
    else:
        norms, inner = sums[1:3], sums[3:5]
    return 0.5 * (norms[0] - norms[1] + inner[1] - inner[0])


def _split_estimate(norms: DualNorms) -> Estimate:
    assert norms.progress is not None
    return _estimate(norms, norms.signal * norms.progress)


def _estimate(norms: DualNorms, signal_sq: Tensor) -> Estimate:
    noise_sq = norms.noise**2
    return Estimate(
        noise_sq=noise_sq,
        signal_sq=signal_sq,
        noise_scale=noise_sq / signal_sq,
        noise=norms.noise,
        signal=norms.signal,
        progress=norms.progress,
    )


def _mean_of(grads: Sequence[Tensor], sizes: Sequence[float], chosen: Sequence[bool]) -> Tensor:
    """Sample-weighted mean of the chosen groups."""
    total = sum(size for size, flag in zip(sizes, chosen, strict=True) if flag)
    parts = [size / total * grad for size, grad, flag in zip(sizes, grads, chosen, strict=True) if flag]
    return torch.stack(parts).sum(0)


def _columns(groups: Sequence[Gradients], sizes: Sequence[float], geometry: Geometry) -> list[list[Tensor]]:
    """Per tensor the list over groups, in float64, None filled with zeros."""
    if geometry not in _GEOMETRIES:
        raise GeometryError(f"geometry={geometry!r} is not one of {', '.join(_GEOMETRIES)}.")
    if len(groups) < 2:
        raise TooFewGroupsError(f"noise needs gradients of two sample groups or more, got {len(groups)}.")
    if len(sizes) != len(groups) or any(size <= 0 for size in sizes):
        raise InvalidInputError(f"{len(groups)} groups need {len(groups)} positive sizes, got {list(sizes)}.")
    if len({len(group) for group in groups}) != 1:
        raise InvalidInputError(f"groups have different numbers of tensors: {[len(group) for group in groups]}.")
    columns = []
    for grads in zip(*groups, strict=True):
        present = next((grad for grad in grads if grad is not None), None)
        if present is None or (geometry == "spectral" and present.ndim != 2):
            continue
        columns.append(
            [torch.zeros_like(present, dtype=torch.float64) if grad is None else grad.double() for grad in grads]
        )
    if not columns:
        what = "2-D tensor" if geometry == "spectral" else "tensor"
        raise GeometryError(f"no {what} to measure in the {geometry} geometry.")
    return columns
