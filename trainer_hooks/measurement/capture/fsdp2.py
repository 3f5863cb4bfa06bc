"""Gradients under FSDP2 and HSDP, where no rank holds a whole local gradient once backward is over.

split: halves in time. After the last micro-batch of each stretch but the last, `p.grad` is added to the signed buffers
with weight s_c - s_(c+1); with the final `p.grad` at weight s_last that is sum_c s_c (what stretch c added). No hook.

rank_variance: a seam before the reduce-scatter (`set_custom_reduce_scatter`) sees each micro-batch's unsharded local
gradients as one flat buffer. docs/decisions/0009 says what torch hands over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gns_controller.core.contract import Estimator
from gns_controller.core.errors import InvalidInputError
from trainer_hooks.distributed.collectives import scatter_sum, sum_over
from trainer_hooks.distributed.layout import Layout, parameter_groups_of
from trainer_hooks.distributed.sharding import local_tensor
from trainer_hooks.measurement.capture.accumulators import FlatBuffer, SignedAccumulator, statistics_dtype
from trainer_hooks.measurement.capture.captured_step import CapturedStep, Dealing, Tally
from trainer_hooks.measurement.owners import Owners


class Fsdp2Capture:
    """The buffers of one measured step, in the shard layout of `p.grad`.

    Args:
        parameters: what is measured, each once; DTensors.
        spectral: for each, whether its group's geometry is.
        estimators: which buffers to keep.
        dealing: which micro-batch belongs to which half; its patterns are in time only.
        layout: how the model is spread over ranks.
        owners: which rank keeps the running mean of which matrix (rank_variance).
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        spectral: Sequence[bool],
        estimators: Sequence[Estimator],
        dealing: Dealing,
        layout: Layout,
        owners: Owners,
    ) -> None:
        self._parameters = parameters
        self._layout = layout
        self._tally = Tally(dealing, layout)
        blocks = [local_tensor(parameter.detach()) for parameter in parameters]
        self._blocks = blocks
        self._dtype = statistics_dtype(blocks)
        self._signed: SignedAccumulator | None = None
        if "split" in estimators:
            self._signed = SignedAccumulator(blocks, num_patterns=len(dealing.patterns), keep_sum=False)
        self._seam: _SpreadSeam | None = None
        if "rank_variance" in estimators:
            self._seam = _SpreadSeam(parameters, spectral, layout, owners, dtype=self._dtype)

    @contextmanager
    def micro_batch(self, *, num_samples: float, loss_factor: float, gradient_scale: float = 1.0) -> Iterator[None]:
        """Around one backward pass. Where a stretch ends, its gradients are reduced now and not later."""
        tally, dealing = self._tally, self._tally.dealing
        chunk, following = tally.chunk, dealing.chunk(tally.num_micro_batches + 1)
        is_last = tally.num_micro_batches + 1 >= dealing.num_micro_batches
        ends_stretch = chunk != following and not is_last
        if ends_stretch or self._seam is not None:
            for module in self._layout.sharded_modules:
                module.set_requires_gradient_sync(True, recurse=False)
        with self._seam.opened(num_samples, loss_factor, gradient_scale) if self._seam else _nothing():
            yield
        if ends_stretch and self._signed is not None:
            self._wait_for_reductions()
            now, then = dealing.signs(rank=0, chunk=chunk), dealing.signs(rank=0, chunk=following)
            self._add_gradients([a - b for a, b in zip(now, then, strict=True)], scale=1 / gradient_scale)
        tally.count(num_samples=num_samples, loss_factor=loss_factor)

    def finish(self, losses: Tensor) -> CapturedStep:
        """Collectives: counts; with rank_variance, Grams and (HSDP) the spread over replicas."""
        dealing = self._tally.dealing
        counts = self._tally.reduce(seen_apart_in_time_only=True, fingerprint=losses)
        if self._signed is not None:
            self._add_gradients(dealing.signs(rank=0, chunk=dealing.num_chunks - 1), scale=1.0)
        mean = [
            torch.zeros_like(block, dtype=self._dtype)
            if p.grad is None
            else local_tensor(p.grad.detach(), like=p).to(self._dtype)
            for p, block in zip(self._parameters, self._blocks, strict=True)
        ]
        seam = self._seam
        equal_shares = self._tally.num_local_samples * self._layout.data_parallel.size == counts.num_samples
        complete = seam is not None and seam.finish(
            num_micro_batches=self._tally.num_micro_batches, equal_shares=equal_shares
        )
        groups = max(counts.num_spread_groups, 2)
        return CapturedStep(
            counts=counts,
            dealing=dealing,
            mean=mean,
            signed=self._signed.signed if self._signed is not None else (),
            variance=partial(seam.variance, num_groups=groups) if seam is not None and complete else None,
            covariance=partial(seam.covariance, num_groups=groups) if seam is not None and complete else None,
            is_incomplete=seam is not None and not complete,
        )

    def _wait_for_reductions(self) -> None:
        """On a GPU gradients are reduced on other streams; torch waits for them after the last backward only."""
        if self._blocks and self._blocks[0].is_cuda:
            for module in self._layout.sharded_modules:
                for group in parameter_groups_of(module):
                    if group._post_reduce_event is not None:
                        torch.cuda.current_stream().wait_event(group._post_reduce_event)

    def _add_gradients(self, weights: Sequence[float], *, scale: float) -> None:
        assert self._signed is not None
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                grad = local_tensor(parameter.grad.detach(), like=parameter).to(self._dtype)
                self._signed.add(index, grad, signs=weights, scale=scale)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _SpreadSeam:
    """Spread of the local gradients of all ranks and micro-batches, from the inputs of FSDP2's reduce-scatters.

    Every FSDP parameter group reduces its local gradients h (a dim-0 chunk per rank, padded, rank after rank); this
    adds, at the same place in the same order on every rank, one all-reduce for their mean and one reduce-scatter of the
    squared deviations. Within one micro-batch

        spread += sum_j n_j (g_j - gbar_a)^2

    and between micro-batches, by Welford, spread += n n_a / (n + n_a) (gbar_a - mean)^2. Spectral groups keep S x S
    float64 Grams of the same deviations, and their owners the running mean matrix.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        spectral: Sequence[bool],
        layout: Layout,
        owners: Owners,
        *,
        dtype: torch.dtype,
    ) -> None:
        self._layout = layout
        self._owners = owners
        self._dtype = dtype
        blocks = [local_tensor(parameter.detach()) for parameter in parameters]
        entrywise = [not flag for flag in spectral]
        self._entry_index = {i: n for n, i in enumerate(i for i, flag in enumerate(entrywise) if flag)}
        self._gram_index = {i: n for n, i in enumerate(i for i, flag in enumerate(spectral) if flag)}
        entry_blocks = [blocks[i] for i in self._entry_index]
        self._mean = FlatBuffer(entry_blocks, dtype=dtype)
        self._spread = FlatBuffer(entry_blocks, dtype=dtype)
        device = blocks[0].device
        sides = [min(parameters[i].shape) for i in self._gram_index]
        self._gram = FlatBuffer([torch.empty(side, side, device=device) for side in sides], dtype=torch.float64)
        self._owned_mean = {
            i: torch.zeros(tuple(parameters[i].shape), dtype=dtype, device=device) for i in owners.owned
        }
        self._num_seen: dict[int, int] = dict.fromkeys(range(len(parameters)), 0)
        self._num_samples: dict[int, float] = dict.fromkeys(range(len(parameters)), 0.0)
        self._weights = (0.0, 1.0, 1.0)
        index_of = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._groups = [
            (module, group, [index_of.get(id(found.sharded_param)) for found in _trained(group)])
            for module in layout.sharded_modules
            for group in parameter_groups_of(module)
        ]

    @contextmanager
    def opened(self, num_samples: float, loss_factor: float, gradient_scale: float) -> Iterator[None]:
        """Stand before every reduce-scatter for the time of one backward pass."""
        self._weights = (num_samples, loss_factor, gradient_scale)
        before = []
        for module, group, indices in self._groups:
            before.append(group._reduce_scatter_comm)
            seam: Any = _Seam(group._reduce_scatter_comm, partial(self._take, group, indices))
            module.set_custom_reduce_scatter(seam)
        try:
            yield
        finally:
            for (module, _, _), comm in zip(self._groups, before, strict=True):
                module.set_custom_reduce_scatter(comm)

    def finish(self, *, num_micro_batches: int, equal_shares: bool) -> bool:
        """Add up over ranks. False, on every rank, where a parameter was left out of a reduction or shares differ."""
        layout = self._layout
        missing = sum(count != num_micro_batches for count in self._num_seen.values()) + (not equal_shares)
        replicas = getattr(self._groups[0][1].mesh_info, "replicate_process_group", None)
        if replicas is not None:
            sum_over(self._spread.flat, [replicas])
        layout.ranks.sum_(self._gram.flat)
        found = layout.ranks.sum_(torch.tensor(float(missing), device=layout.ranks.device))
        return float(found) == 0

    def variance(self, index: int, *, num_groups: int) -> Tensor:
        """Per-sample variance per entry of this rank's block."""
        return self._spread.views[self._entry_index[index]] / (num_groups - 1)

    def covariance(self, index: int, *, num_groups: int) -> Tensor:
        """(S, S) float64 per-sample covariance of the shorter side."""
        return self._gram.views[self._gram_index[index]] / (num_groups - 1)

    def _take(self, group: Any, indices: Sequence[int | None], local: Tensor, shards: dist.ProcessGroup) -> None:
        num_samples, loss_factor, gradient_scale = self._weights
        num_ranks = shards.size()
        trained = _trained(group)
        sizes = [_padded_share(found._orig_size, num_ranks) for found in trained]
        if local.numel() != num_ranks * sum(sizes):
            return  # some parameter got no gradient: which one the buffer does not tell
        local = local.to(self._dtype) / (loss_factor * gradient_scale)
        replicas = getattr(group.mesh_info, "replicate_process_group", None)
        data_parallel_size = self._layout.data_parallel.size
        mean = sum_over(local.clone(), [shards] if replicas is None else [shards, replicas]).div_(data_parallel_size)
        deviation = local.sub_(mean)
        step_samples = num_samples * data_parallel_size
        has_entries = any(index in self._entry_index for index in indices)
        squares = scatter_sum(deviation.square().mul_(num_samples), shards) if has_entries else None
        my_mean = mean.view(num_ranks, -1)[shards.rank()]
        is_first_replica = replicas is None or replicas.rank() == 0
        offset = 0
        for index, found, size in zip(indices, trained, sizes, strict=True):
            span = slice(offset, offset + size)
            offset += size
            if index is None:
                continue
            before = self._num_samples[index]
            after = before + step_samples
            between = before * step_samples / after
            if index in self._entry_index:
                assert squares is not None
                position = self._entry_index[index]
                block = self._spread.views[position]
                block.add_(_block(squares[span], block))
                delta = _block(my_mean[span], block) - self._mean.views[position]
                self._mean.views[position].add_(delta, alpha=step_samples / after)
                if before and is_first_replica:
                    block.addcmul_(delta, delta, value=between)
            else:
                shape = tuple(found._orig_size)
                gram = self._gram.views[self._gram_index[index]]
                _add_gram(gram, _whole(deviation, span, num_ranks, shape), weight=num_samples)
                if index in self._owned_mean:
                    running = self._owned_mean[index]
                    delta = _whole(mean, span, num_ranks, shape) - running
                    running.add_(delta, alpha=step_samples / after)
                    if before:
                        _add_gram(gram, delta, weight=between)
            self._num_samples[index] = after
            self._num_seen[index] += 1


