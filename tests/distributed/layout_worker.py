"""Two ranks: what has to hold on a layout beyond the numbers. Rank 0 prints the name of each check that has passed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gns_controller.core.contract import Span
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import HoldPolicyConfig, Stage, StagesPolicyConfig
from tests.attaching import attach_arguments
from tests.torchrun import end_rank
from trainer_hooks import AdaptiveBatch, CouplingOptions, MeasurementOptions
from trainer_hooks.distributed.clipping import clip_grad_norm
from trainer_hooks.distributed.layout import find_layout, parameter_groups_of
from trainer_hooks.distributed.sharding import local_tensor
from trainer_hooks.estimators.by_geometry import SPLIT_SUMS
from trainer_hooks.measurement.capture.fsdp2 import Fsdp2Capture
from trainer_hooks.optim import Signum


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.unused = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(64, 64), "norm": nn.LayerNorm(64), "feed": nn.Linear(64, 64)})
            for _ in range(3)
        )
        self.head = nn.Linear(64, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block["feed"](torch.tanh(block["norm"](block["mix"](x))))
        return self.head(x)


def attach(model: nn.Module, **changes: Any) -> AdaptiveBatch:
    settings: dict[str, Any] = {
        "run": "layout",
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "budget_samples": 64,
        "policy": HoldPolicyConfig(estimator=changes.get("estimators", ["split"])[0]),
        "measurement_interval": Span(steps=1),
        **changes,
    }
    return AdaptiveBatch.attach(model, Signum(model.parameters(), lr=1e-3), **attach_arguments(settings))


def backward(session: AdaptiveBatch, model: nn.Module, *, passes: int = 2) -> None:
    rows = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    for number, part in enumerate(rows.chunk(passes)):
        for module in session.layout.sharded_modules:
            module.set_requires_gradient_sync(number == passes - 1)
        with session.measured(num_samples=4 // passes, loss_factor=1 / passes):
            (model(part).square().mean() / passes).backward()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clipped_as_one_process_would(*, with_data_parallel: bool) -> None:
    """Colwise, rowwise, replicated and partial gradients, on one mesh and on two."""
    torch.manual_seed(0)
    model, alone = Block(), Block()
    alone.load_state_dict(model.state_dict())
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "tensor"))
    plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if not with_data_parallel:
        plan["norm"] = SequenceParallel()
        plan["up"] = ColwiseParallel(input_layouts=Shard(1))
    parallelize_module(model, mesh["tensor"], plan)
    for parameter in (*model.unused.parameters(), *alone.unused.parameters()):
        parameter.requires_grad_(False)
    if with_data_parallel:
        fully_shard(model, mesh=mesh["data"])
    rows = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    (5 * alone(rows).square().sum()).backward()
    if with_data_parallel:
        output = model(rows)
    else:
        normed = model.norm(DTensor.from_local(rows, mesh["tensor"], [Replicate()]))
        output = rows + model.down(torch.tanh(model.up(normed)))
    (5 * output.square().sum()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    reference = [p for p in alone.parameters() if p.requires_grad]
    layout = find_layout(model)
    norm = clip_grad_norm(trained, 0.5, layout)
    expected = nn.utils.clip_grad_norm_(reference, 0.5)
    assert math.isclose(float(norm), float(expected), rel_tol=1e-5), (norm, expected)
    for mine, other in zip(trained, reference, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.allclose(full(mine.grad), other.grad, atol=1e-6), (mine.grad, other.grad)


def clips_tensor_parallel_gradients() -> None:
    clipped_as_one_process_would(with_data_parallel=False)


def clips_gradients_on_two_meshes() -> None:
    clipped_as_one_process_would(with_data_parallel=True)


def a_buffer_under_fsdp2_is_as_large_as_the_shard() -> None:
    torch.manual_seed(0)
    model = Block()
    whole = sum(parameter.numel() for parameter in model.parameters())
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    session = attach(model, num_sign_patterns=3, global_batch_size=16)
    capture = session._scheduler._capture
    assert isinstance(capture, Fsdp2Capture)
    assert capture._signed is not None
    shard = sum(local_tensor(parameter).numel() for parameter in model.parameters())
    assert capture._signed.flat.numel() == 3 * shard
    assert shard < 0.6 * whole


def sparse_embeddings_under_ddp_are_left_out_and_trained() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = AdaptiveBatch.attach(
        model,
        optimizer,
        run="sparse",
        global_batch_size=8,
        micro_batch_size=4,
        budget_samples=32,
        policy=HoldPolicyConfig(),
        measurement=MeasurementOptions(interval=Span(steps=1)),
    )
    assert [len(group.parameters) for group in session.groups] == [2]
    for step in session.steps(torch.randint(0, 10, (64, 3), generator=torch.Generator().manual_seed(0))):
        for tokens in step:
            step.backward(model(tokens).square().mean())
        step.apply()
    assert session.samples_seen == 32


def published_estimator_with_an_unused_parameter_reads_nothing_and_goes_on() -> None:
    torch.manual_seed(0)
    model = Block()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    session = attach(model, estimators=["rank_variance"])
    backward(session, model)
    assert session.measure() == []
    session.optimizers[0].step()
    session.advance(num_samples=8)


def an_exception_in_one_ranks_norms_leaves_nobody_waiting() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(Block(), find_unused_parameters=True)
    session = attach(model)
    sums = SPLIT_SUMS["sign"]

    def fail(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("out of memory")

    if dist.get_rank() == 1:
        SPLIT_SUMS["sign"] = fail
    backward(session, model)
    [reading] = session.measure()
    SPLIT_SUMS["sign"] = sums
    assert math.isnan(reading.noise)


def the_self_test_leaves_ddp_its_bucket_order() -> None:
    orders = []
    for self_test in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(Blocks(), bucket_cap_mb=0.02)
        session = attach(model, self_test=self_test)
        for _ in range(12):  # torch logs its buckets now and then
            with session.measured(num_samples=4, loss_factor=1.0):
                model(torch.randint(0, 50, (4, 5))).square().mean().backward()
        buckets = str(model._get_ddp_logging_data()["rebuilt_per_bucket_param_indices"]).split(",")
        orders.append([set(bucket.split()) for bucket in buckets])
    assert len(orders[0]) > 2
    assert orders[0] == orders[1], orders


def the_self_test_leaves_synchronisation_flags_as_they_were() -> None:
    model = Block()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    attach(model)
    [group] = parameter_groups_of(model)  # type: ignore[arg-type]
    assert not group.reduce_grads


def every_rank_sets_the_same_rates_and_betas() -> None:
    """Two optimizers with rules of their own, and averages that keep their half-life: the plan carries both."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 1))
    model = DistributedDataParallel(plain)
    session = AdaptiveBatch.attach(
        model,
        [torch.optim.SGD(plain[0].parameters(), lr=0.1), torch.optim.AdamW(plain[1].parameters(), betas=(0.9, 0.95))],
        run="coupled",
        global_batch_size=8,
        micro_batch_size=4,
        budget_samples=200,
        policy=StagesPolicyConfig(stages=(Stage(from_samples=40, global_batch_size=32),)),
        measurement=MeasurementOptions(interval=Span(steps=2)),
        coupling=CouplingOptions(betas="half_life"),
    )
    seen = []
    for step in session.steps(torch.randn(200, 8, generator=torch.Generator().manual_seed(1))):
        for rows in step:
            step.backward(model(rows).square().mean())
        step.apply()
        sgd, adamw = (optimizer.param_groups[0] for optimizer in session.optimizers)
        seen.append((step.global_batch_size, sgd["lr"], adamw["lr"], *adamw["betas"]))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, seen)
    assert gathered[0] == gathered[1]
    batch, *settings = seen[-2]  # the last step takes what is left of the budget
    assert batch == 32
    assert all(math.isclose(a, b) for a, b in zip(settings, (0.4, 2e-3, 0.6561, 0.81450625), strict=True)), seen


