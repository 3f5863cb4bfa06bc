"""From one captured step to readings: norms, one owner per matrix, one small reduction, and errors.

Q quantities are gathered and combined linearly before any norm is taken: the mean gradient, the signed mean of each
sign pattern, and the momentum if the optimizer's own direction is measured.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gns_controller.core.contract import Direction as DirectionName
from gns_controller.core.contract import Estimator, Geometry, GroupReading, ProgressPoint
from trainer_hooks.capture.directions import Direction, direction_of
from trainer_hooks.capture.groups import MeasuredGroup
from trainer_hooks.capture.late import LateTraces
from trainer_hooks.capture.layout import Layout
from trainer_hooks.capture.owners import Owners
from trainer_hooks.capture.step import CapturedStep, Counts, Dealing
from trainer_hooks.estimators import euclidean, pure_noise_reading, sign, spectral
from trainer_hooks.estimators.geometries import PROGRESS_SUMS, SPLIT_SUMS
from trainer_hooks.estimators.spectral import SpectralNorms
from trainer_hooks.estimators.sums import (
    NUM_PROGRESS_SUMS,
    NUM_SPLIT_SUMS,
    NUM_SPREAD_SUMS,
    finished_progress,
    first_order_noise,
    split_dual_norms,
    spread_dual_norms,
)

logger = logging.getLogger(__name__)

_ENTRIES_AT_ONCE = {"cpu": 2**17, "cuda": 2**25}
"""Of entrywise geometries, per device: half a MiB in float32, or enough to fill a GPU."""


@dataclass(frozen=True)
class Measured:
    """What is computed on a measured step, and how."""

    estimators: tuple[Estimator, ...]
    directions: tuple[DirectionName, ...] = ("gradient",)
    spectral_norms: SpectralNorms = "exact"
    progress_curve: bool = False
    background: bool = False
    """rank_variance of matrices: eigenvalues in a thread on the CPU, one measurement late."""


class _Cell:
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


def _levels(dealing: Dealing, counts: Counts, *, num_ranks: int) -> list[list[_Cell]]:
    """Quarters, eighths, ... of the samples, as far as the patterns tell them apart."""
    levels = []
    length = 3
    while length <= len(dealing.patterns):
        prefix = dealing._replace(patterns=dealing.patterns[:length])
        found = sorted({prefix.signs(rank=r, chunk=c) for r in range(num_ranks) for c in range(dealing.num_chunks)})
        cells = [_Cell(signs, counts) for signs in found]
        if len(found) == length + 1 and all(cell.num_samples > 0 for cell in cells):
            levels.append(cells)
        length = 2 * length + 1
    return levels


class GroupReader:
    """Norms of the measured groups. Make it on every rank, at attach; `read` on every rank, on measured steps."""

    def __init__(
        self,
        groups: Sequence[MeasuredGroup],
        optimizers: Sequence[torch.optim.Optimizer],
        layout: Layout,
        measured: Measured,
    ) -> None:
        self.groups = tuple(groups)
        self.measured = measured
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        self.spectral = [group.geometry == "spectral" for group in groups for _ in group.parameters]
        self._geometries: list[Geometry] = [group.geometry for group in groups for _ in group.parameters]
        self._group_of = [row for row, group in enumerate(groups) for _ in group.parameters]
        self._layout = layout
        self.owners = Owners(self.parameters, self._geometries, layout)
        self._late = LateTraces() if measured.background and any(self.spectral) else None
        self._pending: _Pending | None = None
        self._optimizer_of: dict[int, tuple[torch.optim.Optimizer, dict[str, Any]]] = {
            id(parameter): (optimizer, param_group)
            for optimizer in optimizers
            for param_group in optimizer.param_groups
            for parameter in param_group["params"]
        }
        if "update" in measured.directions:
            self._directions()  # an optimizer whose momentum we do not know is told at attach

    @torch.no_grad()
    def read(self, captured: CapturedStep) -> list[GroupReading]:
        """Readings of one step, equal on every rank; none where there are no two halves or losses are misweighted.

        Collectives: the gathering of sharded matrices, then one sum of a few numbers per group, and one of the late
        eigenvalues if there are any.
        """
        counts = captured.counts
        levels: list[list[_Cell]] = []
        if self.measured.progress_curve and captured.signed and counts.has_halves:
            levels = _levels(captured.dealing, counts, num_ranks=self._layout.data_parallel.size)
        columns = _Columns(self.measured, len(captured.signed), levels, has_spread=captured.variance is not None)
        sums = torch.zeros(len(self.groups), columns.width, dtype=torch.float64, device=self._layout.ranks.device)
        directions = self._directions() if "update" in self.measured.directions else None
        fill = partial(columns.fill, counts=counts, norms=self.measured.spectral_norms)
        readable = columns.width > 0 and (counts.has_halves if captured.signed else counts.num_spread_groups >= 2)
        whole = self._gather(captured, directions)
        covariances: list[tuple[int, Tensor]] = []
        if readable:
            try:
                self._add_entries(sums, fill, captured, directions)
                covariances = self._add_matrices(sums, fill, whole, captured, directions)
            except Exception:
                # Out of memory, a decomposition that failed: the other ranks wait in the sum below.
                logger.exception("norms failed, this reading is NaN: rank=%d", self._layout.ranks.rank)
                sums.fill_(torch.nan)
        self._layout.ranks.sum_(sums)
        late = self._fetch_late()
        if not readable or counts.num_misweighted or counts.same_samples:
            return late
        found = sums.cpu()
        readings = [
            reading
            for row, group in zip(found, self.groups, strict=True)
            for reading in columns.readings(row, group, counts)
        ]
        if self._late is None or captured.covariance is None:
            return readings
        traces = self._late.start(covariances, num_rows=len(self.groups))
        self._pending = _Pending(traces, found, columns, counts)
        return [reading for reading in readings if not _is_late(reading)] + late

    def _fetch_late(self) -> list[GroupReading]:
        """What the measured step before this one left to the thread. All ranks have left something, or none."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        traces = self._layout.ranks.sum_(pending.traces.result().to(self._layout.ranks.device)).cpu()
        pending.sums[:, -NUM_SPREAD_SUMS] += traces
        return [
            reading
            for row, group in zip(pending.sums, self.groups, strict=True)
            for reading in pending.columns.readings(row, group, pending.counts)
            if _is_late(reading)
        ]

    def _add_entries(
        self,
        sums: Tensor,
        fill: Callable[..., Tensor],
        captured: CapturedStep,
        directions: Sequence[Direction] | None,
    ) -> None:
        for index, row in enumerate(self._group_of):
            if self.spectral[index] or not self.owners.counts_here(index):
                continue
            direction = directions[index] if directions else None
            variance = captured.variance(index) if captured.variance else None
            signed = [pattern[index] for pattern in captured.signed]
            for part in _parts(captured.mean[index], signed, direction, variance):
                sums[row] += fill(self._geometries[index], *part)

    def _gather(self, captured: CapturedStep, directions: Sequence[Direction] | None) -> dict[int, list[Tensor]]:
        """Every quantity's whole matrices, on their owners. A collective where parameters are sharded."""
        if not any(self.spectral):
            return {}
        quantities: list[Sequence[Tensor]] = [captured.mean, *captured.signed]
        if directions is not None:
            momenta = [
                torch.zeros_like(mean) if found.momentum is None else found.momentum.to(mean.dtype)
                for found, mean in zip(directions, captured.mean, strict=True)
            ]
            quantities.append(momenta)
        return self.owners.gather(quantities)

    def _add_matrices(
        self,
        sums: Tensor,
        fill: Callable[..., Tensor],
        whole: dict[int, list[Tensor]],
        captured: CapturedStep,
        directions: Sequence[Direction] | None,
    ) -> list[tuple[int, Tensor]]:
        """Sums of the owned matrices; returns the covariances whose eigenvalues are left to the background."""
        covariances: list[tuple[int, Tensor]] = []
        batches: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
        for index in whole:
            batches[self._group_of[index], tuple(self.parameters[index].shape)].append(index)
        for (row, shape), indices in batches.items():
            at_once = max(1, spectral.MAX_BATCH_ELEMENTS // math.prod(shape))
            for start in range(0, len(indices), at_once):
                chosen = indices[start : start + at_once]
                mean, *rest = [torch.stack(tensors) for tensors in zip(*(whole.pop(i) for i in chosen), strict=True)]
                direction = None
                if directions is not None:
                    direction = _stacked([directions[i] for i in chosen], rest.pop())
                covariance = None
                if captured.covariance is not None and self._late is not None:
                    covariances += [(row, captured.covariance(index)) for index in chosen]
                elif captured.covariance is not None:
                    covariance = torch.stack([captured.covariance(index) for index in chosen])
                sums[row] += fill("spectral", mean, rest, direction, covariance)
        return covariances

    def _directions(self) -> list[Direction]:
        return [direction_of(*self._optimizer_of[id(parameter)], parameter) for parameter in self.parameters]


class _Pending(NamedTuple):
    """A measured step whose eigenvalues are being computed."""

    traces: Future[Tensor]
    sums: Tensor
    columns: _Columns
    counts: Counts


def _is_late(reading: GroupReading) -> bool:
    return reading.estimator == "rank_variance" and reading.geometry == "spectral"


def _parts(
    mean: Tensor, signed: Sequence[Tensor], direction: Direction | None, spread: Tensor | None
) -> Iterator[tuple[Tensor, list[Tensor], Direction | None, Tensor | None]]:
    """The same entries in stretches that fit a cache: sums add up, and temporaries stay small."""
    at_once = _ENTRIES_AT_ONCE["cuda" if mean.is_cuda else "cpu"]
    if mean.numel() <= at_once:
        yield mean, list(signed), direction, spread
        return
    momentum = direction.momentum if direction is not None else None
    optional = [tensor for tensor in (momentum, spread) if tensor is not None]
    stretches = [tensor.reshape(-1).split(at_once) for tensor in (mean, *signed, *optional)]  # type: ignore[no-untyped-call]
    for mean_part, *rest in zip(*stretches, strict=True):
        parts = iter(rest[len(signed) :])
        direction_part = direction
        if direction is not None and momentum is not None:
            direction_part = direction._replace(momentum=next(parts))
        yield mean_part, rest[: len(signed)], direction_part, next(parts, None)


def _stacked(directions: Sequence[Direction], momenta: Tensor) -> Direction:
    """The directions of a batch of matrices, whose param groups may differ: weights of shape (B, 1, 1)."""
    weights = torch.tensor(
        [[found.momentum_weight, found.gradient_weight] for found in directions],
        dtype=momenta.dtype,
        device=momenta.device,
    )
    momentum_weight, gradient_weight = weights.view(-1, 2, 1, 1).unbind(1)
    return Direction(momentum_weight, gradient_weight, momenta)


class _Columns:
    """Where each sum stands in a group's row, and what the finished row says."""

    def __init__(
        self, measured: Measured, num_patterns: int, levels: Sequence[Sequence[_Cell]], *, has_spread: bool
    ) -> None:
        self._num_patterns = num_patterns
        self._directions = measured.directions if num_patterns else ()
        self._levels = levels
        self._has_spread = has_spread
        self.width = (
            len(self._directions) * num_patterns * NUM_SPLIT_SUMS
            + NUM_PROGRESS_SUMS * sum(len(cells) for cells in levels)
            + NUM_SPREAD_SUMS * has_spread
        )

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
        """(width,) float64 of one tensor, or of a batch of equal matrices."""
        sums = partial(self._sums, geometry, mean, signed, direction, spread, counts, norms)
        if geometry != "spectral" or (norms != "exact" and spread is None):
            return sums()
        if all(bool(tensor.isfinite().all()) for tensor in (mean, *signed)):
            return sums()
        return torch.full((self.width,), torch.nan, dtype=torch.float64, device=mean.device)  # LAPACK refuses NaN

    def _sums(
        self,
        geometry: Geometry,
        mean: Tensor,
        signed: Sequence[Tensor],
        direction: Direction | None,
        spread: Tensor | None,
        counts: Counts,
        norms: SpectralNorms,
    ) -> Tensor:
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
        """What one group's finished row says, one reading per direction and estimator."""
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
