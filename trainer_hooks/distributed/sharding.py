"""Which block of a parameter each rank holds, and how work is divided. Nothing here communicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class Piece(NamedTuple):
    """The block of one parameter that one rank holds."""

    copy: tuple[int, int]
    """Which of several identical copies of the parameter this block belongs to: the first rank of the mesh that holds
    it, and a number within that mesh."""
    offset: tuple[int, ...]
    """Of the block's first element in the whole parameter."""
    shape: tuple[int, ...]
    """Of the block; may be empty."""


def piece_of(parameter: Tensor, *, rank: int) -> Piece:
    """This rank's block of one parameter; `rank` tells copies of plain tensors apart."""
    if not isinstance(parameter, DTensor):
        shape = tuple(parameter.shape)
        return Piece((rank, 0), (0,) * len(shape), shape)
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    placements = [_normalized(placement, parameter.ndim) for placement in parameter.placements]
    copy = 0
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            copy = copy * mesh.size(axis) + coordinate[axis]
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    return Piece((min(members_of(mesh)), copy), tuple(offset), tuple(shape))


def members_of(mesh: DeviceMesh) -> tuple[int, ...]:
    """Global ranks of a mesh."""
    return tuple(mesh.mesh.flatten().tolist())


def balanced(costs: Sequence[float], *, size: int) -> list[int]:
    """The bin of each item: heaviest first, always into the least loaded bin."""
    load, bins = [0.0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        bins[index] = min(range(size), key=load.__getitem__)
        load[bins[index]] += costs[index]
    return bins


def _normalized(placement: Placement, ndim: int) -> Placement:
    """Tensor-parallel plans leave Shard(-1) behind, which torch's own arithmetic refuses."""
    return Shard(placement.dim % ndim) if type(placement) is Shard and placement.dim < 0 else placement


def local_tensor(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """This rank's block of a DTensor (laid out as `like` is), or the tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    if isinstance(like, DTensor) and tensor.placements != like.placements:
        tensor = tensor.redistribute(placements=like.placements)
    return tensor.to_local()
