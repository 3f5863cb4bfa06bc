"""Against float64 recursions written here: same operations in the same order, so exactly."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.optim import Muon
from trainer_hooks.optim.adamw import AdamW
from trainer_hooks.optim.outer import SNOO, Lookahead

STEPS = 20


def grads_of(shape: tuple[int, ...] = (4, 3), steps: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def weight(shape: tuple[int, ...] = (4, 3)) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape))


def feed(optimizer: torch.optim.Optimizer, moving: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        moving.grad = grad.clone()
        optimizer.step()
    return moving.detach().clone()


def sgd(moving: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD([moving], lr=0.1)


def recursion(*, interval: int, lr: float, momentum: float, steps: int = STEPS) -> Tensor:
    """Recursion of SNOO around SGD."""
    slow = weight().detach().clone()
    fast, buffer = slow.clone(), torch.zeros_like(slow)
    for step, grad in enumerate(grads_of(steps=steps)):
        fast = fast.add(grad, alpha=-0.1)
        if (step + 1) % interval == 0:
            drift = slow - fast
            buffer = momentum * buffer + drift
            slow = slow - lr * (momentum * buffer + drift)
            fast = slow.clone()
    return fast


@pytest.mark.parametrize("interval", [1, 3, 5, 20, 21])
def test_snoo_is_its_recursion_exactly(interval: int) -> None:
    moving = weight()
    weights = feed(SNOO(sgd(moving), interval=interval, lr=0.8, momentum=0.75), moving, grads_of())
    assert torch.equal(weights, recursion(interval=interval, lr=0.8, momentum=0.75))


def test_the_outer_step_is_torchs_nesterov_step() -> None:
    moving, outer = weight(), weight()
    wrapped = SNOO(sgd(moving), interval=4, lr=0.7, momentum=0.5)
    nesterov = torch.optim.SGD([outer], lr=0.7, momentum=0.5, nesterov=True)
    for window in torch.stack(grads_of()).split(4):  # type: ignore[no-untyped-call]
        feed(wrapped, moving, list(window))
        outer.grad = 0.1 * window.sum(0)
        nesterov.step()
        # Drifts are sums in another order here: a few roundings of numbers of order 1.
        assert torch.allclose(moving, outer, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("interval", "pull"), [(5, 0.5), (2, 0.8), (1, 0.3)])
def test_lookahead_is_its_recursion_exactly_and_snoo_without_momentum(interval: int, pull: float) -> None:
    slow = weight().detach().clone()
    fast = slow.clone()
    for step, grad in enumerate(grads_of()):
        fast = fast.add(grad, alpha=-0.1)
        if (step + 1) % interval == 0:
            slow = slow + pull * (fast - slow)
            fast = slow.clone()
    one, other = weight(), weight()
    assert torch.equal(feed(Lookahead(sgd(one), interval=interval, pull=pull), one, grads_of()), fast)
    assert torch.equal(feed(SNOO(sgd(other), interval=interval, lr=pull, momentum=0.0), other, grads_of()), fast)


def test_the_first_outer_step_comes_after_a_whole_interval() -> None:
    moving, alone = weight(), weight()
    wrapped, inner = Lookahead(sgd(moving), interval=3), sgd(alone)
    boundaries = [wrapped.at_boundary]
    for grad in grads_of(steps=7):
        feed(wrapped, moving, [grad])
        feed(inner, alone, [grad])
        boundaries.append(wrapped.at_boundary)
        assert moving.grad is not None
        assert torch.equal(moving.grad, grad)
        if len(boundaries) == 3:
            assert torch.equal(moving, alone)
    assert boundaries == [True, False, False, True, False, False, True, False]


def test_schedulers_act_on_the_inner_optimizer() -> None:
    moving = weight()
    inner = sgd(moving)
    wrapped = SNOO(inner, interval=2)
    schedule = torch.optim.lr_scheduler.StepLR(wrapped, step_size=1, gamma=0.5)
    feed(wrapped, moving, grads_of(steps=1))
    schedule.step()
    assert inner.param_groups[0]["lr"] == 0.05
    wrapped.param_groups[0]["lr"] = 0.0
    before = moving.detach().clone()
    feed(wrapped, moving, grads_of(steps=1))
    assert torch.allclose(moving, weight() + (before - weight()) * 0.68 * (1 + 0.37), rtol=0, atol=1e-15)
    wrapped.zero_grad()
    assert moving.grad is None


MAKERS: dict[str, Callable[[nn.Parameter], torch.optim.Optimizer]] = {
    "Lookahead of SGD": lambda p: Lookahead(sgd(p), interval=5),
    "SNOO of AdamW": lambda p: SNOO(AdamW([p], lr=0.1), interval=3, momentum=0.5),
    "SNOO of Muon": lambda p: SNOO(Muon([p], lr=0.1, dtype=None), interval=4, momentum=0.5),
    "SNOO of torch.optim.AdamW": lambda p: SNOO(torch.optim.AdamW([p], lr=0.1), interval=6, momentum=0.5),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("consolidated", [False, True])
def test_a_saved_optimizer_goes_on_bit_for_bit_between_boundaries(name: str, consolidated: bool) -> None:
    straight, moving = weight(), weight()
    expected = feed(MAKERS[name](straight), straight, grads_of())
    before = MAKERS[name](moving)
    assert isinstance(before, SNOO)
    feed(before, moving, grads_of()[:7])
    saved = copy.deepcopy(before.consolidated_state_dict() if consolidated else before.state_dict())
    resumed = nn.Parameter(moving.detach().clone())
    after = MAKERS[name](resumed)
    after.param_groups[0]["lr"] = 7.0
    after.load_state_dict(saved)
    assert torch.equal(feed(after, resumed, grads_of()[7:]), expected)


def test_a_checkpoint_of_the_inner_optimizer_alone_starts_at_a_boundary() -> None:
    moving, twin = weight(), weight()
    alone, inner = AdamW([moving], lr=0.1), AdamW([twin], lr=0.1)
    feed(alone, moving, grads_of()[:7])
    feed(inner, twin, grads_of()[:7])
    wrapped = SNOO(AdamW([moving], lr=0.3), interval=3)
    wrapped.load_state_dict(alone.state_dict())
    assert wrapped.at_boundary
    assert torch.equal(feed(wrapped, moving, grads_of()[7:9]), feed(inner, twin, grads_of()[7:9]))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def layer(mesh: DeviceMesh | None) -> nn.Module:
    module = nn.Linear(3, 4, bias=False, dtype=torch.float64)
    start = weight().detach()
    module.weight = nn.Parameter(start if mesh is None else distribute_tensor(start, mesh, [Shard(0)]))
    return module


def feed_layer(optimizer: torch.optim.Optimizer, module: nn.Module, grads: list[Tensor]) -> Tensor:
    moving = module.weight
    assert isinstance(moving, nn.Parameter)
    for grad in grads:
        moving.grad = distribute_tensor(grad, moving.device_mesh, [Shard(0)]) if isinstance(moving, DTensor) else grad
        optimizer.step()
    block = moving.to_local() if isinstance(moving, DTensor) else moving
    return block.detach().clone()


@pytest.mark.parametrize("sharded", [False, True])
def test_distributed_checkpoints_go_on_bit_for_bit(mesh: DeviceMesh, tmp_path: Path, sharded: bool) -> None:
    def build() -> tuple[nn.Module, SNOO]:
        module = layer(mesh if sharded else None)
        return module, SNOO(AdamW(module.parameters(), lr=0.1), interval=3, lr=0.8, momentum=0.5)

    straight, optimizer = build()
    expected = feed_layer(optimizer, straight, grads_of())
    plain = weight()
    twin = SNOO(AdamW([plain], lr=0.1), interval=3, lr=0.8, momentum=0.5)
    assert torch.equal(feed(twin, plain, grads_of()), expected)
    before, optimizer = build()
    feed_layer(optimizer, before, grads_of()[:7])
    saved: dict[str, Any] = {"model": before.state_dict(), "optimizer": get_optimizer_state_dict(before, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint")
    after, optimizer = build()
    parts: dict[str, Any] = {"model": after.state_dict(), "optimizer": get_optimizer_state_dict(after, optimizer)}
    dcp.load(parts, checkpoint_id=tmp_path / "checkpoint")
    after.load_state_dict(parts["model"])
    set_optimizer_state_dict(after, optimizer, parts["optimizer"])
    if sharded:
        assert isinstance(after.weight, DTensor)
        assert isinstance(optimizer.state[after.weight]["outer_momentum"], DTensor)
    assert torch.equal(feed_layer(optimizer, after, grads_of()[7:]), expected)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("make", [SNOO, Lookahead])
def test_a_checkpoint_before_the_first_step_changes_nothing(mesh: DeviceMesh, sharded: bool, make: type[SNOO]) -> None:
    """torch makes the state of an optimizer without any by a step at rate 0 on gradients of zeros."""
    module, twin = layer(mesh if sharded else None), layer(mesh if sharded else None)
    saved, other = (make(torch.optim.SGD(m.parameters(), lr=0.1), interval=3) for m in (module, twin))
    get_optimizer_state_dict(module, saved)
    assert saved.num_steps == 0
    assert saved.state, "there is something to load a checkpoint into"
    assert torch.equal(feed_layer(saved, module, grads_of()), feed_layer(other, twin, grads_of()))


def test_steps_on_first_gradients_of_zeros_and_later_ones_at_rate_0_count() -> None:
    moving = weight()
    optimizer = SNOO(torch.optim.SGD([moving], lr=0.1), interval=3)
    feed(optimizer, moving, [torch.zeros(4, 3, dtype=torch.float64)])
    optimizer.param_groups[0]["lr"] = 0.0
    feed(optimizer, moving, grads_of(steps=1))
    assert optimizer.num_steps == 2


@pytest.mark.parametrize("skipped", [0, 1, 2, 3])
def test_a_skipped_step_counts_and_does_not_delay_the_outer_step(skipped: int) -> None:
    moving = weight()
    optimizer = SNOO(sgd(moving), interval=3, lr=0.8, momentum=0.5)
    slow = weight().detach().clone()
    fast, buffer = slow.clone(), torch.zeros_like(slow)
    for step, grad in enumerate(grads_of(steps=9)):
        if step == skipped:
            optimizer.count_skipped_step()
        else:
            feed(optimizer, moving, [grad])
            fast = fast.add(grad, alpha=-0.1)
        assert optimizer.num_steps == (step + 1) % 3
        if (step + 1) % 3 == 0:
            buffer = 0.5 * buffer + (slow - fast)
            slow = slow - 0.8 * (0.5 * buffer + (slow - fast))
            fast = slow.clone()
        assert torch.equal(moving, fast)


@pytest.mark.parametrize("reshards", [True, False])
def test_slow_weights_of_a_model_under_fsdp2_are_seen_inside_and_gone_after(mesh: DeviceMesh, reshards: bool) -> None:
    """After a forward pass without backward the root keeps gathered weights, which the next forward pass would use."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twin, rows = copy.deepcopy(model), torch.randn(5, 4)
    start = twin(rows).detach().clone()
    fully_shard(model[0], mesh=mesh, reshard_after_forward=reshards)
    fully_shard(model, mesh=mesh)
    optimizers = [SNOO(torch.optim.SGD(m.parameters(), lr=0.5), interval=100) for m in (model, twin)]
    for _ in range(3):
        for module, optimizer in zip((model, twin), optimizers, strict=True):
            module(rows).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = twin(rows).detach()
    # One rank: the same products in the same order but for their layout in memory.
    close = {"rtol": 1e-6, "atol": 1e-6}
    with torch.no_grad():
        torch.testing.assert_close(model(rows), expected, **close)  # leaves gathered fast weights behind
        with optimizers[0].slow_weights(model):
            torch.testing.assert_close(model(rows), start, **close)  # and these, slow ones
    torch.testing.assert_close(model(rows).detach(), expected, **close)
    assert (expected - start).abs().max() > 0.1
    for given in ((), (twin,)):
        with (
            pytest.raises(InvalidInputError, match=r"DTensors of none of them; .*slow_weights\(model\)"),
            optimizers[0].slow_weights(*given),
        ):
            pass


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_goes_on_by_itself_as_the_original_would(way: Callable[[Any], Any]) -> None:
    moving = weight()
    wrapped = SNOO(AdamW([moving], lr=0.1), interval=5)
    feed(wrapped, moving, grads_of()[:7])
    other = way(wrapped)
    (copied,) = other.param_groups[0]["params"]
    assert copied is not moving
    expected = feed(wrapped, moving, grads_of()[7:])
    assert torch.equal(feed(other, copied, grads_of()[7:]), expected)


