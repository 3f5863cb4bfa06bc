"""One rank: attach to models whose gradients are not averaged as they should be, and print what attach says."""

# No postponed annotations: DistributedDataParallel looks at those of its communication hooks.

import json
import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gns_controller.core.contract import Span
from gns_controller.core.errors import GnsError
from gns_controller.core.policies import HoldPolicyConfig
from tests.torchrun import end_rank
from trainer_hooks import AdaptiveBatch, MeasurementOptions
from trainer_hooks.measurement.capture import ddp as capture_ddp


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 1, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(rows)))


def sum_without_dividing(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda found: found.value()[0])


def stay_local(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def attach(model: nn.Module, name: str) -> AdaptiveBatch:
    return AdaptiveBatch.attach(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        run=name,
        global_batch_size=8,
        micro_batch_size=4,
        budget_samples=64,
        policy=HoldPolicyConfig(),
        measurement=MeasurementOptions(interval=Span(steps=1)),
    )


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if case.startswith("fsdp2"):
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if case == "fsdp2-divide-factor":
            model.first.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo knows no other way
            model.first.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        return model
    if case == "fsdp2":
        return model
    if case == "ddp-ignored-parameter":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["second.weight"])
    wrapped = DistributedDataParallel(model)
    if case == "ddp-summed":
        wrapped.register_comm_hook(None, sum_without_dividing)
    if case == "ddp-local":
        wrapped.register_comm_hook(None, stay_local)
    return wrapped


def run_case(case: str) -> None:
    model = build(case)
    before = [p.detach().clone() for p in model.parameters()]
    hook = capture_ddp.SignedAccumulator.add
    if case == "ddp-missing-hook":

        def deaf(self: Any, index: int, *arguments: Any, **options: Any) -> None:
            if index != 2:
                hook(self, index, *arguments, **options)

        capture_ddp.SignedAccumulator.add = deaf  # type: ignore[method-assign]
    try:
        session = attach(model, case)
        outcome = "attached"
    except GnsError as error:
        outcome = f"{type(error).__name__}: {error}"
    finally:
        capture_ddp.SignedAccumulator.add = hook  # type: ignore[method-assign]
    unchanged = all(torch.equal(p.detach(), old) for p, old in zip(model.parameters(), before, strict=True))
    clean = all(p.grad is None for p in model.parameters())
    readings = -1
    if outcome == "attached":
        # The same rows on every rank, in a loop of one's own, where it says "same-samples".
        generator = torch.Generator().manual_seed(0 if case.endswith("same-samples") else dist.get_rank())
        rows = torch.randn(4, 6, generator=generator)
        for half in rows.chunk(2):
            for module in session.layout.sharded_modules:
                module.set_requires_gradient_sync(True)
            loss = model(half).square().mean()
            factor = dist.get_world_size() * 2 / 8
            with session.measured(num_samples=2, loss_factor=factor):
                (loss * factor).backward()
            session.observe_loss(loss, num_samples=2)
        readings = len(session.measure())
    line = {"case": case, "rank": dist.get_rank(), "outcome": outcome, "unchanged": unchanged, "clean": clean}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {**line, "readings": readings})
    if dist.get_rank() == 0:
        for found in gathered:
            print("CASE " + json.dumps(found), flush=True)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="LOG %(levelname)s %(message)s")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in os.environ["CASES"].split(","):
        run_case(case)
        dist.barrier()
    end_rank()


main()
