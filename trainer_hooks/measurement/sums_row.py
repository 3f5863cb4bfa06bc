"""Where each sum of a measured step stands in a group's row, and what the finished row says.

Rows add up over tensors and over ranks; everything that is not additive happens once, at the end, in `readings`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gns_controller.core.contract import Direction as DirectionName
from gns_controller.core.contract import Estimator, Geometry, GroupReading, ProgressPoint
from trainer_hooks.estimators import euclidean, pure_noise_reading, sign, spectral
from trainer_hooks.estimators.by_geometry import PROGRESS_SUMS, SPLIT_SUMS
from trainer_hooks.estimators.spectral import SpectralNorms
from trainer_hooks.estimators.sums import (
    NUM_INNER_PRODUCT_SUMS,
    NUM_PROGRESS_SUMS,
    NUM_SPLIT_SUMS,
    NUM_SPREAD_SUMS,
    finished_progress,
    first_order_noise,
    inner_product_variance,
    split_dual_norms,
    spread_dual_norms,
)
from trainer_hooks.measurement.capture.captured_step import Counts, Dealing
from trainer_hooks.measurement.capture.per_micro_batch import AlongMean
from trainer_hooks.measurement.groups import MeasuredGroup
from trainer_hooks.measurement.update_direction import Direction


@dataclass(frozen=True)
class Measured:
    """What is computed on a measured step, and how."""

    estimators: tuple[Estimator, ...]
    directions: tuple[DirectionName, ...] = ("gradient",)
    spectral_norms: SpectralNorms = "exact"
    progress_curve: bool = False
    background: bool = False
    """rank_variance of matrices: eigenvalues in a thread on the CPU, one measurement late."""
    also_euclidean: bool = False
    """Every group in the l2 norm besides its own."""
    inner_products: bool = False
    """rank_variance: the variance of <g_i, gbar> in euclidean readings. DDP and single processes."""


class Cell:
    """One of 2^m equal shares of the samples, told apart by the signs of 2^m - 1 patterns."""

    def __init__(self, signs: tuple[int, ...], counts: Counts) -> None:
        total, num_cells = counts.num_samples, len(signs) + 1
        sums_of_signs = [2 * counts.num_samples_a[p] - total for p in range(len(signs))]
        contrast = sum(s * n for s, n in zip(signs, sums_of_signs, strict=True))
        self.num_samples = (total + contrast) / num_cells
        self._signs = signs
        self._total = total
        self._scale = total / (num_cells * self.num_samples) if self.num_samples else math.nan

    def gradient(self, mean: Tensor, signed: Sequence[Tensor]) -> Tensor:
        """The cell's mean gradient, by the inverse Walsh transform."""
        combined = mean.clone()
        for s, tensor in zip(self._signs, signed, strict=False):
            combined.add_(tensor, alpha=s)
        return _zero_where_rounding(combined, mean).mul_(self._scale)

    def rest(self, mean: Tensor, gradient: Tensor) -> Tensor:
        """The mean gradient of all other samples."""
        share = self.num_samples / self._total
        return (mean - share * gradient) / (1 - share)


def levels_of(dealing: Dealing, counts: Counts, *, num_ranks: int) -> list[list[Cell]]:
    """Quarters, eighths, ... of the samples, as far as the patterns tell them apart."""
    levels = []
    length = 3
    while length <= len(dealing.patterns):
        prefix = dealing._replace(patterns=dealing.patterns[:length])
        found = sorted({prefix.signs(rank=r, chunk=c) for r in range(num_ranks) for c in range(dealing.num_chunks)})
        cells = [Cell(signs, counts) for signs in found]
        if len(found) == length + 1 and all(cell.num_samples > 0 for cell in cells):
            levels.append(cells)
        length = 2 * length + 1
    return levels


