"""What one rank keeps of its local gradients during a measured step.

One buffer per sign pattern for split; for rank_variance a mean and a spread. The incoming gradient h_j of micro-batch
j is that of (R n_j / B) times its mean loss, so that the data-parallel mean of the accumulated gradient is the sample
mean over the whole batch. Statistics: float32, or float64 if gradients are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FlatBuffer:
    """One zeroed vector with a view per tensor, so that one collective reduces all of them."""

    def __init__(self, like: Sequence[Tensor], *, dtype: torch.dtype) -> None:
        sizes = [tensor.numel() for tensor in like]
        self.flat = torch.zeros(sum(sizes), dtype=dtype, device=like[0].device if like else None)
        pieces = torch.split(self.flat, sizes)
        self.views = [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def is_low_precision(blocks: Sequence[Tensor]) -> bool:
    """Whether any gradient is bf16 or fp16."""
    return any(block.dtype not in (torch.float32, torch.float64) for block in blocks)


def statistics_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """float64 if any gradient is, else float32."""
    return torch.float64 if any(parameter.dtype == torch.float64 for parameter in parameters) else torch.float32


class SignedAccumulator:
    """d_p = sum_j s_pj h_j over this rank's micro-batches, for one or more sign patterns p; s = +1: half A, -1: half B.

    The data-parallel mean of d_p is (n_A g_A - n_B g_B) / B. One gradient-sized buffer per pattern, sharded where the
    gradient is.
    """

    def __init__(self, blocks: Sequence[Tensor], *, num_patterns: int, keep_sum: bool) -> None:
        dtype = statistics_dtype(blocks)
        rows = num_patterns + keep_sum
        sizes = [block.numel() for block in blocks]
        self.flat = torch.zeros(rows, sum(sizes), dtype=dtype, device=blocks[0].device if blocks else None)
        views = [
            [piece.view(block.shape) for piece, block in zip(torch.split(row, sizes), blocks, strict=True)]
            for row in self.flat.unbind()
        ]
        self.signed = views[:num_patterns]
        self.total = views[num_patterns] if keep_sum else None
        """sum_j h_j in full precision, where the averaged gradient itself is bf16 or fp16."""

    def add(self, index: int, grad: Tensor, *, signs: Sequence[float], scale: float = 1.0) -> None:
        """Take in one micro-batch's gradient of one tensor: signs[p] * scale * grad into pattern p."""
        for pattern, sign in zip(self.signed, signs, strict=True):
            if sign:
                pattern[index].add_(grad, alpha=sign * scale)
        if self.total is not None:
            self.total[index].add_(grad, alpha=scale)


class SpreadAccumulator:
    """Running mean and spread of this rank's micro-batch gradients, by Welford's update.

        delta = g_j - mean;  mean += n_j/(n + n_j) delta;  spread += n n_j/(n + n_j) delta^2  (or delta delta^T)

    Never a difference of squares. Matrices of spectral groups keep an S x S Gram of deviations in float64 instead of a
    spread per entry, because the root of a float32 Gram loses half the digits of its small eigenvalues.
    """

    def __init__(self, parameters: Sequence[Tensor], *, spectral: Sequence[bool], entrywise: Sequence[bool]) -> None:
        dtype = statistics_dtype(parameters)
        self.mean = FlatBuffer(parameters, dtype=dtype)
        self._entry_index = _positions(entrywise)
        self._gram_index = _positions(spectral)
        self.spread = FlatBuffer([p for p, wanted in zip(parameters, entrywise, strict=True) if wanted], dtype=dtype)
        sides = [min(p.shape) for p, wanted in zip(parameters, spectral, strict=True) if wanted]
        self.gram = FlatBuffer(
            [torch.empty(side, side, device=self.mean.flat.device) for side in sides], dtype=torch.float64
        )
        self._num_samples = [0.0] * len(parameters)

    def add(self, index: int, grad: Tensor, *, num_samples: float) -> None:
        """Take in one micro-batch's MEAN gradient of one tensor."""
        before = self._num_samples[index]
        after = before + num_samples
        delta = grad - self.mean.views[index]
        self.mean.views[index].add_(delta, alpha=num_samples / after)
        if before:
            self._add_deviation(index, delta, weight=before * num_samples / after)
        self._num_samples[index] = after

    def recentre(self, index: int, global_mean: Tensor) -> None:
        """Turn the spread around this rank's mean into the spread around the mean over all ranks."""
        delta = self.mean.views[index] - global_mean
        self._add_deviation(index, delta, weight=self._num_samples[index])

    def variance(self, index: int, *, num_groups: int) -> Tensor:
        """Per-sample variance per entry, after the reduction over ranks."""
        return self.spread.views[self._entry_index[index]] / (num_groups - 1)

    def covariance(self, index: int, *, num_groups: int) -> Tensor:
        """(S, S) float64 per-sample covariance of the shorter side, after the reduction over ranks."""
        return self.gram.views[self._gram_index[index]] / (num_groups - 1)

    def _add_deviation(self, index: int, delta: Tensor, *, weight: float) -> None:
        if index in self._entry_index:
            self.spread.views[self._entry_index[index]].addcmul_(delta, delta, value=weight)
        if index in self._gram_index:
            wide = (delta if delta.shape[0] <= delta.shape[1] else delta.mT).double()
            self.gram.views[self._gram_index[index]].addmm_(wide, wide.mT, alpha=weight)


def _positions(wanted: Sequence[bool]) -> dict[int, int]:
    return {index: position for position, index in enumerate(i for i, flag in enumerate(wanted) if flag)}
