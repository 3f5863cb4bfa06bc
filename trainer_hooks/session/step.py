"""One optimizer step of a whole loop: its samples, its micro-batches, and their backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.distributed.layout import Layout
from trainer_hooks.measurement.scheduler import MeasurementScheduler


class GradientScaler(Protocol):
    """The methods of torch.amp.GradScaler that a step calls."""

    def scale(self, outputs: Tensor) -> Tensor:
        """Return the loss times the scale."""
        ...

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, in place."""
        ...

    def step(self, optimizer: torch.optim.Optimizer) -> Any:
        """Step the optimizer, unless a gradient is not finite."""
        ...

    def update(self) -> None:
        """Adapt the scale after a step."""
        ...

    def get_scale(self) -> float:
        """Return the scale. Synchronises with the host."""
        ...


class MicroBatch(NamedTuple):
    """The samples of one rank in one backward pass."""

    indices: Sequence[int]
    """Positions of its samples in the data set."""

    @property
    def num_samples(self) -> int:
        """Samples of this rank in this backward pass."""
        return len(self.indices)


class StepContext(NamedTuple):
    """The parts of a session that a step works with."""

    model: nn.Module
    layout: Layout
    scheduler: MeasurementScheduler
    grad_scaler: GradientScaler | None
    fetch: Callable[[Sequence[int]], Any]
    """Positions in the data set -> collated micro-batch."""
    observe_loss: Callable[[Tensor, int], None]
    """Mean loss and number of samples of one backward pass, for the next report."""
    finish: Callable[[int], None]
    """End the optimizer step of so many samples over all ranks. Every rank."""


class Step:
    """One optimizer step: iterate over its micro-batches, `backward` each loss, then `apply`.

    Args:
        micro_batches: this rank's, in order.
        global_batch_size: samples of the step over all ranks.
        context: parts of the session.
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], *, global_batch_size: int, context: StepContext) -> None:
        self.global_batch_size = global_batch_size
        self.applied = False
        self._micro_batches = micro_batches
        self._context = context
        self._num_samples = 0
        self._num_seen = 0

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's micro-batches. Gradients are averaged over ranks in the last one's backward only."""
        model, layout = self._context.model, self._context.layout
        for index, micro_batch in enumerate(self._micro_batches):
            self._num_samples = micro_batch.num_samples
            is_last = index == len(self._micro_batches) - 1
            # Every rank has equally many micro-batches, so that all of them reduce in the same backward pass.
            for module in layout.sharded_modules:
                module.set_requires_gradient_sync(is_last, recurse=False)
            with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext():
                yield self._context.fetch(micro_batch.indices)

    def backward(self, loss: Tensor) -> None:
        """Run backward of the micro-batch's MEAN loss, scaled so that gradients average over samples."""
        scheduler, scaler = self._context.scheduler, self._context.grad_scaler
        factor = self._context.layout.data_parallel.size * self._num_samples / self.global_batch_size
        scaled = loss * factor if scaler is None else scaler.scale(loss * factor)
        scale = scaler.get_scale() if scaler is not None and scheduler.is_armed else 1.0
        with scheduler.micro_batch(num_samples=self._num_samples, loss_factor=factor, gradient_scale=scale):
            torch.autograd.backward(scaled)
        self._context.observe_loss(loss, self._num_samples)
        self._num_seen += self._num_samples

    def apply(self) -> None:
        """Measure, clip, step, zero the gradients, report, agree on the next plan. Every rank.

        Raises:
            InvalidInputError: backward was not called for every sample of this rank.
        """
        expected = sum(micro_batch.num_samples for micro_batch in self._micro_batches)
        if self._num_seen != expected:
            raise InvalidInputError(
                f"backward saw {self._num_seen} of this rank's {expected} samples: take micro-batches one by one, "
                "call step.backward once for each, and leave none out."
            )
        self._context.finish(self.global_batch_size)
        self.applied = True
