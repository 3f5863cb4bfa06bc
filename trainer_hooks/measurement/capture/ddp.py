"""One rank's gradients where it holds them whole: DDP, one process, tensor parallel alone.

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
from trainer_hooks.distributed.layout import Layout
from trainer_hooks.distributed.sharding import local_tensor
from trainer_hooks.measurement.capture.accumulators import (
    FlatBuffer,
    SignedAccumulator,
    SpreadAccumulator,
    is_low_precision,
    statistics_dtype,
)
from trainer_hooks.measurement.capture.captured_step import CapturedStep, Dealing, Tally
from trainer_hooks.measurement.capture.per_micro_batch import KeptGradients


class DdpCapture:
    """The buffers of one measured step, filled by hooks.

    Args:
        parameters: what is measured, each once.
        spectral: for each, whether its group's geometry is.
        estimators: which buffers to keep.
        dealing: which micro-batch belongs to which half.
        layout: how the model is spread over ranks.
        inner_products: keep every micro-batch's gradients, for their inner products with the mean.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        spectral: Sequence[bool],
        estimators: Sequence[Estimator],
        dealing: Dealing,
        layout: Layout,
        *,
        inner_products: bool = False,
    ) -> None:
        self._parameters = parameters
        self._layout = layout
        self._tally = Tally(dealing, layout)
        blocks = [local_tensor(parameter.detach()) for parameter in parameters]
        self._low_precision = is_low_precision(blocks)
        self._dtype = statistics_dtype(blocks)
        self._signed: SignedAccumulator | None = None
        self._spread: SpreadAccumulator | None = None
        if "split" in estimators:
            self._signed = SignedAccumulator(blocks, num_patterns=len(dealing.patterns), keep_sum=self._low_precision)
        if "rank_variance" in estimators:
            self._spread = SpreadAccumulator(blocks, spectral=spectral, entrywise=[not flag for flag in spectral])
        self._kept = KeptGradients(len(parameters)) if inner_products else None
        self._fired: set[int] = set()
        self._repeated = False

    @contextmanager
    def micro_batch(self, *, num_samples: float, loss_factor: float, gradient_scale: float = 1.0) -> Iterator[None]:
        """Around one backward pass: its local gradients are taken in."""
        tally = self._tally
        signs = tally.signs
        self._fired.clear()
        if self._kept is not None:
            self._kept.begin(num_samples=num_samples)
        take = partial(self._take, signs=signs, num_samples=num_samples, loss_factor=loss_factor, scale=gradient_scale)
        handles: list[RemovableHandle] = [
            parameter.register_hook(partial(take, index))  # type: ignore[no-untyped-call]  # torch is untyped here
            for index, parameter in enumerate(self._parameters)
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self._spread is not None:
            for index, parameter in enumerate(self._parameters):
                if index not in self._fired:
                    zero = torch.zeros((), dtype=self._dtype, device=parameter.device)
                    self._spread.add(index, zero.expand(local_tensor(parameter).shape), num_samples=num_samples)
        tally.num_wrong += self._repeated
        self._repeated = False
        tally.count(num_samples=num_samples, loss_factor=loss_factor)

    def finish(self, losses: Tensor) -> CapturedStep:
        """Collectives, in this order: counts; signed; the mean where gradients are low precision; spreads; Grams."""
        size, ranks = self._layout.data_parallel.size, self._layout.ranks
        seen = self._signed.flat if self._signed is not None else self._spread.mean.flat if self._spread else losses
        fingerprint = torch.stack([torch.linalg.vector_norm(seen, ord=order) for order in (1, 2)]).double()
        counts = self._tally.reduce(seen_apart_in_time_only=False, fingerprint=fingerprint)
        if self._signed is not None and size > 1:
            ranks.sum_(self._signed.flat).div_(size)
        mean = self._mean_grads(counts.num_samples)
        spread = self._spread
        if spread is not None:
            for index, mean_grad in enumerate(mean):
                spread.recentre(index, mean_grad)
            if size > 1:
                ranks.sum_(spread.spread.flat)
                ranks.sum_(spread.gram.flat)
        groups = max(counts.num_spread_groups, 2)
        return CapturedStep(
            counts=counts,
            dealing=self._tally.dealing,
            mean=mean,
            signed=self._signed.signed if self._signed is not None else (),
            variance=partial(spread.variance, num_groups=groups) if spread is not None else None,
            covariance=partial(spread.covariance, num_groups=groups) if spread is not None else None,
            along_mean=partial(self._kept.along, mean) if self._kept is not None else None,
        )

    def _take(
        self,
        index: int,
        grad: Tensor,
        *,
        signs: Sequence[int],
        num_samples: float,
        loss_factor: float,
        scale: float,
    ) -> None:
        if grad.is_sparse:
            return
        if index in self._fired and self._spread is not None:
            self._repeated = True
            return
        self._fired.add(index)
        grad = local_tensor(grad.detach(), like=self._parameters[index])
        if self._kept is not None:
            self._kept.add(index, grad, scale=1 / (loss_factor * scale))
        grad = grad.to(self._dtype)
        if self._signed is not None:
            self._signed.add(index, grad, signs=signs, scale=1 / scale)
        if self._spread is not None:
            self._spread.add(index, grad / (loss_factor * scale), num_samples=num_samples)

    def _mean_grads(self, num_samples: float) -> Sequence[Tensor]:
        """gbar in the statistics' dtype: the averaged gradient itself, or a full-precision reduction."""
        if not self._low_precision:
            return [
                torch.zeros_like(local_tensor(p.detach())) if p.grad is None else local_tensor(p.grad.detach(), like=p)
                for p in self._parameters
            ]
        if self._signed is not None and self._signed.total is not None:
            return self._signed.total
        assert self._spread is not None
        mean = FlatBuffer(self._spread.mean.views, dtype=self._dtype)
        share = self._tally.num_local_samples / num_samples if num_samples else 0.0
        mean.flat.copy_(self._spread.mean.flat).mul_(share)
        if self._layout.data_parallel.size > 1:
            self._layout.ranks.sum_(mean.flat)
        return mean.views