class Columns:
    """Where each sum stands in a group's row, and what the finished row says.

    A row is a block of sums in the group's norm, the same block in the l2 norm if that is measured as well, and two
    sums over sample groups for the variance of inner products: sum_j n_j y_j and sum_j n_j y_j^2, y_j = <g_j - g, g>.
    """

    def __init__(
        self,
        measured: Measured,
        num_patterns: int,
        levels: Sequence[Sequence[Cell]],
        *,
        has_spread: bool,
        has_inner_products: bool = False,
    ) -> None:
        self._num_patterns = num_patterns
        self._directions = measured.directions if num_patterns else ()
        self._levels = levels
        self._has_spread = has_spread
        self._also_euclidean = measured.also_euclidean
        self._has_inner_products = has_inner_products
        self._late_eigenvalues = measured.background
        self._block = (
            len(self._directions) * num_patterns * NUM_SPLIT_SUMS
            + NUM_PROGRESS_SUMS * sum(len(cells) for cells in levels)
            + NUM_SPREAD_SUMS * has_spread
        )
        self._additive = self._block * (1 + self._also_euclidean)
        self.width = self._additive + NUM_INNER_PRODUCT_SUMS * has_inner_products
        self.spread_column = self._block - NUM_SPREAD_SUMS
        """Of the noise of rank_variance, in the group's own norm."""

    def fill(
        self,
        geometry: Geometry,
        mean: Tensor,
        signed: Sequence[Tensor],
        direction: Direction | None,
        spread: Tensor | None,
        *,
        counts: Counts,
        norms: SpectralNorms,
    ) -> Tensor:
        """What one tensor, or a batch of equal matrices, adds to a row from its first column on: float64.

        Args:
            geometry: the group's own.
            mean: the mean gradient.
            signed: its signed means, one per pattern.
            direction: of the update, if that is measured.
            spread: per-sample variance, or for matrices (..., S, S) covariances of the shorter side.
            counts: of the step.
            norms: how nuclear norms are computed.
        """
        block = partial(self._fill_block, mean=mean, signed=signed, direction=direction, counts=counts, norms=norms)
        is_spectral = geometry == "spectral"
        decomposed = None if is_spectral and self._late_eigenvalues else spread
        decomposes = is_spectral and (norms == "exact" or decomposed is not None)
        if decomposes and not all(bool(tensor.isfinite().all()) for tensor in (mean, *signed)):  # LAPACK refuses NaN
            return torch.full((self._additive,), torch.nan, dtype=torch.float64, device=mean.device)
        found = block(geometry, spread=decomposed)
        if not self._also_euclidean:
            return found
        if geometry == "euclidean":
            return torch.cat([found, torch.zeros_like(found)])
        if is_spectral and spread is not None:
            spread = spread.diagonal(dim1=-2, dim2=-1)  # the variances of all entries have this trace
        return torch.cat([found, block("euclidean", spread=spread)])

    def fill_inner_products(self, row: Tensor, along: AlongMean, parameters: Sequence[int]) -> None:
        """Add this rank's micro-batches to a row, over the parameters of its group."""
        deviations = along.deviations[:, list(parameters)].sum(1)
        weighted = along.num_samples * deviations
        row[self._additive :] += torch.stack([weighted.sum(), weighted.dot(deviations)])

    def _fill_block(
        self,
        geometry: Geometry,
        *,
        mean: Tensor,
        signed: Sequence[Tensor],
        direction: Direction | None,
        spread: Tensor | None,
        counts: Counts,
        norms: SpectralNorms,
    ) -> Tensor:
        """(block,) float64."""
        options: dict[str, Any] = {"norms": norms} if geometry == "spectral" else {}
        parts: list[Tensor] = []
        for name in self._directions:
            for pattern, half in enumerate(signed):
                half_a, half_b, difference = _halves(mean, half, counts, pattern)
                if name == "gradient":
                    parts.append(SPLIT_SUMS[geometry](half_a, half_b, difference, **options))
                    continue
                assert direction is not None
                fresh = direction.gradient_weight
                past: Tensor | float = 0.0
                if direction.momentum is not None:
                    past = direction.momentum_weight * direction.momentum.to(mean.dtype)
                parts.append(
                    SPLIT_SUMS[geometry](
                        past + fresh * half_a,
                        past + fresh * half_b,
                        fresh * difference,
                        target_a=half_a,
                        target_b=half_b,
                        **options,
                    )
                )
        for cells in self._levels:
            for cell in cells:
                grad = cell.gradient(mean, signed)
                parts.append(PROGRESS_SUMS[geometry](grad, cell.rest(mean, grad), **options))
        if self._has_spread:
            if geometry == "spectral" and spread is None:  # the other sum comes from the background
                signal = spectral.nuclear_norm(mean, norms=norms)
                parts.append(torch.stack([torch.zeros_like(signal), signal]))
                return torch.cat(parts)
            assert spread is not None
            if geometry == "spectral":
                parts.append(spectral.spread_sums(mean, spread, norms=norms))
            else:
                parts.append((euclidean if geometry == "euclidean" else sign).spread_sums(mean, spread))
        return torch.cat(parts)

    def readings(self, row: Tensor, group: MeasuredGroup, counts: Counts) -> list[GroupReading]:
        """What one group's finished row says, one reading per norm, direction and estimator."""
        found = self._block_readings(row[: self._block], group, counts)
        if self._also_euclidean and group.geometry != "euclidean":
            twin = group.in_the_euclidean_norm()
            found += [
                reading.model_copy(update={"repeats": group.name})
                for reading in self._block_readings(row[self._block : self._additive], twin, counts)
            ]
        if not self._has_inner_products:
            return found
        variance = inner_product_variance(
            row[self._additive :], num_samples=counts.num_samples, num_groups=counts.num_spread_groups
        ).item()
        # What is not a number does not travel in this field; the reading's norms say so already.
        known = None if math.isnan(variance) else variance
        return [
            reading.model_copy(update={"inner_product_variance": known})
            if reading.estimator == "rank_variance" and reading.geometry == "euclidean"
            else reading
            for reading in found
        ]

    def _block_readings(self, row: Tensor, group: MeasuredGroup, counts: Counts) -> list[GroupReading]:
        found: list[GroupReading] = []
        position = 0
        of_group = partial(
            GroupReading,
            group=group.name,
            geometry=group.geometry,
            learning_rate=float(group.param_groups[0]["lr"]),
        )
        for name in self._directions:
            length = self._num_patterns * NUM_SPLIT_SUMS
            patterns = row[position : position + length].view(self._num_patterns, NUM_SPLIT_SUMS)
            position += length
            found.append(
                of_group(
                    estimator="split",
                    direction=name,
                    num_groups=counts.num_groups,
                    samples_per_group=counts.num_samples / counts.num_groups,
                    num_sign_patterns=self._num_patterns,
                    **_split_fields(patterns, group.geometry, name, counts),
                )
            )
        if self._levels:
            curve = []
            for cells in self._levels:
                length = len(cells) * NUM_PROGRESS_SUMS
                pairs = row[position : position + length].view(len(cells), NUM_PROGRESS_SUMS)
                position += length
                progress = finished_progress(pairs, geometry=group.geometry).mean().item()
                curve.append(ProgressPoint(samples=counts.num_samples / len(cells), progress=progress))
            found = [reading.model_copy(update={"progress_curve": _with_half(curve, reading)}) for reading in found]
        if self._has_spread:
            norms = spread_dual_norms(row[position : position + NUM_SPREAD_SUMS], geometry=group.geometry)
            found.append(
                of_group(
                    estimator="rank_variance",
                    num_groups=counts.num_spread_groups,
                    samples_per_group=counts.num_samples / counts.num_spread_groups,
                    noise=norms.noise.item(),
                    signal=norms.signal.item(),
                    ceiling_samples=pure_noise_reading(
                        group.geometry,
                        global_batch_size=counts.num_samples,
                        num_groups=counts.num_spread_groups,
                        shapes=group.shapes,
                    ),
                )
            )
        return found


