"""Losses and step times since the last report, and the cost of measuring, which go along with a measurement."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor

from trainer_hooks.distributed.collectives import RankGroup
from trainer_hooks.measurement.budget import MeasurementCost


class Interval(NamedTuple):
    """Losses and times between two reports."""

    step_seconds: float | None
    """Median of the unmeasured steps, on this rank."""
    loss: float | None
    """Mean over samples and ranks."""
    validation_loss: float | None
    """The value given to this rank, if any."""
    cost: MeasurementCost | None
    """Mean over ranks; None while some rank has not timed an unmeasured step."""


class Stopwatch:
    """Stopwatch for the steps of one rank, and sums of its losses.

    Args:
        ranks: the ranks over which losses and costs are averaged.
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
        """Validation loss that goes along with the next report."""

    def observe_loss(self, loss: Tensor, *, num_samples: int) -> None:
        """Add a mean loss over so many samples. No host synchronisation."""
        self._loss_sum += loss.detach().double() * num_samples
        self._loss_samples += num_samples

    def end_step(self, *, was_measured: bool) -> float | None:
        """Return the seconds of the step that ends now; None for the first one."""
        now, before = time.perf_counter(), self._step_ended_at
        self._step_ended_at = now
        if before is not None and not was_measured:
            self._step_seconds.append(now - before)
        return now - before if before is not None else None

    def report(self, *, norm_seconds: float, measured_seconds: float | None) -> Interval:
        """Average over ranks and begin anew. One reduction, on every rank.

        Args:
            norm_seconds: reductions and norms of the measured step, on this rank.
            measured_seconds: time of the whole measured step; None where none was measured or timed.
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
        cost = MeasurementCost(extra_seconds=extra, norm_seconds=norms, step_seconds=typical, elapsed_seconds=elapsed)
        validation_loss, self.validation_loss = self.validation_loss, None
        self._loss_sum.zero_()
        self._loss_samples = 0
        self._step_seconds.clear()
        return Interval(
            step_seconds=step_seconds,
            loss=loss_sum / num_samples if num_samples else None,
            validation_loss=validation_loss,
            cost=cost if timed == 1 else None,
        )