def every_rank_follows_the_policy_that_rank_0_read() -> None:
    """A file that changed, or went away, between the ranks' starts; and one that rank 0 alone cannot read."""
    rank = dist.get_rank()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "policy.json")  # of this rank alone
        path.write_text(HoldPolicyConfig(estimator=("split", "rank_variance")[rank]).model_dump_json())
        for given in (path, path if rank == 0 else path.with_name("gone.json")):
            model = DistributedDataParallel(Block(), find_unused_parameters=True)
            session = attach(model, policy=given)
            assert session.specification.policy == HoldPolicyConfig(estimator="split")
            backward(session, model)
            assert [reading.estimator for reading in session.measure()] == ["split"]
            session.advance(num_samples=8)
        gathered: list[Any] = [None] * dist.get_world_size()
        for broken in ("/nowhere/policy.json", {"policy": "unheard_of"}, 3):
            with pytest.raises(InvalidInputError) as caught:
                attach(model, policy=broken if rank == 0 else path)
            dist.all_gather_object(gathered, str(caught.value))
            assert gathered[0] == gathered[1]
            assert "policy" in gathered[0]


CHECKS: list[Callable[[], None]] = [
    clips_tensor_parallel_gradients,
    clips_gradients_on_two_meshes,
    a_buffer_under_fsdp2_is_as_large_as_the_shard,
    sparse_embeddings_under_ddp_are_left_out_and_trained,
    published_estimator_with_an_unused_parameter_reads_nothing_and_goes_on,
    an_exception_in_one_ranks_norms_leaves_nobody_waiting,
    the_self_test_leaves_ddp_its_bucket_order,
    the_self_test_leaves_synchronisation_flags_as_they_were,
    every_rank_sets_the_same_rates_and_betas,
    every_rank_follows_the_policy_that_rank_0_read,
]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for check in CHECKS:
        check()
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"PASSED {check.__name__}", flush=True)
    end_rank()


if __name__ == "__main__":
    main()
