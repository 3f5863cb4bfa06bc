"""Clipping by the norm of all gradients, also where parameters are sharded over different meshes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from trainer_hooks.distributed.layout import Layout
from trainer_hooks.distributed.sharding import local_tensor


@torch.no_grad()
def clip_grad_norm(parameters: Sequence[Tensor], max_norm: float, layout: Layout) -> Tensor:
    """Scale gradients so that their l2 norm, of all parameters and shards as one vector, is at most max_norm.

    torch.nn.utils.clip_grad_norm_ refuses DTensors on different meshes, which tensor-parallel plans leave behind. Here
    every rank sums the squares of its own blocks, each divided by the number of ranks that hold the same block, and
    one number is summed over ranks. No host synchronisation. Every rank.

    Returns:
        () norm before clipping.
    """
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    total = torch.zeros((), dtype=torch.float64, device=layout.ranks.device)
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    for parameter in trained:
        assert parameter.grad is not None
        block = local_tensor(parameter.grad, like=parameter)
        total += block.square().sum(dtype=torch.float64) / _num_copies(parameter, layout)
    norm = layout.ranks.sum_(total).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in trained:
        # Not the block above: where the gradient is a partial sum that block is a copy. Partial sums scale alike.
        own = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        assert own is not None
        own.mul_(factor.to(own.dtype))
    return norm


def _num_copies(parameter: Tensor, layout: Layout) -> float:
    if not isinstance(parameter, DTensor):
        return layout.ranks.size
    mesh = parameter.device_mesh
    copies = layout.ranks.size / mesh.size()
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Replicate):
            copies *= mesh.size(axis)
    return copies
