"""One rank's gradients under DDP or in a single process, micro-batch by micro-batch.

`Tensor.register_hook` on a parameter sees its local gradient once per backward pass: before DDP averages it, inside
`no_sync` too, uses of a tied weight already summed. Hooks exist only while a measured step runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gns_controller.core.contract import Estimator
from trainer_hooks.capture.accumulators import SignedAccumulator, SpreadAccumulator, statistics_dtype
from trainer_hooks.capture.groups import MeasuredGroup


class GradientCapture:
    """The buffers of one measured step, filled by hooks.

    Args:
        groups: what is measured. A parameter belongs to one group.
        estimators: which buffers to keep.
        data_parallel_size: R.
        data_parallel_rank: r; micro-batch a of rank r belongs to half A if r + a is even, so that halves are balanced
            over ranks and over time.
    """

    def __init__(
        self,
        groups: Sequence[MeasuredGroup],
        estimators: Sequence[Estimator],
        *,
        data_parallel_size: int,
        data_parallel_rank: int,
    ) -> None:
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        self._size = data_parallel_size
        self._rank = data_parallel_rank
        self.low_precision = any(p.dtype not in (torch.float32, torch.float64) for p in self.parameters)
        self._dtype = statistics_dtype(self.parameters)
        self.signed: SignedAccumulator | None = None
        self.spread: SpreadAccumulator | None = None
        if "split" in estimators:
            self.signed = SignedAccumulator(self.parameters, keep_sum=self.low_precision)
        if "rank_variance" in estimators:
            spectral = [group.geometry == "spectral" for group in groups for _ in group.parameters]
            self.spread = SpreadAccumulator(
                self.parameters, spectral=spectral, entrywise=[not flag for flag in spectral]
            )
        self.num_samples_a = 0.0
        self.num_samples_b = 0.0
        self.num_groups = 0
        self.num_repeated_backwards = 0
        """Micro-batches in which a tensor got its gradient in two pieces: the spread would count it twice."""
        self.loss_factors: list[tuple[float, float]] = []
        """(samples, loss factor) of each micro-batch, to check that the mean gradient is a mean over samples."""
        self._current: tuple[int, float, float] | None = None
        self._fired: set[int] = set()
        self._repeated = False

    @contextmanager
    def micro_batch(self, *, num_samples: float, loss_factor: float) -> Iterator[None]:
        """Around one backward pass: the gradients of (loss_factor x mean loss over num_samples) are taken in."""
        sign = 1 if (self._rank + self.num_groups) % 2 == 0 else -1
        self._current = (sign, num_samples, loss_factor)
        self._fired.clear()
        handles: list[RemovableHandle] = [
            parameter.register_hook(partial(self._take, index))  # type: ignore[no-untyped-call]  # torch is untyped here
            for index, parameter in enumerate(self.parameters)
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._current = None
        if self.spread is not None:
            for index, parameter in enumerate(self.parameters):
                if index not in self._fired:
                    zero = torch.zeros((), dtype=self._dtype, device=parameter.device)
                    self.spread.add(index, zero.expand(parameter.shape), num_samples=num_samples)
        self.num_groups += 1
        self.num_repeated_backwards += self._repeated
        self._repeated = False
        self.loss_factors.append((num_samples, loss_factor))
        if sign > 0:
            self.num_samples_a += num_samples
        else:
            self.num_samples_b += num_samples

    def _take(self, index: int, grad: Tensor) -> None:
        if self._current is None or grad.is_sparse:
            return
        sign, num_samples, loss_factor = self._current
        if index in self._fired and self.spread is not None:
            self._repeated = True
            return
        self._fired.add(index)
        grad = grad.detach().to(self._dtype)
        if self.signed is not None:
            self.signed.add(index, grad, sign=sign)
        if self.spread is not None:
            self.spread.add(index, grad / loss_factor, num_samples=num_samples)
