"""What goes along with a measurement: losses, step times, and what measuring cost, since the last report."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor

from trainer_hooks.distributed.collectives import RankGroup
from trainer_hooks.measurement.budget import MeasurementCost


class Interval(NamedTuple):
    """Between two reports."""

    step_seconds: float | None
    """Median of the unmeasured steps, on this rank."""
    loss: float | None
    """Mean over samples and ranks."""
    validation_loss: float | None
    """As this rank was told."""
    cost: MeasurementCost | None
    """Mean over ranks; None where some rank does not know what a step takes."""


class Stopwatch:
    """Losses and times of one rank.

    Args:
        ranks: over which they are averaged.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self._loss_samples = 0
        self._step_seconds: list[float] = []
        self._typical_seconds: float | None = None
        self._step_ended_at: float | None = None
        self._reported_at = time.perf_counter()
        self.validation_loss: float | None = None
        """Goes along with the next report."""

    def observe_loss(self, loss: Tensor, *, num_samples: int) -> None:
        """No host synchronisation."""
        self._loss_sum += loss.detach().double() * num_samples
        self._loss_samples += num_samples

    def end_step(self, *, was_measured: bool) -> float | None:
        """Seconds of the step that ends now; None for the first one."""
        now, before = time.perf_counter(), self._step_ended_at
        self._step_ended_at = now
        if before is not None and not was_measured:
            self._step_seconds.append(now - before)
        return now - before if before is not None else None

    def report(self, *, norm_seconds: float, measured_seconds: float | None) -> Interval:
        """One reduction, every rank; begins anew.

        Args:
            norm_seconds: reductions and norms of the measured step, on this rank.
            measured_seconds: of the whole measured step; None where none was measured, or nobody knows.
        """
        step_seconds = statistics.median(self._step_seconds) if self._step_seconds else self._typical_seconds
        self._typical_seconds = step_seconds
        is_timed = measured_seconds is not None and step_seconds is not None
        elapsed, self._reported_at = time.perf_counter() - self._reported_at, time.perf_counter()
        times = [
            (measured_seconds or 0.0) - (step_seconds or 0.0),
            norm_seconds,
            step_seconds or 0.0,
            elapsed,
            float(is_timed),
        ]
        sums = torch.cat([self._loss_sum[None], self._loss_sum.new_tensor([float(self._loss_samples), *times])])
        loss_sum, num_samples, *averages = self._ranks.sum_(sums).tolist()
        extra, norms, typical, elapsed, timed = (value / self._ranks.size for value in averages)
        validation_loss, self.validation_loss = self.validation_loss, None
        self._loss_sum.zero_()
        self._loss_samples = 0
        self._step_seconds.clear()
        return Interval(
            step_seconds=step_seconds,
            loss=loss_sum / num_samples if num_samples else None,
            validation_loss=validation_loss,
            cost=MeasurementCost(extra, norms, typical, elapsed) if timed == 1 else None,
        )
