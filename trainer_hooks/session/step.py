"""One optimizer step of a whole loop: which samples, which micro-batches, and what happens at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gns_controller.core.contract import GroupReading
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.runs import RunSpecification
from trainer_hooks.data import SampleStream, cut_micro_batches
from trainer_hooks.distributed.clipping import clip_grad_norm
from trainer_hooks.distributed.layout import DataParallel, Layout


class GradientScaler(Protocol):
    """What a step needs of torch.amp.GradScaler."""

    def scale(self, outputs: Tensor) -> Tensor: ...  # noqa: D102
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None: ...  # noqa: D102
    def step(self, optimizer: torch.optim.Optimizer) -> Any: ...  # noqa: D102
    def update(self) -> None: ...  # noqa: D102
    def get_scale(self) -> float: ...  # noqa: D102


class StepSession(Protocol):
    """What a step needs of the session."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    layout: Layout
    data_parallel: DataParallel
    specification: RunSpecification
    samples_seen: int
    max_grad_norm: float | None
    grad_scaler: GradientScaler | None

    @property
    def is_measured(self) -> bool: ...  # noqa: D102

    @property
    def min_micro_batches(self) -> int: ...  # noqa: D102
    def measured(  # noqa: D102
        self, *, num_samples: int, loss_factor: float, gradient_scale: float
    ) -> AbstractContextManager[None]: ...
    def observe_loss(self, loss: Tensor, *, num_samples: int) -> None: ...  # noqa: D102
    def measure(self) -> Sequence[GroupReading]: ...  # noqa: D102
    def supply_halves(self, *, gradient_scale: Tensor | float) -> None: ...  # noqa: D102
    def set_learning_rates(self, *, num_samples: int | None = None) -> None: ...  # noqa: D102
    def advance(self, *, num_samples: int) -> None: ...  # noqa: D102


class Step:
    """One optimizer step: iterate over its micro-batches, `backward` each loss, then `apply`."""

    def __init__(
        self,
        session: StepSession,
        stream: SampleStream,
        dataset: Any,
        collate_fn: Callable[[list[Any]], Any],
        global_batch_size: int,
    ) -> None:
        self.global_batch_size = global_batch_size
        self.applied = False
        self._session = session
        self._stream = stream
        self._dataset = dataset
        self._collate_fn = collate_fn
        self._num_samples = 0
        self._num_seen = 0

    def __iter__(self) -> Iterator[Any]:
        """This rank's micro-batches. Gradients are averaged over ranks in the last one's backward only."""
        session = self._session
        data_parallel, model = session.data_parallel, session.model
        per_rank = self.global_batch_size // data_parallel.size
        sizes = cut_micro_batches(
            per_rank,
            micro_batch_size=session.specification.batch.micro_batch_size,
            min_pieces=session.min_micro_batches,
        )
        position = session.samples_seen + data_parallel.rank * per_rank
        for index, size in enumerate(sizes):
            indices = self._stream.positions(position, size).tolist()
            position += size
            self._num_samples = size
            is_last = index == len(sizes) - 1
            for module in session.layout.sharded_modules:
                module.set_requires_gradient_sync(is_last, recurse=False)
            with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext():
                yield self._collate_fn(self._fetch(indices))

    def backward(self, loss: Tensor) -> None:
        """Backward of the micro-batch's MEAN loss, scaled so that gradients average over samples."""
        session = self._session
        factor = session.data_parallel.size * self._num_samples / self.global_batch_size
        scaler = session.grad_scaler
        scaled = loss * factor if scaler is None else scaler.scale(loss * factor)
        scale = scaler.get_scale() if scaler is not None and session.is_measured else 1.0
        with session.measured(num_samples=self._num_samples, loss_factor=factor, gradient_scale=scale):
            torch.autograd.backward(scaled)
        session.observe_loss(loss, num_samples=self._num_samples)
        self._num_seen += self._num_samples

    def apply(self) -> None:
        """Measure, clip, step, zero the gradients, report, agree on the next plan. Every rank."""
        session = self._session
        share = self.global_batch_size // session.data_parallel.size
        if self._num_seen != share:
            raise InvalidInputError(
                f"backward saw {self._num_seen} of this rank's {share} samples: take micro-batches one by one, "
                "call step.backward once for each, and leave none out."
            )
        session.set_learning_rates(num_samples=self.global_batch_size)
        scaler = session.grad_scaler
        if scaler is not None:
            for optimizer in session.optimizers:
                scaler.unscale_(optimizer)
        session.measure()
        clipped: Tensor | float = 1.0
        if session.max_grad_norm is not None:
            trained = [p for optimizer in session.optimizers for g in optimizer.param_groups for p in g["params"]]
            norm = clip_grad_norm(trained, session.max_grad_norm, session.layout)
            clipped = (session.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        session.supply_halves(gradient_scale=clipped)
        for optimizer in session.optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()
        session.advance(num_samples=self.global_batch_size)
        self.applied = True

    def _fetch(self, indices: list[int]) -> list[Any]:
        if hasattr(self._dataset, "__getitems__"):
            samples: list[Any] = self._dataset.__getitems__(indices)
            return samples
        return [self._dataset[index] for index in indices]
