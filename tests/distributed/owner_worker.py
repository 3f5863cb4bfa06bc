"""Ranks that own matrices without entries, at rest, or of a checkpoint that lacks them. Prints what has passed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gns_controller.core.errors import InvalidInputError
from tests.distributed.optimizer_worker import (
    MATRIX_OPTIMIZERS,
    assert_close,
    optimizers_of,
    say,
    train,
    wrap,
)
from tests.torchrun import end_rank

SHAPES = [(0, 4), (6, 5), (5, 0), (4, 7), (6, 5)]


def empty_matrices() -> None:
    """Copies and shards of parameters go on beside some without entries as on one process without those.

    torch's fully_shard cannot reduce gradients without entries, so the shards are made by hand.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("Muon", "SinkGD", "Shampoo", "SOAP"):
        expected = moved(name, [torch.ones(shape).double() for shape in SHAPES if 0 not in shape], None)
        copies = moved(name, [torch.ones(shape).double() for shape in SHAPES], dist.group.WORLD)
        shards = [distribute_tensor(torch.ones(shape).double(), mesh, [Shard(0)]) for shape in SHAPES]
        for weights in (copies, moved(name, shards, None)):
            for value, other in zip([weight for weight in weights if weight.numel()], expected, strict=True):
                assert_close(value, other, name)
        moved(name, [torch.ones(0, 4)], dist.group.WORLD)
        moved(name, [distribute_tensor(torch.ones(0, 4), mesh, [Shard(0)])], None)
        say(f"empty matrices: {name}")


def moved(name: str, starts: list[Tensor], process_group: dist.ProcessGroup | None) -> list[Tensor]:
    """Where whole parameters end on gradients that every rank has alike."""
    parameters = [nn.Parameter(start) for start in starts]
    optimizer = MATRIX_OPTIMIZERS[name](parameters, process_group=process_group)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        for parameter in parameters:
            grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            sharded = isinstance(parameter, DTensor)
            parameter.grad = distribute_tensor(grad, parameter.device_mesh, [Shard(0)]) if sharded else grad
        optimizer.step()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in parameters]


def resting_matrices() -> None:
    """A rank that owns nothing but matrices with gradients of zeros takes its share back, and all go on."""
    for name in ("Shampoo", "EShampoo", "SOAP", "ASGO"):
        model = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(dist.get_world_size()))
        optimizer = MATRIX_OPTIMIZERS[name](model.parameters(), process_group=dist.group.WORLD)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = torch.eye(6) if number == 0 else torch.zeros(6, 6)
            optimizer.step()

        for _ in range(3):
            step()
        found_model, found_optimizer = get_state_dict(model, optimizer)
        set_state_dict(model, optimizer, model_state_dict=found_model, optim_state_dict=found_optimizer)
        step()
        say(f"resting matrices: {name}")


def refuse_full_state() -> None:
    """full_state_dict of rank 0 lacks what others own. Every rank says so at the next step, and nobody waits."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for layout in ("DDP", "FSDP2"):
        model, process_group = wrap(layout)
        optimizers = optimizers_of(model, "Shampoo", process_group)
        train(model, optimizers, steps=range(3), alone=False)
        full = get_optimizer_state_dict(model, optimizers, options=StateDictOptions(full_state_dict=True))
        model, process_group = wrap(layout)
        optimizers = optimizers_of(model, "Shampoo", process_group)
        set_optimizer_state_dict(model, optimizers, full, options=options)
        for _ in range(2):
            with pytest.raises(InvalidInputError, match="without full_state_dict"):
                train(model, optimizers, steps=range(1), alone=False)
            dist.barrier()
        say(f"full state refused: {layout}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    empty_matrices()
    resting_matrices()
    refuse_full_state()
    dist.barrier()
    end_rank()