def test_slow_weights_are_seen_inside_and_gone_after() -> None:
    moving = weight()
    wrapped = Lookahead(sgd(moving), interval=5)
    start = moving.detach().clone()
    feed(wrapped, moving, grads_of()[:3])
    fast = moving.detach().clone()
    with wrapped.slow_weights():
        assert torch.equal(moving, start)
        with pytest.raises(InvalidInputError, match="leave slow_weights"):
            wrapped.step()
        with pytest.raises(InvalidInputError, match="leave slow_weights"):
            wrapped.state_dict()
    assert torch.equal(moving, fast)
    twin = weight()
    expected = feed(Lookahead(sgd(twin), interval=5), twin, grads_of())
    assert torch.equal(feed(wrapped, moving, grads_of()[3:]), expected)


def test_batches_change_at_boundaries_and_momentum_keeps_its_units_on_request() -> None:
    kept, scaled = weight(), weight()
    one = SNOO(sgd(kept), interval=2, lr=0.8, momentum=0.5)
    other = SNOO(sgd(scaled), interval=2, lr=0.8, momentum=0.5, batch_exponent=0.5)
    for optimizer, moving in ((one, kept), (other, scaled)):
        feed(optimizer, moving, grads_of(steps=3))
        with pytest.raises(InvalidInputError, match=r"8 to 32 samples 1 steps after .* every 2 steps"):
            optimizer.on_batch_change(global_batch_size=32, previous=8)
        feed(optimizer, moving, grads_of(steps=4)[3:])
    assert torch.equal(kept, scaled)
    for optimizer in (one, other):
        optimizer.on_batch_change(global_batch_size=32, previous=8)
    momentum = one.state[kept]["outer_momentum"]
    assert momentum.abs().min() > 0
    assert torch.equal(other.state[scaled]["outer_momentum"], 2 * momentum)
    assert torch.equal(feed(one, kept, grads_of(steps=8)[4:]), recursion(interval=2, lr=0.8, momentum=0.5, steps=8))


