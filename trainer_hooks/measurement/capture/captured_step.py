"""What is common to every layout: how micro-batches are dealt out into halves, counted, and handed on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer_hooks.distributed.layout import Layout
from trainer_hooks.estimators import SignPattern
from trainer_hooks.measurement.capture.per_micro_batch import AlongMean


class Dealing(NamedTuple):
    """How the micro-batches of a measured step are dealt out into halves.

    A rank's micro-batches are cut into `num_chunks` stretches of equal number; (rank, stretch) decides the sign.
    """

    patterns: tuple[SignPattern, ...]
    num_chunks: int
    """A power of two, at most num_micro_batches."""
    num_micro_batches: int
    """Planned for this step, per rank."""

    def chunk(self, micro_batch: int) -> int:
        """The stretch that a micro-batch belongs to."""
        return min(micro_batch * self.num_chunks // self.num_micro_batches, self.num_chunks - 1)

    def signs(self, *, rank: int, chunk: int) -> tuple[int, ...]:
        """+1 (half A) or -1 (half B) for each pattern."""
        return tuple(pattern.sign(rank=rank, micro_batch=chunk) for pattern in self.patterns)


@dataclass(frozen=True)
class Counts:
    """Of one measured step, over all ranks."""

    num_samples: float
    """B."""
    num_samples_a: tuple[float, ...]
    """n_A of each sign pattern."""
    num_groups: int
    """Sample groups that were seen apart by the split estimator."""
    num_spread_groups: int
    """And by rank_variance: micro-batches times ranks."""
    num_misweighted: int
    """Micro-batches whose loss factor was not R n_j / B, or that had two backward passes."""
    same_samples: tuple[tuple[int, int], ...]
    """Pairs of data-parallel ranks whose gradients were equal to the last bit."""

    @property
    def has_halves(self) -> bool:
        """Whether every pattern has two halves that are not empty."""
        return self.num_groups >= 2 and all(0 < n < self.num_samples for n in self.num_samples_a)


@dataclass(frozen=True)
class CapturedStep:
    """Reduced over ranks: this rank's blocks of the mean gradient and of the signed means."""

    counts: Counts
    dealing: Dealing
    mean: Sequence[Tensor]
    """gbar per parameter, in the statistics' dtype."""
    signed: Sequence[Sequence[Tensor]]
    """(n_A g_A - n_B g_B) / B per pattern and parameter; empty without the split estimator."""
    variance: Callable[[int], Tensor] | None
    """Parameter -> per-sample variance of this rank's block; entrywise groups. None without rank_variance."""
    covariance: Callable[[int], Tensor] | None
    """Parameter -> (S, S) float64 per-sample covariance of the shorter side; on its owner rank."""
    along_mean: Callable[[], AlongMean] | None = None
    """Inner products of this rank's micro-batches with the mean, where they were asked for. No collective."""
    is_incomplete: bool = False
    """rank_variance was asked for, and some gradient did not come through where it is looked at."""


class GradientCapture(Protocol):
    """The buffers of one measured step."""

    def micro_batch(
        self, *, num_samples: float, loss_factor: float, gradient_scale: float = 1.0
    ) -> AbstractContextManager[None]:
        """Around one backward pass of gradient_scale * loss_factor * (mean loss over num_samples)."""
        ...

    def finish(self, losses: Tensor) -> CapturedStep:
        """Reduce. Every rank, before clipping, with gradients unscaled.

        Args:
            losses: (2,) float64, sums of this rank's losses and of their squares; zeros if not known.
        """
        ...


class Tally:
    """Counts micro-batches of one rank, and adds them up over ranks."""

    def __init__(self, dealing: Dealing, layout: Layout) -> None:
        self.dealing = dealing
        self._layout = layout
        self._num_samples_a = [0.0] * len(dealing.patterns)
        self._micro_batches: list[tuple[float, float]] = []
        self.num_wrong = 0
        """Micro-batches that the capture itself found fault with."""

    @property
    def num_micro_batches(self) -> int:
        """So far."""
        return len(self._micro_batches)

    @property
    def num_local_samples(self) -> float:
        """Of this rank, so far."""
        return sum(samples for samples, _ in self._micro_batches)

    @property
    def chunk(self) -> int:
        """The stretch that the next micro-batch belongs to."""
        return self.dealing.chunk(self.num_micro_batches)

    @property
    def signs(self) -> tuple[int, ...]:
        """Of the next micro-batch."""
        return self.dealing.signs(rank=self._layout.data_parallel.rank, chunk=self.chunk)

    def count(self, *, num_samples: float, loss_factor: float) -> None:
        """One micro-batch is done."""
        for pattern, sign in enumerate(self.signs):
            if sign > 0:
                self._num_samples_a[pattern] += num_samples
        self._micro_batches.append((num_samples, loss_factor))

    def reduce(self, *, seen_apart_in_time_only: bool, fingerprint: Tensor) -> Counts:
        """Three collectives, always: totals, faults, fingerprints.

        Args:
            seen_apart_in_time_only: ranks were averaged before anybody looked.
            fingerprint: (2,) float64 of what this rank alone has seen.
        """
        layout = self._layout
        ranks = layout.ranks
        local = [self.num_local_samples, float(self.num_micro_batches)]
        totals = torch.tensor([*local, *self._num_samples_a], dtype=torch.float64, device=ranks.device)
        ranks.sum_(totals).div_(layout.model_parallel_size)
        num_samples, num_groups, *num_samples_a = totals.tolist()
        size = layout.data_parallel.size
        wrong = self.num_wrong + sum(
            abs(factor * num_samples - size * samples) > 1e-6 * num_samples for samples, factor in self._micro_batches
        )
        faults = torch.tensor(float(wrong), dtype=torch.float64, device=ranks.device)
        ranks.sum_(faults)
        return Counts(
            num_samples=num_samples,
            num_samples_a=tuple(num_samples_a),
            num_groups=min(self.dealing.num_chunks, int(num_groups) // size)
            if seen_apart_in_time_only
            else int(num_groups),
            num_spread_groups=int(num_groups),
            num_misweighted=int(faults.item()),
            same_samples=self._equal_ranks(fingerprint),
        )

    def _equal_ranks(self, fingerprint: Tensor) -> tuple[tuple[int, int], ...]:
        data_parallel_rank = fingerprint.new_tensor([float(self._layout.data_parallel.rank)])
        rows = self._layout.ranks.gather_rows(torch.cat([fingerprint, data_parallel_rank])).tolist()
        first_seen: dict[tuple[float, ...], int] = {}
        pairs = set()
        for *values, rank in rows:
            key = tuple(values)
            if any(key) and all(math.isfinite(value) for value in key):
                first = first_seen.setdefault(key, int(rank))
                if first != int(rank):
                    pairs.add((first, int(rank)))
        return tuple(sorted(pairs))
