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
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gns_controller.core.contract import Geometry, GroupReading
from trainer_hooks.distributed.layout import Layout
from trainer_hooks.estimators import spectral
from trainer_hooks.measurement.background_eigenvalues import LateTraces
from trainer_hooks.measurement.capture.captured_step import CapturedStep, Counts
from trainer_hooks.measurement.capture.per_micro_batch import ENTRIES_AT_ONCE
from trainer_hooks.measurement.groups import MeasuredGroup
from trainer_hooks.measurement.owners import Owners
from trainer_hooks.measurement.sums_row import Cell, Columns, Measured, levels_of
from trainer_hooks.measurement.update_direction import Direction, direction_of

logger = logging.getLogger(__name__)


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
        levels: list[list[Cell]] = []
        if self.measured.progress_curve and captured.signed and counts.has_halves:
            levels = levels_of(captured.dealing, counts, num_ranks=self._layout.data_parallel.size)
        columns = Columns(
            self.measured,
            len(captured.signed),
            levels,
            has_spread=captured.variance is not None,
            has_inner_products=captured.along_mean is not None,
        )
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
                self._add_inner_products(sums, columns, captured)
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
        pending.sums[:, pending.columns.spread_column] += traces
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
                added = fill(self._geometries[index], *part)
                sums[row, : len(added)] += added

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
                if captured.covariance is not None:
                    found = [captured.covariance(index) for index in chosen]
                    if self._late is not None:
                        covariances += [(row, matrix) for matrix in found]
                    if self._late is None or self.measured.also_euclidean:
                        covariance = torch.stack(found)
                added = fill("spectral", mean, rest, direction, covariance)
                sums[row, : len(added)] += added
        return covariances

    def _add_inner_products(self, sums: Tensor, columns: Columns, captured: CapturedStep) -> None:
        if captured.along_mean is None:
            return
        along = captured.along_mean()
        for row in range(len(self.groups)):
            columns.fill_inner_products(sums[row], along, [i for i, group in enumerate(self._group_of) if group == row])

    def _directions(self) -> list[Direction]:
        return [direction_of(*self._optimizer_of[id(parameter)], parameter) for parameter in self.parameters]


class _Pending(NamedTuple):
    """A measured step whose eigenvalues are being computed."""

    traces: Future[Tensor]
    sums: Tensor
    columns: Columns
    counts: Counts


def _is_late(reading: GroupReading) -> bool:
    return reading.estimator == "rank_variance" and reading.geometry == "spectral"


def _parts(
    mean: Tensor, signed: Sequence[Tensor], direction: Direction | None, spread: Tensor | None
) -> Iterator[tuple[Tensor, list[Tensor], Direction | None, Tensor | None]]:
    """The same entries in stretches that fit a cache: sums add up, and temporaries stay small."""
    at_once = ENTRIES_AT_ONCE["cuda" if mean.is_cuda else "cpu"]
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