class Reacting(torch.optim.SGD):
    heard: tuple[int, int] | None = None

    def on_batch_change(self, *, global_batch_size: int, previous: int) -> None:
        self.heard = global_batch_size, previous


def test_a_wrapper_has_the_abilities_of_the_inner_optimizer() -> None:
    moving = weight()
    reacting = Reacting([moving], lr=0.1)
    Lookahead(reacting).on_batch_change(global_batch_size=32, previous=8)
    assert reacting.heard == (32, 8)
    adamw = AdamW([moving], update_bias_correction=True)
    wrapped = SNOO(adamw)
    assert wrapped.averages == ("betas",)
    assert wrapped.wants_halves
    twin = weight()
    reference = AdamW([twin], update_bias_correction=True)
    difference = torch.full_like(moving, 0.5)
    wrapped.supply_halves({moving: difference})
    reference.supply_halves({twin: difference})
    assert torch.equal(feed(wrapped, moving, grads_of(steps=1)), feed(reference, twin, grads_of(steps=1)))
    assert not hasattr(SNOO(sgd(moving)), "averages")
    assert not hasattr(SNOO(sgd(moving)), "supply_halves")


def test_a_parameter_without_gradient_and_a_frozen_one_do_not_move() -> None:
    moving, still, frozen = weight(), weight(), weight()
    wrapped = SNOO(torch.optim.SGD([moving, still, frozen], lr=0.1), interval=2, momentum=0.5)
    for grad in grads_of(steps=4):
        frozen.grad = grad.clone()
        feed(wrapped, moving, [grad])
    frozen.requires_grad_(False)
    frozen.grad = None
    before = frozen.detach().clone()
    feed(wrapped, moving, grads_of(steps=4))
    assert torch.equal(still, weight())
    assert torch.equal(frozen, before)


def test_step_returns_the_loss_of_the_closure() -> None:
    moving = weight()
    wrapped = Lookahead(AdamW([moving], lr=0.1))

    def closure() -> float:
        wrapped.zero_grad()
        loss = (moving**2).sum()
        loss.backward()
        return loss.item()

    assert wrapped.step(closure) == pytest.approx(float((weight() ** 2).sum().detach()))
    assert not torch.equal(moving, weight())


def test_wrappers_refuse_settings_out_of_range() -> None:
    inner = sgd(weight())
    with pytest.raises(InvalidInputError, match="1 <= interval"):
        SNOO(inner, interval=0)
    with pytest.raises(InvalidInputError, match="whole number"):
        SNOO(inner, interval=2.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="0 <= momentum < 1"):
        SNOO(inner, momentum=1.0)
    with pytest.raises(InvalidInputError, match="0 < pull <= 1"):
        Lookahead(inner, pull=1.5)
