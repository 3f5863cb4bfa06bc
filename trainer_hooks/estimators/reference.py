"""Eager reference: explicit groups in, noise and signal out, everything in float64 and by exact SVD.

    groups      a list over sample groups of a list over tensors: that group's MEAN gradient
    sizes       the samples behind each group

What the hooks compute under DDP equals these functions on the gathered gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gns_controller.core.contract import Geometry
from gns_controller.core.errors import GeometryError, InvalidInputError, TooFewGroupsError
from trainer_hooks.estimators import euclidean, sign, spectral
from trainer_hooks.estimators.geometries import SPLIT_SUMS
from trainer_hooks.estimators.sums import DualNorms, split_dual_norms, spread_dual_norms

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
    return _estimate(norms, norms.signal**2, unbiased)


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
    columns = _columns([*groups_a, *groups_b], [*sizes_a, *sizes_b], geometry)
    num_samples_a, num_samples_b = sum(sizes_a), sum(sizes_b)
    sums = torch.zeros(5, dtype=torch.float64, device=columns[0][0].device)
    for grads in columns:
        half_a = _weighted_mean(grads[: len(groups_a)], sizes_a)
        half_b = _weighted_mean(grads[len(groups_a) :], sizes_b)
        sums += SPLIT_SUMS[geometry](half_a, half_b, half_a - half_b)
    norms = split_dual_norms(sums, geometry=geometry, num_samples_a=num_samples_a, num_samples_b=num_samples_b)
    assert norms.progress is not None
    return _estimate(norms, norms.signal * norms.progress, None)


def _estimate(norms: DualNorms, signal_sq: Tensor, unbiased_signal_sq: Tensor | None) -> Estimate:
    noise_sq = norms.noise**2
    return Estimate(
        noise_sq=noise_sq,
        signal_sq=signal_sq,
        noise_scale=noise_sq / signal_sq,
        noise=norms.noise,
        signal=norms.signal,
        progress=norms.progress,
        unbiased_signal_sq=unbiased_signal_sq,
    )


def _weighted_mean(grads: Sequence[Tensor], sizes: Sequence[float]) -> Tensor:
    total = sum(sizes)
    return torch.stack([size / total * grad for size, grad in zip(sizes, grads, strict=True)]).sum(0)


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