def _halves(mean: Tensor, signed: Tensor, counts: Counts, pattern: int) -> tuple[Tensor, Tensor, Tensor]:
    """g_A, g_B and their difference, which the signed mean knows without cancellation."""
    num_samples_a = counts.num_samples_a[pattern]
    scale_a = counts.num_samples / (2 * num_samples_a)
    scale_b = counts.num_samples / (2 * (counts.num_samples - num_samples_a))
    difference = signed * (scale_a + scale_b)
    if scale_a != scale_b:
        difference = difference + mean * (scale_a - scale_b)
    return _sum_or_zero(mean, signed) * scale_a, _sum_or_zero(mean, -signed) * scale_b, difference


def _sum_or_zero(left: Tensor, right: Tensor) -> Tensor:
    """left + right, with entries that are nothing but rounding set to 0: sign() would make whole steps of them.

    An embedding row or an expert that one half never saw has mean = +-signed, up to the order of summation.
    """
    return _zero_where_rounding(left + right, left)


def _zero_where_rounding(total: Tensor, term: Tensor) -> Tensor:
    rounding = 16 * torch.finfo(total.dtype).eps
    return total.masked_fill_(total.abs() <= rounding * term.abs(), 0.0)


def _split_fields(patterns: Tensor, geometry: Geometry, direction: DirectionName, counts: Counts) -> dict[str, Any]:
    """Averages over sign patterns, and their standard errors where there are several.

    As in trainer_hooks.estimators.split_over_patterns. The progress of an update has none: what its patterns share is
    nearly all of its error, and nothing here shows it.
    """
    sizes = [(num_a, counts.num_samples - num_a) for num_a in counts.num_samples_a]
    norms = [
        split_dual_norms(sums, geometry=geometry, num_samples_a=num_a, num_samples_b=num_b)
        for sums, (num_a, num_b) in zip(patterns, sizes, strict=True)
    ]
    shared = torch.stack(
        [
            first_order_noise(sums, geometry=geometry, num_samples_a=num_a, num_samples_b=num_b)
            for sums, (num_a, num_b) in zip(patterns, sizes, strict=True)
        ]
    )
    noise = torch.stack([found.noise for found in norms])
    signal = torch.stack([found.signal for found in norms])
    progress = torch.stack([found.progress for found in norms if found.progress is not None])
    number = len(norms)
    several = number > 1
    progress_error = None
    if several and direction == "gradient":
        progress_error = (progress.var() * (1 + 1 / number) + shared.square().mean()).sqrt().item()
    return {
        "noise": noise.mean().item(),
        "signal": signal.mean().item(),
        "progress": progress.mean().item(),
        "noise_standard_error": noise.std().item() / math.sqrt(number) if several else None,
        "progress_standard_error": progress_error,
    }


def _with_half(curve: Sequence[ProgressPoint], reading: GroupReading) -> tuple[ProgressPoint, ...]:
    """The curve in ascending order, with what the halves say; of the gradient's own direction only."""
    if reading.direction != "gradient" or reading.progress is None:
        return ()
    half = ProgressPoint(samples=2 * curve[0].samples, progress=reading.progress)
    return (*reversed(curve), half)