class _Seam:
    """The reduce-scatter that was there, and a look at what goes into it: torch's ReduceScatter interface."""

    def __init__(self, inner: Any, look: Callable[[Tensor, dist.ProcessGroup], None]) -> None:
        self._inner = inner
        self._look = look

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer: Tensor = self._inner.allocate(size, dtype=dtype, device=device)
        return buffer

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        self._look(input_tensor, group)
        return self._inner(output_tensor, input_tensor, group=group, op=op, async_op=async_op)


def check_spread_seam(parameters: Sequence[Tensor], spectral: Sequence[bool], layout: Layout) -> None:
    """rank_variance on sharded parameters: what it cannot do is said at attach.

    Raises:
        InvalidInputError: shards of one rank, parameters sharded along another dimension than the first, a reduction
            in float16 or float64, several parameter groups in one call, or matrices that are tensor parallel too.
    """
    reasons = []
    for module in layout.sharded_modules:
        groups = parameter_groups_of(module)
        for group in groups:
            if len(groups) > 1:
                reasons.append("a fully_shard call with several parameter groups")
            if getattr(group.mesh_info, "shard_mesh_size", 1) < 2:
                reasons.append("shards of a single rank")
            if any(_reduce_dtype(group, found) not in (torch.float32, torch.bfloat16) for found in group.fsdp_params):
                reasons.append("a reduction in float16 or float64, which torch divides in two places")
            if any(getattr(found.fsdp_placement, "dim", 0) != 0 for found in group.fsdp_params):
                reasons.append("parameters sharded along another dimension than the first")
    if layout.model_parallel_size > 1 and any(spectral):
        reasons.append("tensor-parallel matrices")
    if layout.averages_in_backward and any(not isinstance(parameter, DTensor) for parameter in parameters):
        reasons.append("parameters that fully_shard does not manage")
    if reasons:
        raise InvalidInputError(
            f"the rank_variance estimator is not available with {' and '.join(dict.fromkeys(reasons))}; "
            "use estimators=['split'], which is, and a policy that follows it (estimator='split')."
        )


