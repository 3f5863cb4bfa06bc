"""How a model is spread over ranks, found from the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.distributed.collectives import RankGroup, group_of
from trainer_hooks.distributed.sharding import members_of


class DataParallel(NamedTuple):
    """My place among the ranks that see different samples."""

    rank: int
    size: int


@dataclass(frozen=True)
class Layout:
    """What attach finds out about a model."""

    name: str
    """For people: "DDP", "FSDP2", "HSDP 2x4", "FSDP2 + model parallel 2"."""
    ranks: RankGroup
    """Everybody who holds a part or a copy of the model."""
    data_parallel: DataParallel
    model_parallel_size: int
    """Ranks that see the same samples and share one copy of the model (tensor parallel)."""
    sharded_modules: tuple[FSDPModule, ...]
    """Every module that fully_shard was applied to; empty elsewhere."""

    @property
    def averages_in_backward(self) -> bool:
        """Whether a rank never holds a whole local gradient after backward (FSDP2): halves are then split in time."""
        return bool(self.sharded_modules)


def find_layout(model: nn.Module, process_group: Any = None) -> Layout:
    """The layout of a model that is already wrapped. Call it on every rank.

    Args:
        model: plain, wrapped in DistributedDataParallel, or with fully_shard applied, with a tensor-parallel mesh axis
            or without.
        process_group: data-parallel group. Default: the DDP wrapper's, else the default group.

    Raises:
        InvalidInputError: several ranks without any data parallelism, DTensors inside DDP, or parameters on different
            sets of ranks.
    """
    device = next(model.parameters()).device
    sharded = tuple(module for module in model.modules() if isinstance(module, FSDPModule))
    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    if isinstance(model, DistributedDataParallel):
        if meshes:
            raise InvalidInputError(
                "DistributedDataParallel around DTensor parameters is not supported; apply fully_shard with a 2-D mesh."
            )
        ranks = RankGroup.find(device, process_group or model.process_group)
        return Layout("DDP", ranks, DataParallel(ranks.rank, ranks.size), 1, ())
    if meshes and process_group is not None:
        raise InvalidInputError("process_group is for DistributedDataParallel; a sharded model's mesh says who is who.")
    if not meshes:
        ranks = RankGroup.find(device, process_group)
        if ranks.size > 1:
            raise InvalidInputError(
                f"{ranks.size} ranks, but the model is neither wrapped in DistributedDataParallel nor sharded by "
                "fully_shard: do that first, so that gradients are averaged."
            )
        return Layout("single process", ranks, DataParallel(0, 1), 1, ())
    members = sorted((members_of(mesh) for mesh in meshes), key=len)
    if not all(set(found) <= set(members[-1]) for found in members):
        raise InvalidInputError(
            "the model's parameters live on different sets of ranks (expert parallel?), which is not supported."
        )
    ranks = group_of(members[-1], device)
    if not sharded:
        name = f"model parallel {ranks.size}"
        return Layout(name, ranks, DataParallel(0, 1), ranks.size, ())
    mesh = _data_parallel_mesh(sharded)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    shape = tuple(mesh.mesh.shape)
    rank = 0
    for position, length in zip(coordinate, shape, strict=True):
        rank = rank * length + position
    size = prod(shape)
    name = "FSDP2" if len(shape) == 1 else f"HSDP {shape[0]}x{shape[1]}"
    model_parallel_size = ranks.size // size
    if model_parallel_size > 1:
        name += f" + model parallel {model_parallel_size}"
    return Layout(name, ranks, DataParallel(rank, size), model_parallel_size, sharded)


def parameter_groups_of(module: FSDPModule) -> list[Any]:
    """torch's own bookkeeping of one fully_shard call. Only this module and fsdp2.py look at private names of FSDP2.

    Raises:
        InvalidInputError: this torch keeps it elsewhere.
    """
    try:
        return list(module._get_fsdp_state()._fsdp_param_groups)
    except AttributeError:
        raise InvalidInputError(
            f"this program does not know where torch {torch.__version__} keeps the parameter groups of fully_shard; "
            "it was written for torch 2.13."
        ) from None


def _data_parallel_mesh(sharded: Sequence[FSDPModule]) -> DeviceMesh:
    meshes: list[DeviceMesh] = [group.mesh_info.mesh for module in sharded for group in parameter_groups_of(module)]
    if not meshes:
        raise InvalidInputError("fully_shard was applied, but to no module with parameters.")
    if len({members_of(mesh) for mesh in meshes}) > 1:
        raise InvalidInputError("fully_shard was applied with different meshes, which is not supported.")
    return meshes[0]
