"""From one measured step's buffers to readings: reductions in a fixed order, then norms, one owner per tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gns_controller.core.contract import Geometry, GroupReading
from trainer_hooks.capture.accumulators import FlatBuffer
from trainer_hooks.capture.ddp import GradientCapture
from trainer_hooks.capture.groups import MeasuredGroup
from trainer_hooks.collectives import DataParallelGroup
from trainer_hooks.estimators import euclidean, pure_noise_reading, sign, spectral
from trainer_hooks.estimators.geometries import SPLIT_SUMS
from trainer_hooks.estimators.sums import (
    NUM_SPLIT_SUMS,
    NUM_SPREAD_SUMS,
    split_dual_norms,
    spread_dual_norms,
)

logger = logging.getLogger(__name__)


class Counts(NamedTuple):
    """Of one measured step, over all ranks."""

    num_samples_a: float
    num_samples_b: float
    num_groups: int
    num_misweighted: int
    """Micro-batches whose loss factor was not R n_j / B, or that had two backward passes."""

    @property
    def num_samples(self) -> float:
        """B."""
        return self.num_samples_a + self.num_samples_b


def owners_of(parameters: Sequence[Tensor], geometries: Sequence[Geometry], *, size: int) -> list[int]:
    """The rank that computes each tensor's norms: heaviest first, always to the least loaded rank."""
    costs = [
        float(parameter.numel()) * (min(parameter.shape) if geometry == "spectral" else 1)
        for parameter, geometry in zip(parameters, geometries, strict=True)
    ]
    load, owners = [0.0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[index] = min(range(size), key=load.__getitem__)
        load[owners[index]] += costs[index]
    return owners


@torch.no_grad()
def read_groups(
    capture: GradientCapture, groups: Sequence[MeasuredGroup], data_parallel: DataParallelGroup
) -> tuple[Counts, list[GroupReading]]:
    """Reduce the buffers and compute every group's reading. Call it on every rank, before clipping.

    Collectives, always the same and in this order: counts; split buffer (and its sum where gradients are low
    precision); rank_variance mean where gradients are low precision, spreads, Grams; sums of norms. Which of them exist
    depends on the estimators and dtypes only, which all ranks share.

    Returns:
        Counts over all ranks, and readings; none where fewer than two groups, an empty half or misweighted losses
        leave nothing to compare. Equal on every rank.
    """
    size = data_parallel.size
    counts = _reduce_counts(capture, data_parallel)
    measurable = counts.num_groups >= 2 and min(counts.num_samples_a, counts.num_samples_b) > 0
    mean_grads = _mean_grads(capture, counts, data_parallel)
    if capture.signed is not None:
        data_parallel.sum_(capture.signed.signed.flat).div_(size)
    if capture.spread is not None:
        for index, mean_grad in enumerate(mean_grads):
            capture.spread.recentre(index, mean_grad)
        data_parallel.sum_(capture.spread.spread.flat)
        data_parallel.sum_(capture.spread.gram.flat)

    geometries = [group.geometry for group in groups for _ in group.parameters]
    owners = owners_of(capture.parameters, geometries, size=size)
    sums = torch.zeros(len(groups), NUM_SPLIT_SUMS + NUM_SPREAD_SUMS, dtype=torch.float64, device=data_parallel.device)
    if measurable:
        index = 0
        for row, group in enumerate(groups):
            for _ in group.parameters:
                if owners[index] == data_parallel.rank:
                    _add_sums(sums[row], index, group.geometry, mean_grads[index], capture, counts)
                index += 1
    data_parallel.sum_(sums)
    if not measurable or counts.num_misweighted:
        return counts, []
    return counts, _readings(sums.cpu(), groups, capture, counts)


def _add_sums(
    row: Tensor, index: int, geometry: Geometry, mean_grad: Tensor, capture: GradientCapture, counts: Counts
) -> None:
    if capture.signed is not None:
        signed = capture.signed.signed.views[index]
        scale_a = counts.num_samples / (2 * counts.num_samples_a)
        scale_b = counts.num_samples / (2 * counts.num_samples_b)
        half_a = (mean_grad + signed) * scale_a
        half_b = (mean_grad - signed) * scale_b
        difference = signed * (scale_a + scale_b)
        if scale_a != scale_b:
            difference = difference + mean_grad * (scale_a - scale_b)
        row[:NUM_SPLIT_SUMS] += _finite_or_nan(SPLIT_SUMS[geometry], half_a, half_b, difference)
    if capture.spread is not None:
        if geometry == "spectral":
            covariance = capture.spread.covariance(index, num_groups=counts.num_groups)
            row[NUM_SPLIT_SUMS:] += _finite_or_nan(spectral.spread_sums, mean_grad, covariance)
        else:
            variance = capture.spread.variance(index, num_groups=counts.num_groups)
            spread_sums = euclidean.spread_sums if geometry == "euclidean" else sign.spread_sums
            row[NUM_SPLIT_SUMS:] += spread_sums(mean_grad, variance)


def _finite_or_nan(sums_of: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """LAPACK refuses NaN and may fail on a finite matrix; no other rank may be left waiting for that."""
    if all(bool(tensor.isfinite().all()) for tensor in tensors):
        try:
            return sums_of(*tensors)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch hides it from type checkers
            logger.warning("a decomposition failed, this reading is NaN: shape=%s", tuple(tensors[0].shape))
    return torch.full((), torch.nan, dtype=torch.float64, device=tensors[0].device)


def _readings(
    sums: Tensor, groups: Sequence[MeasuredGroup], capture: GradientCapture, counts: Counts
) -> list[GroupReading]:
    found: list[GroupReading] = []
    for row, group in enumerate(groups):
        reading = partial(
            GroupReading,
            group=group.name,
            geometry=group.geometry,
            num_groups=counts.num_groups,
            samples_per_group=counts.num_samples / counts.num_groups,
            learning_rate=float(group.param_groups[0]["lr"]),
        )
        if capture.signed is not None:
            split = split_dual_norms(
                sums[row, :NUM_SPLIT_SUMS],
                geometry=group.geometry,
                num_samples_a=counts.num_samples_a,
                num_samples_b=counts.num_samples_b,
            )
            assert split.progress is not None
            found.append(
                reading(
                    estimator="split",
                    noise=split.noise.item(),
                    signal=split.signal.item(),
                    progress=split.progress.item(),
                )
            )
        if capture.spread is not None:
            spread = spread_dual_norms(sums[row, NUM_SPLIT_SUMS:], geometry=group.geometry)
            found.append(
                reading(
                    estimator="rank_variance",
                    noise=spread.noise.item(),
                    signal=spread.signal.item(),
                    ceiling_samples=pure_noise_reading(
                        group.geometry,
                        global_batch_size=counts.num_samples,
                        num_groups=counts.num_groups,
                        shapes=group.shapes,
                    ),
                )
            )
    return found


def _reduce_counts(capture: GradientCapture, data_parallel: DataParallelGroup) -> Counts:
    totals = torch.tensor(
        [capture.num_samples_a, capture.num_samples_b, float(capture.num_groups)],
        dtype=torch.float64,
        device=data_parallel.device,
    )
    data_parallel.sum_(totals)
    num_samples_a, num_samples_b, num_groups = totals.tolist()
    total = num_samples_a + num_samples_b
    wrong = sum(
        abs(factor * total - data_parallel.size * num_samples) > 1e-6 * total
        for num_samples, factor in capture.loss_factors
    )
    wrong += capture.num_repeated_backwards
    misweighted = torch.tensor(float(wrong), dtype=torch.float64, device=data_parallel.device)
    data_parallel.sum_(misweighted)
    return Counts(num_samples_a, num_samples_b, int(num_groups), int(misweighted.item()))


def _mean_grads(capture: GradientCapture, counts: Counts, data_parallel: DataParallelGroup) -> Sequence[Tensor]:
    """gbar per tensor in the statistics' dtype: the averaged gradient itself, or a full-precision reduction."""
    if not capture.low_precision:
        return [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
            for parameter in capture.parameters
        ]
    if capture.signed is not None and capture.signed.total is not None:
        data_parallel.sum_(capture.signed.total.flat).div_(data_parallel.size)
        return capture.signed.total.views
    assert capture.spread is not None
    local_samples = capture.num_samples_a + capture.num_samples_b
    mean = FlatBuffer(capture.parameters, dtype=capture.spread.mean.flat.dtype)
    mean.flat.copy_(capture.spread.mean.flat).mul_(local_samples / counts.num_samples if counts.num_samples else 0.0)
    data_parallel.sum_(mean.flat)
    return mean.views
