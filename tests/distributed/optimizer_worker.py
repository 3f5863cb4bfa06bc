"""Ranks that step one model with every optimizer: `compare`, `save DIR`, `resume DIR NUMBER`. Prints what has passed.

Every layout is compared with one process that sees all samples and steps plain parameters by itself, in float64, so
that nothing but the order of sums differs.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gns_controller.core.errors import InvalidInputError
from tests.torchrun import end_rank
from trainer_hooks.optim import (
    ASGO,
    SNOO,
    SOAP,
    AdamW,
    EShampoo,
    Lookahead,
    Muon,
    Scion,
    Shampoo,
    SignSGD,
    Signum,
    SinkGD,
    SpecSGD,
)

STEPS = 5
SAMPLES = 12
CLOSE = {"rtol": 1e-8, "atol": 1e-11}
"""float64 sums in another order, through inverse roots and bases of well-conditioned factors."""

MATRIX_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Muon": lambda p, **kw: Muon(p, lr=0.02, weight_decay=0.1, dtype=None, **kw),
    "Muon, cautious": lambda p, **kw: Muon(p, lr=0.02, weight_decay=0.1, cautious=True, dtype=None, **kw),
    "SpecSGD": lambda p, **kw: SpecSGD(p, lr=0.02, **kw),
    "Scion": lambda p, **kw: Scion(p, lr=0.02, **kw),
    "SinkGD": lambda p, **kw: SinkGD(p, lr=0.01, **kw),
    "Shampoo": lambda p, **kw: Shampoo(p, lr=0.01, precondition_frequency=2, epsilon=1e-3, **kw),
    "Shampoo, blocks": lambda p, **kw: Shampoo(
        p, lr=0.01, precondition_frequency=2, epsilon=1e-3, max_preconditioner_dim=4, **kw
    ),
    "EShampoo": lambda p, **kw: EShampoo(p, lr=0.01, precondition_frequency=2, **kw),
    "SOAP": lambda p, **kw: SOAP(p, lr=0.01, precondition_frequency=2, **kw),
    "ASGO": lambda p, **kw: ASGO(p, lr=0.01, epsilon=1e-3, **kw),
}
SAME_SAMPLES = ("EShampoo", "SOAP")
"""Every rank sees all samples, so that averages over 2 or 4 ranks are exact. The first factor of a matrix that is not
square has null directions, in which rounding alone would choose the basis, and later gradients move along it."""
ELEMENTWISE_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SignSGD": lambda p: SignSGD(p, lr=0.01),
    "Signum": lambda p: Signum(p, lr=0.01, weight_decay=0.1),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
}
OUTER_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Lookahead of Muon": lambda p, **kw: Lookahead(Muon(p, lr=0.02, dtype=None, **kw), interval=2),
    "SNOO of Shampoo": lambda p, **kw: SNOO(
        Shampoo(p, lr=0.01, precondition_frequency=2, epsilon=1e-3, **kw), interval=2, lr=0.7, momentum=0.5
    ),
}


def build() -> nn.Module:
    """Sides of 10, 6, 3 and 1: on four ranks three rows leave an empty shard, one row leaves three."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3), nn.Tanh(), nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 1)
    ).double()


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(STEPS * 2, SAMPLES, 6, generator=generator, dtype=torch.float64)
    return rows, torch.randn(STEPS * 2, SAMPLES, 1, generator=generator, dtype=torch.float64)