def _reduce_dtype(group: Any, found: Any) -> torch.dtype:
    policy = group.mp_policy
    dtype: torch.dtype = policy.reduce_dtype or policy.param_dtype or found.sharded_param.dtype
    return dtype


def _trained(group: Any) -> list[Any]:
    """Frozen parameters are not reduced."""
    return [found for found in group.fsdp_params if found.sharded_param.requires_grad]


def _padded_share(shape: Sequence[int], num_ranks: int) -> int:
    """Elements of one rank's padded dim-0 chunk."""
    return -(-shape[0] // num_ranks) * prod(shape[1:])


def _block(flat: Tensor, like: Tensor) -> Tensor:
    """The unpadded front of one rank's chunk."""
    return flat[: like.numel()].view(like.shape)


def _whole(flat: Tensor, span: slice, num_ranks: int, shape: tuple[int, ...]) -> Tensor:
    """One parameter, put together from every rank's chunk and unpadded."""
    rows = flat.view(num_ranks, -1)[:, span].reshape(-1, *shape[1:])
    return rows[: shape[0]]


def _add_gram(gram: Tensor, deviation: Tensor, *, weight: float) -> None:
    wide = (deviation if deviation.shape[0] <= deviation.shape[1] else deviation.mT).double()
    gram.addmm_(wide, wide.mT, alpha=weight)
