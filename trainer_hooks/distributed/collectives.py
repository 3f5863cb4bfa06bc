"""The only module that communicates. Every function here is called by every data-parallel rank, on every path.

No function can deadlock by itself: each issues the same collectives in the same order on all ranks, whatever the
tensors hold and whoever failed before. A rank that dies is the process group's timeout and torchrun's business.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gns_controller.core.contract import BatchPlan
from gns_controller.core.errors import GnsError, PlanDivergedError

_MESSAGE_BYTES = 65536


class Pending(NamedTuple):
    """What a collective in the background fills."""

    tensor: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The tensor, filled as far as the device's own order of work goes."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


@dataclass(frozen=True)
class RankGroup:
    """Ranks that work on one model, and how to reach them. A single process is a group of one."""

    rank: int
    size: int
    device: torch.device
    process_group: dist.ProcessGroup | None

    @classmethod
    def find(cls, device: torch.device, process_group: dist.ProcessGroup | None = None) -> RankGroup:
        """The given group, else the default one, else a group of one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(rank=0, size=1, device=device, process_group=None)
        return cls(dist.get_rank(process_group), dist.get_world_size(process_group), device, process_group)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.process_group)
        return tensor

    def gather_objects(self, item: Any) -> list[Any]:
        """Everybody's small picklable object, in the order of ranks, on every rank. For attach, not for steps."""
        if self.size == 1:
            return [item]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, item, group=self.process_group)
        return gathered

    def broadcast_object(self, item: Any) -> Any:
        """Rank 0's small picklable object, on every rank; the others' is ignored. For attach, not for steps."""
        if self.size == 1:
            return item
        found = [item if self.rank == 0 else None]
        source = dist.get_global_rank(self.process_group, 0) if self.process_group is not None else 0
        dist.broadcast_object_list(found, src=source, group=self.process_group)
        return found[0]

    def gather_rows(self, row: Tensor) -> Tensor:
        """(size, *row.shape): everybody's tensor of one shape, on every rank."""
        if self.size == 1:
            return row[None]
        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row, group=self.process_group)
        return torch.stack(rows)

    def exchange(self, outgoing: Tensor, *, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        """All-to-all of one flat tensor: send_sizes[r] elements go to rank r, receive_sizes[r] come from it.

        Every rank knows every size beforehand, so sizes that do not match are our own bug.
        """
        return self.start_exchange(outgoing, send_sizes=send_sizes, receive_sizes=receive_sizes).wait()

    def start_exchange(self, outgoing: Tensor, *, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Pending:
        """exchange, in the background. Bytes are sent, so any dtype passes unchanged over any backend."""
        if self.size == 1:
            return Pending(outgoing, None)
        width = outgoing.element_size()
        incoming = outgoing.new_empty(sum(receive_sizes))
        work = dist.all_to_all_single(
            incoming.view(torch.uint8),
            outgoing.view(torch.uint8),
            [width * size for size in receive_sizes],
            [width * size for size in send_sizes],
            group=self.process_group,
            async_op=True,
        )
        return Pending(incoming, work)

    def start_gather(self, share: Tensor) -> Pending:
        """All-gather of flat tensors of one length, in the background: (size * length,), in the order of ranks."""
        if self.size == 1:
            return Pending(share, None)
        gathered = share.new_empty(self.size * share.numel())
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = all_gather(gathered.view(torch.uint8), share.view(torch.uint8), group=self.process_group, async_op=True)
        return Pending(gathered, work)

    def broadcast_message(self, message: dict[str, Any] | None) -> dict[str, Any]:
        """A small JSON object from rank 0 to all. Other ranks' argument is ignored."""
        if self.size == 1:
            assert message is not None
            return message
        buffer = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
        if self.rank == 0:
            encoded = json.dumps(message).encode()
            if len(encoded) > _MESSAGE_BYTES:
                encoded = json.dumps({"error": "the message to the other ranks is too long."}).encode()
            buffer[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        buffer = buffer.to(self.device)
        source = dist.get_global_rank(self.process_group, 0) if self.process_group is not None else 0
        dist.broadcast(buffer, src=source, group=self.process_group)
        received: dict[str, Any] = json.loads(bytes(buffer.cpu().tolist()).rstrip(b"\0"))
        if "error" in received:
            raise GnsError(received["error"])
        return received


def group_of(members: Sequence[int], device: torch.device) -> RankGroup:
    """The group of these global ranks, this one included: the default group where it is they. Called by all of them."""
    ordered = sorted(members)
    if ordered == list(range(dist.get_world_size())):
        return RankGroup.find(device)
    return RankGroup.find(device, dist.new_group(ordered, use_local_synchronization=True))


def sum_over(tensor: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Sum over the product of process groups (shards, then their replicas), in place."""
    for group in groups:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def scatter_sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum a flat tensor over a group and keep this rank's equal share of it."""
    share = tensor.new_empty(tensor.numel() // group.size())
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce_scatter(share, tensor, op=dist.ReduceOp.SUM, group=group)
    return share


def plan_checksum(plan: BatchPlan) -> int:
    """CRC-32 of the plan's canonical JSON: factors of optimizers in any order are the same plan."""
    return zlib.crc32(json.dumps(plan.model_dump(mode="json"), sort_keys=True).encode())


def broadcast_plan(group: RankGroup, *, current: BatchPlan, proposed: BatchPlan | None) -> BatchPlan:
    """The plan that every rank obeys next. Rank 0 gives `proposed`; the others learn it.

    Raises:
        PlanDivergedError: a rank's current plan is not rank 0's. Raised on every rank, after the collectives, so that
            nobody is left waiting; training must stop, because ranks have used different batches.
    """
    assert group.rank != 0 or proposed is not None
    message = None
    if group.rank == 0 and proposed is not None:
        message = {
            "plan": proposed.model_dump(mode="json"),
            "checksum": plan_checksum(proposed),
            "current": plan_checksum(current),
        }
    received = group.broadcast_message(message)
    plan = BatchPlan.model_validate(received["plan"])
    agrees = received["current"] == plan_checksum(current) and received["checksum"] == plan_checksum(plan)
    others = group.sum_(torch.tensor(0.0 if agrees else 1.0, device=group.device))
    if float(others) > 0:
        raise PlanDivergedError(
            f"ranks have used different plans: {int(others)} of {group.size} disagree with rank 0; rank {group.rank} "
            f"holds version {current.version} (batch {current.global_batch_size}). "
            "Stop the job and resume from the last checkpoint."
        )
    return plan