def optimizers_of(model: nn.Module, name: str, process_group: dist.ProcessGroup | None) -> list[torch.optim.Optimizer]:
    """The matrices' optimizer, and AdamW for the biases; or one for all."""
    if name in ELEMENTWISE_OPTIMIZERS:
        return [ELEMENTWISE_OPTIMIZERS[name](model.parameters())]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    biases = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    build_optimizer = (MATRIX_OPTIMIZERS | OUTER_OPTIMIZERS)[name]
    return [build_optimizer(matrices, process_group=process_group), AdamW(biases, lr=0.01)]


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], *, steps: range, alone: bool) -> None:
    rows, targets = samples()
    sees_all = alone or type(optimizers[0]).__name__ in SAME_SAMPLES
    rank, size = (0, 1) if sees_all else (dist.get_rank(), dist.get_world_size())
    for step in steps:
        own_samples = slice(rank * SAMPLES // size, (rank + 1) * SAMPLES // size)
        (model(rows[step, own_samples]) - targets[step, own_samples]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def whole_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def wrap(layout: str) -> tuple[nn.Module, dist.ProcessGroup | None]:
    model = build()
    if layout == "DDP":
        return DistributedDataParallel(model), dist.group.WORLD
    mesh: DeviceMesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if layout == "HSDP":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh), None


def assert_close(actual: Tensor, expected: Tensor, label: str) -> None:
    torch.testing.assert_close(actual, expected, **CLOSE, msg=lambda text: f"{label}: {text}")


def check_replicas(model: nn.Module, layout: str, label: str) -> None:
    """Whoever holds the same block holds the same bits. Under FSDP2 nobody does."""
    if layout == "FSDP2":
        return
    digest = hashlib.sha256()
    for parameter in model.parameters():
        block = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        digest.update(block.detach().contiguous().view(torch.uint8).numpy().tobytes())
    digests: list[Any] = [None] * dist.get_world_size()
    place = 0 if layout == "DDP" else dist.get_rank() % 2
    dist.all_gather_object(digests, (place, digest.hexdigest()))
    assert len(digests) > len(set(digests)) == len({entry[0] for entry in digests}), f"{label}: replicas differ"


def compare() -> None:
    layouts = ["DDP", "FSDP2"] + (["HSDP"] if dist.get_world_size() == 4 else [])
    for name in [*MATRIX_OPTIMIZERS, *ELEMENTWISE_OPTIMIZERS, *OUTER_OPTIMIZERS]:
        expected = build()
        train(expected, optimizers_of(expected, name, None), steps=range(STEPS), alone=True)
        for layout in layouts:
            model, process_group = wrap(layout)
            train(model, optimizers_of(model, name, process_group), steps=range(STEPS), alone=False)
            for key, weights in whole_of(model).items():
                assert_close(weights, whole_of(expected)[key], f"{name}, {layout}, {key}")
            check_replicas(model, layout, f"{name}, {layout}")
            say(f"{name}: {layout}")


class Failing(Muon):
    """Whose rank 0 cannot compute what it owns."""

    def _updates(self, matrices_BMN: Tensor, *rest: Any) -> Tensor:
        if dist.get_rank() == 0:
            raise RuntimeError("this owner failed")
        return super()._updates(matrices_BMN, *rest)


def failures() -> None:
    """An owner that fails says so after the last collective; matrices of both dtypes go through, nobody waits."""
    for layout in ("DDP", "FSDP2"):
        model, process_group = wrap(layout)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        plain = [nn.Parameter(torch.ones(4, 4, dtype=torch.float32)) for _ in range(2 * dist.get_world_size())]
        optimizer = Failing([*matrices, *(plain if layout == "DDP" else [])], dtype=None, process_group=process_group)
        before = whole_of(model)
        for parameter in [*matrices, *plain]:
            parameter.grad = torch.ones_like(parameter)
        if dist.get_rank() == 0:
            with pytest.raises(RuntimeError, match="this owner failed"):
                optimizer.step()
        else:
            optimizer.step()
        dist.barrier()
        after = whole_of(model)
        moved = [key for key, value in after.items() if not torch.equal(value, before[key])]
        assert len(moved) < len(matrices), moved
        if dist.get_rank() > 0:
            assert moved
            assert layout == "FSDP2" or 0 < sum(not torch.equal(p, torch.ones(4, 4)) for p in plain) < len(plain)
        say(f"failure: {layout}")


def missing_gradients() -> None:
    """Ranks that disagree about which gradients exist still meet in every collective; only who has one moves."""
    for layout in ("DDP", "FSDP2"):
        model, process_group = wrap(layout)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        optimizer = Muon(matrices, dtype=None, process_group=process_group)
        before = [block.clone() for block in blocks(matrices)]
        lacks = dist.get_rank() == dist.get_world_size() - 1
        for parameter in matrices[1:] if lacks else matrices:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        dist.barrier()
        still = [torch.equal(block, start) for block, start in zip(blocks(matrices), before, strict=True)]
        empty = [not block.numel() for block in before]
        assert still[1:] == empty[1:]
        assert still[0] or not lacks
        say(f"missing gradients: {layout}")


def blocks(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in parameters]


def later_groups() -> None:
    """A group that is added between two steps changes nobody's owner: the rest goes on as one process does."""
    for name in ("Shampoo", "EShampoo", "SOAP"):
        ends = []
        for process_group in (None, dist.group.WORLD):
            first, second = (
                [nn.Parameter(torch.eye(6, 6 + n, dtype=torch.float64)) for n in (0, 1, 2, number)] for number in (3, 9)
            )
            optimizer = MATRIX_OPTIMIZERS[name](first, process_group=process_group)
            generator = torch.Generator().manual_seed(2)
            for step in range(6):
                if step == 3:
                    optimizer.add_param_group({"params": second})
                for parameter in [*first, *second]:
                    parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                optimizer.step()
            ends.append([*first, *second])
        for alone, together in zip(*ends, strict=True):
            assert_close(together.detach(), alone.detach(), f"{name}, a later group")
        say(f"later groups: {name}")


STATEFUL = ("Muon", "Shampoo", "EShampoo", "SOAP", "ASGO", "SNOO of Shampoo")


def save(directory: str) -> None:
    """Half of the steps on each layout, then everybody's share through torch.distributed.checkpoint."""
    for name in STATEFUL:
        for layout in ("DDP", "FSDP2"):
            model, process_group = wrap(layout)
            optimizers = optimizers_of(model, name, process_group)
            train(model, optimizers, steps=range(STEPS), alone=False)
            found_model, found_optimizers = get_state_dict(model, optimizers)
            dcp.save(
                {"model": found_model, "optimizers": found_optimizers}, checkpoint_id=f"{directory}/{name}-{layout}"
            )
            if layout == "FSDP2":
                with pytest.raises(InvalidInputError, match="of sharded ones every rank holds blocks"):
                    optimizers[0].consolidated_state_dict()
            if layout == "DDP":
                inner = optimizers[0]
                states = [inner.consolidated_state_dict(), optimizers[1].state_dict()]
                if dist.get_rank() == 0:
                    torch.save(
                        {"model": model.module.state_dict(), "optimizers": states}, f"{directory}/{name}-consolidated"
                    )
                    torch.save(inner.state_dict(), f"{directory}/{name}-rank0")
            say(f"saved {name}: {layout}")


def resume(directory: str, num_savers: int) -> None:
    """On another number of ranks: as if one process had never stopped."""
    for name in STATEFUL:
        expected = build()
        train(expected, optimizers_of(expected, name, None), steps=range(2 * STEPS), alone=True)
        for layout in ("DDP", "FSDP2"):
            model, process_group = wrap(layout)
            optimizers = optimizers_of(model, name, process_group)
            found_model, found_optimizers = get_state_dict(model, optimizers)
            parts = {"model": found_model, "optimizers": found_optimizers}
            dcp.load(parts, checkpoint_id=f"{directory}/{name}-{layout}")
            set_state_dict(model, optimizers, model_state_dict=parts["model"], optim_state_dict=parts["optimizers"])
            go_on(model, optimizers, expected, f"{name}, {layout}")
        model, process_group = wrap("DDP")
        optimizers = optimizers_of(model, name, process_group)
        saved = torch.load(f"{directory}/{name}-consolidated", weights_only=True)
        model.module.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        go_on(model, optimizers, expected, f"{name}, consolidated")
    if num_savers > 1:
        refuse_a_share(directory)


def go_on(model: nn.Module, optimizers: list[torch.optim.Optimizer], expected: nn.Module, label: str) -> None:
    train(model, optimizers, steps=range(STEPS, 2 * STEPS), alone=False)
    for key, weights in whole_of(model).items():
        assert_close(weights, whole_of(expected)[key], f"{label}, {key}")
    say(f"resumed {label}")


def refuse_a_share(directory: str) -> None:
    """One rank's share is not the state, and the first step says so instead of beginning anew."""
    model = build()
    (optimizer, _) = optimizers_of(model, "Shampoo", None)
    optimizer.load_state_dict(torch.load(f"{directory}/Shampoo-rank0", weights_only=True))
    with pytest.raises(InvalidInputError, match="consolidated_state_dict"):
        train(model, [optimizer], steps=range(1), alone=True)
    say("a share is refused")


def say(fact: str) -> None:
    if dist.get_rank() == 0:
        print(f"PASSED {fact}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    match sys.argv[1:]:
        case ["compare"]:
            compare()
            failures()
            missing_gradients()
            later_groups()
        case ["save", directory]:
            save(directory)
        case ["resume", directory, num_savers]:
            resume(directory, int(num_savers))
    dist.barrier()
    end_rank()
