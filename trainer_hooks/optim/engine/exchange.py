"""Each matrix on one rank: who computes its update, and how blocks get there and updates come back.

R = replicas of the parameters, S = ranks that share one replica's shards. DDP: S = 1. FSDP2: R = 1. HSDP: both.

Nothing can deadlock: every rank reaches every collective, because which ones run, in which order and of which size,
follows from the parameters alone, never from gradients, and a computation that fails is raised only after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.distributed.collectives import Pending, RankGroup, group_of
from trainer_hooks.distributed.sharding import Piece, balanced, members_of, piece_of

_BUCKET_BYTES = 8 * 2**20
"""Matrices travel together up to this size: small ones save latency, large ones overlap with computing the next."""

Compute = Callable[[Sequence[int], Sequence[Tensor]], Sequence[Tensor]]
"""Function (indexes, whole matrices) -> whole updates, of the same shapes."""


class Exchange:
    """Fixed division of matrices over the ranks that hold them. Make it on every one of those ranks.

    Each matrix has one owner. A step sends the blocks of every matrix to its owner (all-to-all between shards),
    computes there, sends blocks of the update back the same way, and copies them to the other replicas (all-gather).
    Matrices travel in buckets, so that one bucket is on its way while the one before is computed.

    Args:
        parameters: of one dtype, all plain or all on one mesh with the same placements.
        costs: of each one's update, for the division.
        process_group: ranks that hold copies of the same plain parameters. Not for DTensors, whose mesh has them.

    Raises:
        InvalidInputError: placements that cannot be undone.
    """

    def __init__(
        self, parameters: Sequence[Tensor], costs: Sequence[float], process_group: dist.ProcessGroup | None
    ) -> None:
        # Shapes of this rank's blocks and of whole parameters.
        first = parameters[0]
        self._local_shapes = [tuple(local.shape) for local in map(_local, parameters)]
        self._shapes = [tuple(parameter.shape) for parameter in parameters]
        self._dtype, self._device = first.dtype, first.device
        self.shards, self.replicas = _groups_of(first, process_group)
        # Every rank gathers which block of each parameter every shard holds.
        own_pieces = [piece_of(parameter, rank=0) for parameter in parameters]
        self._pieces: list[list[Piece]] = self.shards.gather_objects(own_pieces)
        # Owners as (replica, shard), by cost; the same on every rank.
        owners = balanced(costs, size=self.replicas.size * self.shards.size)
        self._owners = [divmod(owner, self.shards.size) for owner in owners]
        self._buckets = self._packed()

    @property
    def is_local(self) -> bool:
        """True if every rank computes everything by itself."""
        return self.replicas.size == self.shards.size == 1

    def is_mine(self, index: int) -> bool:
        """Return whether this rank computes the update of a parameter."""
        return self._owners[index] == (self.replicas.rank, self.shards.rank)

    def run(self, outgoing: Sequence[Tensor], compute: Compute) -> list[Tensor]:
        """Return this rank's blocks of every update. Every rank calls it, with or without gradients.

        Every rank reaches every collective: all have the same buckets, and a bucket without anything for a rank is an
        empty message. If compute fails, zeros are sent in place of its updates.

        Args:
            outgoing: this rank's blocks of what the owner needs, per parameter, in the parameters' dtype.
            compute: called once per bucket with what this rank owns.

        Raises:
            Exception: the one that compute raised here, after the last collective; the matrices concerned do not move.
        """
        if self.is_local:
            return list(compute(range(len(self._shapes)), outgoing))
        # Between shards: blocks to their owner, computation, blocks of the updates back. The next bucket is on its way
        # while this one is computed.
        failure: Exception | None = None
        returning: list[Pending] = []
        arriving = self._send_in(self._buckets[0], outgoing)
        for position, bucket in enumerate(self._buckets):
            owned = [index for index in bucket if self.is_mine(index)]
            whole = self._assembled(owned, bucket, arriving.wait(), outgoing)
            if position + 1 < len(self._buckets):
                arriving = self._send_in(self._buckets[position + 1], outgoing)
            try:
                updates = list(compute(owned, whole))
            except Exception as error:
                failure = failure or error
                updates = [torch.zeros_like(matrix) for matrix in whole]
            returning.append(self._send_out(bucket, owned, updates))
        # Between replicas: each has the updates that it owns, and gathers those of the others.
        blocks: list[Tensor] = [torch.empty(0)] * len(self._shapes)
        gathering = []
        for bucket, pending in zip(self._buckets, returning, strict=True):
            self._unpack_own_replica(bucket, pending.wait(), blocks)
            gathering.append(self._send_to_replicas(bucket, blocks))
        for bucket, pending in zip(self._buckets, gathering, strict=True):
            self._unpack_other_replicas(bucket, pending.wait(), blocks)
        if failure is not None:
            raise failure
        return blocks

    def gather_objects(self, item: object) -> list[object]:
        """Return the picklable objects of all ranks, on every rank. Every rank calls it, with the object it has."""
        columns = self.shards.gather_objects(item)
        return [item for column in self.replicas.gather_objects(columns) for item in column]

    def _packed(self) -> list[list[int]]:
        """Put parameters of one shape side by side, so that a bucket is few batches. It has room for every owner."""
        # In the order of the parameters, which is the same on every rank.
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, shape in enumerate(self._shapes):
            by_shape.setdefault(shape, []).append(index)
        buckets: list[list[int]] = []
        room = 0
        for indexes in by_shape.values():
            for index in indexes:
                size = prod(self._shapes[index]) * self._dtype.itemsize
                if not buckets or size > room:
                    buckets.append([])
                    room = max(size, _BUCKET_BYTES * self.replicas.size * self.shards.size)
                buckets[-1].append(index)
                room -= size
        return buckets

    def _of_my_replica(self, bucket: Sequence[int], shard: int | None = None) -> list[int]:
        """Return parameters of a bucket that my replica computes: all, or those of one of its ranks."""
        return [
            index
            for index in bucket
            if self._owners[index][0] == self.replicas.rank and shard in (None, self._owners[index][1])
        ]

    def _sizes_out(self, bucket: Sequence[int]) -> list[int]:
        """Count elements of my blocks of what each rank of my replica owns."""
        return [
            sum(prod(self._local_shapes[index]) for index in self._of_my_replica(bucket, shard))
            for shard in range(self.shards.size)
        ]

    def _sizes_in(self, bucket: Sequence[int]) -> list[int]:
        """Count elements of each rank's blocks of what I own."""
        owned = self._of_my_replica(bucket, self.shards.rank)
        return [sum(prod(pieces[index].shape) for index in owned) for pieces in self._pieces]

    def _send_in(self, bucket: Sequence[int], outgoing: Sequence[Tensor]) -> Pending:
        """Begin to send my blocks of a bucket to their owners: one flat tensor, ordered by owner."""
        if self.shards.size == 1:
            return Pending(self._empty(), None)
        blocks = [
            outgoing[index].reshape(-1)
            for shard in range(self.shards.size)
            for index in self._of_my_replica(bucket, shard)
        ]
        return self.shards.start_exchange(
            self._flat(blocks), send_sizes=self._sizes_out(bucket), receive_sizes=self._sizes_in(bucket)
        )

    def _assembled(
        self, owned: Sequence[int], bucket: Sequence[int], incoming: Tensor, outgoing: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the whole matrices that I own, put together from the blocks of all shards."""
        if self.shards.size == 1:
            return [outgoing[index] for index in owned]
        # The flat tensor holds shard after shard, and of each shard its block of every matrix that I own.
        whole = [incoming.new_empty(self._shapes[index]) for index in owned]
        blocks = iter(torch.split(incoming, [prod(p[index].shape) for p in self._pieces for index in owned]))
        for pieces in self._pieces:
            for matrix, index in zip(whole, owned, strict=True):
                _block_of(matrix, pieces[index]).copy_(next(blocks).view(pieces[index].shape))
        return whole

    def _send_out(self, bucket: Sequence[int], owned: Sequence[int], updates: Sequence[Tensor]) -> Pending:
        """Begin to send each shard its block of the updates that I own: one flat tensor, ordered by shard."""
        if self.shards.size == 1:
            return Pending(self._flat([update.reshape(-1) for update in updates]), None)
        blocks = [
            _block_of(update, pieces[index]).reshape(-1)
            for pieces in self._pieces
            for update, index in zip(updates, owned, strict=True)
        ]
        return self.shards.start_exchange(
            self._flat(blocks), send_sizes=self._sizes_in(bucket), receive_sizes=self._sizes_out(bucket)
        )

    def _unpack_own_replica(self, bucket: Sequence[int], flat: Tensor, blocks: list[Tensor]) -> None:
        """Write the blocks that owners of my replica sent, which come ordered by owner."""
        order = [i for shard in range(self.shards.size) for i in self._of_my_replica(bucket, shard)]
        self._unpack(order, flat, blocks)

    def _unpack(self, order: Sequence[int], flat: Tensor, blocks: list[Tensor]) -> None:
        """Cut a flat tensor into my blocks of parameters in this order; what is behind them is padding."""
        sizes = [prod(self._local_shapes[index]) for index in order]
        for index, block in zip(order, torch.split(flat[: sum(sizes)], sizes), strict=True):
            blocks[index] = block.view(self._local_shapes[index])

    def _shares(self, bucket: Sequence[int]) -> list[list[int]]:
        """Return parameters of a bucket by the replica that computes them."""
        return [
            [index for index in bucket if self._owners[index][0] == replica] for replica in range(self.replicas.size)
        ]

    def _send_to_replicas(self, bucket: Sequence[int], blocks: Sequence[Tensor]) -> Pending:
        """Begin to gather the blocks of all replicas, padded to equal length: every replica sends, if only padding."""
        if self.replicas.size == 1:
            return Pending(self._empty(), None)
        shares = self._shares(bucket)
        length = max(sum(prod(self._local_shapes[index]) for index in share) for share in shares)
        own = self._flat([blocks[index].reshape(-1) for index in shares[self.replicas.rank]])
        return self.replicas.start_gather(torch.cat([own, own.new_zeros(length - own.numel())]))

    def _unpack_other_replicas(self, bucket: Sequence[int], gathered: Tensor, blocks: list[Tensor]) -> None:
        """Write the blocks that the other replicas computed: one row each."""
        if self.replicas.size == 1:
            return
        rows = gathered.view(self.replicas.size, -1)
        for row, share in zip(rows, self._shares(bucket), strict=True):
            self._unpack(share, row, blocks)

    def _flat(self, blocks: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(blocks)) if blocks else self._empty()

    def _empty(self) -> Tensor:
        return torch.empty(0, dtype=self._dtype, device=self._device)


def layout_key(parameter: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for parameters which one Exchange can take."""
    if isinstance(parameter, DTensor):
        return (parameter.device_mesh, tuple(parameter.placements), parameter.dtype)
    return (parameter.dtype, parameter.device)


def _groups_of(parameter: Tensor, process_group: dist.ProcessGroup | None) -> tuple[RankGroup, RankGroup]:
    """Return the ranks that share one replica's shards, and those that hold copies of the same block."""
    device = parameter.device
    alone = RankGroup(rank=0, size=1, device=device, process_group=None)
    if not isinstance(parameter, DTensor):
        return alone, alone if process_group is None else RankGroup.find(device, process_group)
    if any(isinstance(placement, Partial) for placement in parameter.placements):
        raise InvalidInputError(
            "a parameter that is a partial sum over ranks cannot be stepped; shard or replicate it."
        )
    # A mesh axis either replicates the parameter or shards it.
    mesh = parameter.device_mesh
    replicated = [axis for axis, placement in enumerate(parameter.placements) if isinstance(placement, Replicate)]
    sharded = [axis for axis in range(mesh.ndim) if axis not in replicated]
    return _group_along(mesh, sharded, device), _group_along(mesh, replicated, device)


def _group_along(mesh: DeviceMesh, axes: Sequence[int], device: torch.device) -> RankGroup:
    """Return the ranks that differ from this one along these axes of a mesh only."""
    if not axes:
        return RankGroup(rank=0, size=1, device=device, process_group=None)
    if len(axes) == 1:
        return RankGroup.find(device, mesh.get_group(axes[0]))
    if len(axes) == mesh.ndim:
        return group_of(members_of(mesh), device)
    # The slice of the mesh through this rank.
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    index = tuple(slice(None) if axis in axes else coordinate[axis] for axis in range(mesh.ndim))
    return group_of(mesh.mesh[index].flatten().tolist(), device)


def _block_of(whole: Tensor, piece: Piece) -> Tensor:
    """Return the view of a whole parameter that a rank's piece is."""
    for dim, (start, length) in enumerate(zip(piece.offset, piece.shape, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), length)
    return whole


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
