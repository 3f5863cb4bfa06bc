"""Against torch.optim.AdamW, float64 recursions written here, and means over many noisy batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.optim.adamw import AdamW

SHAPES = [(7, 3), (3, 7), (5, 5), (11,), ()]
STEPS = 20


def stream(seed: int = 0, *, dtype: torch.dtype = torch.float64, steps: int = STEPS) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES] for _ in range(steps)]
    return [[tensor.to(dtype) for tensor in of_step] for of_step in draw]


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(tensor) for tensor in stream(9, dtype=dtype, steps=1)[0]]


def feed(
    optimizer: torch.optim.Optimizer, moving: list[torch.nn.Parameter], grads: list[list[Tensor]], first: int = 0
) -> list[Tensor]:
    for step, of_step in enumerate(grads, first):
        for parameter, grad in zip(moving, of_step, strict=True):
            parameter.grad = grad.to(parameter.dtype).clone()
        if isinstance(optimizer, AdamW) and optimizer.wants_halves:
            optimizer.supply_halves(dict(zip(moving, differences(step, moving[0].dtype), strict=True)))
        optimizer.step()
    return [parameter.detach().double() for parameter in moving]


def differences(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [0.7 * tensor for tensor in stream(1000 + step, dtype=dtype, steps=1)[0]]


@pytest.mark.parametrize("maximize", [False, True])
def test_twenty_steps_are_those_of_torch(maximize: bool) -> None:
    # The averages come from the same operations. torch multiplies lr in before dividing, we after: two roundings of
    # each step and one of the weight, each below 2^-24 of a weight of at most 4.
    settings = {"lr": 0.01, "weight_decay": 0.1, "maximize": maximize}
    ours, twins = parameters(torch.float32), parameters(torch.float32)
    optimizer, reference = AdamW(ours, **settings), torch.optim.AdamW(twins, foreach=True, **settings)
    weights = feed(optimizer, ours, stream())
    expected = feed(reference, twins, stream())
    for a, b, w, v in zip(weights, expected, ours, twins, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=STEPS * 4 * 2**-24)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[w][name], reference.state[v][name])


def test_a_checkpoint_of_torch_goes_on_here_and_back() -> None:
    grads = stream()
    straight = parameters()
    expected = feed(torch.optim.AdamW(straight, lr=0.01), straight, grads)
    moving = parameters()
    first = torch.optim.AdamW(moving, lr=0.01)
    feed(first, moving, grads[:7])
    second = AdamW(moving, lr=0.3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    feed(second, moving, grads[7:14])
    third = torch.optim.AdamW(moving, lr=0.3)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    feed(third, moving, grads[14:])
    for a, b in zip(moving, expected, strict=True):
        assert torch.allclose(a.detach(), b, rtol=0, atol=1e-14)  # weights of order 1 in float64


def test_independent_decay_is_measured_in_parts_of_the_first_rate() -> None:
    moving = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = AdamW(moving, lr=0.5, weight_decay=0.1, decay="independent")
    for rate in (0.5, 0.25):
        optimizer.param_groups[0]["lr"] = rate
        moving[0].grad = torch.zeros(3, dtype=torch.float64)
        optimizer.step()
    expected = (1 - 0.1) * (1 - 0.05)
    assert torch.allclose(moving[0].detach(), torch.full((3,), expected, dtype=torch.float64), rtol=1e-15)


def corrected_recursion(*, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> list[Tensor]:
    """The formulas of the class, leave-one-out over two folds, entry by entry."""
    beta1, beta2 = betas
    weights = [parameter.detach().clone() for parameter in parameters()]
    firsts = [torch.zeros_like(weight) for weight in weights]
    seconds = [torch.zeros_like(weight) for weight in weights]
    for t, grads in enumerate(stream(), 1):
        for i, (grad, difference) in enumerate(zip(grads, differences(t - 1), strict=True)):
            folds = [grad + difference, grad - difference]
            numerators, denominators = [], []
            for fold in folds:
                others = 2 * grad - fold
                numerators.append((beta1 * firsts[i] + (1 - beta1) * fold) / (1 - beta1**t))
                denominators.append(((beta2 * seconds[i] + (1 - beta2) * others**2) / (1 - beta2**t)).sqrt() + eps)
            variance = torch.stack(denominators).var(0, unbiased=True)
            crossed = sum(n / p for n, p in zip(numerators, denominators, strict=True)) / 2
            bent = sum(n / p**3 for n, p in zip(numerators, denominators, strict=True)) / 2
            update = crossed - variance * bent
            update = torch.where(update.sign() * crossed.sign() < 0, torch.zeros_like(update), update)
            weights[i] = weights[i] * (1 - lr * weight_decay) - lr * update
            firsts[i] = beta1 * firsts[i] + (1 - beta1) * grad
            seconds[i] = beta2 * seconds[i] + (1 - beta2) * grad**2
    return weights


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.3)])
def test_the_correction_follows_its_recursion(betas: tuple[float, float]) -> None:
    settings = {"lr": 0.01, "betas": betas, "eps": 1e-6, "weight_decay": 0.1}
    moving = parameters()
    weights = feed(AdamW(moving, update_bias_correction=True, **settings), moving, stream())
    start = parameters()
    plain = feed(AdamW(start, **settings), start, stream())
    for a, b, c, w in zip(weights, corrected_recursion(**settings), plain, parameters(), strict=True):
        travelled = (b - w.detach()).norm()
        assert (a - b).norm() < 1e-12 * travelled  # float64, sums in another order
        assert (b - c).norm() > 1e-3 * travelled  # the correction is not lost in that


def test_an_entry_that_the_correction_would_turn_round_stands_still() -> None:
    # beta2 = 0: p_A = |g_B| = 4, p_B = |g_A| = 1. c = (1/4 + 4/1)/2, V = (4 - 1)^2 / 2 = 4.5, bent = (1/64 + 4)/2.
    moving = torch.nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    optimizer = AdamW([moving], lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, update_bias_correction=True)
    moving.grad = torch.tensor([2.5], dtype=torch.float64)
    optimizer.supply_halves({moving: torch.tensor([-1.5], dtype=torch.float64)})
    optimizer.step()
    assert 4.5 * (1 / 64 + 4) > 1 / 4 + 4
    assert moving.item() == 0.0


def noisy_steps(betas: tuple[float, float], spread: float) -> dict[str, Tensor]:
    """One step of entries that all have mean gradient 1, and averages of a long noiseless past."""
    generator = torch.Generator().manual_seed(0)
    shape = (1_000_000,)
    half_a, half_b = (
        1 + spread * 2**0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    samples = {"half": half_b, "whole": (half_a + half_b) / 2}
    for name, corrects in (("plain", False), ("corrected", True)):
        moving = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = AdamW([moving], lr=1.0, betas=betas, weight_decay=0.0, update_bias_correction=corrects)
        ones = torch.ones(shape, dtype=torch.float64)
        optimizer.state[moving] = {"step": torch.tensor(1e6), "exp_avg": ones.clone(), "exp_avg_sq": ones.clone()}
        moving.grad = samples["whole"].clone()
        optimizer.supply_halves({moving: (half_a - half_b) / 2})
        optimizer.step()
        samples[name] = -moving.detach()
    return samples


def standard_error(samples: Tensor) -> float:
    return float(samples.std() / samples.numel() ** 0.5)


@pytest.mark.parametrize(("betas", "spread"), [((0.0, 0.9), 0.3), ((0.0, 0.99), 1.0)])
def test_corrected_steps_without_momentum_are_closer_to_noiseless_ones(
    betas: tuple[float, float], spread: float
) -> None:
    # The noiseless step is 1. To first order in 1 - beta2, plain steps fall short by 3/2 and corrected ones by 1 times
    # (1 - beta2) spread^2.
    steps = noisy_steps(betas, spread)
    missing = {name: 1 - float(steps[name].mean()) for name in ("plain", "corrected")}
    margin = 5 * standard_error(steps["plain"] - steps["corrected"])
    assert 0 < missing["corrected"] < missing["plain"] - margin


def test_corrected_steps_are_means_over_means_at_usual_betas_and_plain_ones_are_not() -> None:
    beta1, beta2 = betas = (0.9, 0.95)
    steps = noisy_steps(betas, 0.5)
    numerator = float((beta1 + (1 - beta1) * steps["whole"]).mean())

    def excess(name: str, gradient: Tensor) -> float:
        denominator = (beta2 + (1 - beta2) * gradient**2).sqrt() + 1e-8
        return float(steps[name].mean()) - numerator / float(denominator.mean())

    # Ratios of means over the same draws: their own sampling error is at most that of the steps, so 2 of each.
    assert abs(excess("plain", steps["whole"])) > 2 * 5 * standard_error(steps["plain"])
    assert abs(excess("corrected", steps["half"])) < 0.2 * abs(excess("plain", steps["whole"]))


def test_halves_serve_one_step_and_those_without_use_are_left_out() -> None:
    moving = parameters()
    optimizer = AdamW(
        [{"params": moving[:1], "update_bias_correction": True}, {"params": moving[1:]}], lr=0.01, weight_decay=0.0
    )
    plain = parameters()
    other = AdamW(plain, lr=0.01, weight_decay=0.0)
    assert optimizer.wants_halves
    assert not other.wants_halves
    supplied = {parameter: torch.full_like(parameter, 0.5) for parameter in [*moving, *plain]}
    before = []
    for grads in stream(steps=2):
        for parameter, twin, grad in zip(moving, plain, grads, strict=True):
            parameter.grad, twin.grad = grad.clone(), grad.clone()
        if not before:
            optimizer.supply_halves(supplied)
        before.append([parameter.detach().clone() for parameter in moving])
        optimizer.step()
        other.step()
        before.append([parameter.detach().clone() for parameter in moving])
    moves = [(later[0] - earlier[0]) for earlier, later in pairwise(before)]
    assert not torch.equal(moving[0], plain[0])  # the first step was another one
    assert all(torch.equal(a, b) for a, b in zip(moving[1:], plain[1:], strict=True))
    state = optimizer.state[moving[0]]
    p = (state["exp_avg_sq"] / (1 - 0.999**2)).sqrt() + 1e-8
    assert torch.allclose(moves[2], -0.01 * state["exp_avg"] / (1 - 0.9**2) / p, rtol=1e-12)  # the second a plain one


def test_supply_halves_refuses_another_shape() -> None:
    moving = torch.nn.Parameter(torch.zeros(4, 2))
    optimizer = AdamW([moving], update_bias_correction=True)
    with pytest.raises(InvalidInputError, match=r"\(2, 2\).*\(4, 2\).*this rank's block"):
        optimizer.supply_halves({moving: torch.zeros(2, 2)})


@pytest.mark.parametrize("corrects", [False, True])
def test_ascending_on_the_negated_gradient_is_descending_on_it(corrects: bool) -> None:
    settings = {"lr": 0.01, "weight_decay": 0.1, "update_bias_correction": corrects}
    down, up = parameters(), parameters()
    expected = feed(AdamW(down, **settings), down, stream())
    climber = AdamW(up, maximize=True, **settings)
    for step, grads in enumerate(stream()):
        for parameter, grad in zip(up, grads, strict=True):
            parameter.grad = -grad
        climber.supply_halves({p: -d for p, d in zip(up, differences(step), strict=True)})
        climber.step()
    assert all(torch.equal(a.detach(), b) for a, b in zip(up, expected, strict=True))


@pytest.mark.parametrize("corrects", [False, True])
def test_a_saved_optimizer_goes_on_bit_for_bit(corrects: bool) -> None:
    settings = {"lr": 0.01, "update_bias_correction": corrects}
    straight, moving = parameters(), parameters()
    expected = feed(AdamW(straight, **settings), straight, stream())
    before = AdamW(moving, **settings)
    feed(before, moving, stream()[:7])
    after = AdamW(moving, lr=0.7)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(feed(after, moving, stream()[7:], first=7), expected, strict=True))


def test_a_step_without_gradients_moves_nothing_and_returns_the_closures_loss() -> None:
    still, moving = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamW([still, moving], lr=0.1, weight_decay=0.5)

    def closure() -> float:
        loss = (moving**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert torch.equal(still, torch.ones(3))
    assert not torch.equal(moving, torch.ones(3))
    assert still not in optimizer.state


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sharded_and_plain_parameters_share_a_group() -> None:
    mesh = init_device_mesh("cpu", (1,))
    plain, mixed = parameters()[:2], parameters()[:2]
    sharded = torch.nn.Parameter(distribute_tensor(mixed[0].detach(), mesh, [Shard(0)]))
    settings = {"lr": 0.01, "update_bias_correction": True}
    reference, optimizer = AdamW(plain, **settings), AdamW([sharded, mixed[1]], **settings)
    for step, (grad, other, *_) in enumerate(stream()):
        plain[0].grad, plain[1].grad, mixed[1].grad = grad.clone(), other.clone(), other.clone()
        sharded.grad = distribute_tensor(grad, mesh, [Shard(0)])
        d = differences(step)
        reference.supply_halves({plain[0]: d[0], plain[1]: d[1]})
        optimizer.supply_halves({sharded: d[0], mixed[1]: d[1]})
        reference.step()
        optimizer.step()
    assert isinstance(sharded, DTensor)
    assert isinstance(optimizer.state[sharded]["exp_avg"], DTensor)
    assert torch.equal(sharded.to_local(), plain[0])
    assert torch.equal(mixed[1], plain[1])


def test_adamw_refuses_a_checkpoint_with_amsgrad_and_stays_as_it_was() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    other = torch.optim.AdamW([weight], lr=0.3, amsgrad=True)
    other.step()
    adamw = AdamW([weight], lr=0.01)
    with pytest.raises(InvalidInputError, match="amsgrad=True"):
        adamw.load_state_dict(other.state_dict())
    assert adamw.param_groups[0]["lr"] == 0.01
    assert not adamw.state


def test_adamw_refuses_an_eps_that_vanishes_in_the_parameters_dtype() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(InvalidInputError, match=r"eps=1e-08 is 0 in torch\.float16, .*; give eps=6e-05\."):
        AdamW([weight])
    optimizer = AdamW([weight], eps=6e-5, weight_decay=0.0)
    weight.grad = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float16)
    optimizer.step()
    # The first step is lr long, here 1e-3, which half precision beside 1 rounds to 2^-11.
    assert weight.tolist() == pytest.approx([1.0, 0.999, 1.001], abs=2**-11)
    assert weight[0] == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (torch.optim.Adamax, "lack amsgrad"),
        (torch.optim.RAdam, "lack amsgrad"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "decays gradients by weight_decay=0.1"),
        (torch.optim.NAdam, "hold momentum_decay"),
    ],
)
def test_adamw_refuses_checkpoints_of_torchs_relatives(build: Any, message: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    other = build([weight])
    other.step()
    adamw = AdamW([weight], lr=0.01)
    with pytest.raises(InvalidInputError, match=message):
        adamw.load_state_dict(other.state_dict())
    assert not adamw.state


def test_adamw_goes_on_from_torchs_adam_without_decay() -> None:
    first, second = parameters(), parameters()
    adam = torch.optim.Adam(first, lr=0.01)
    feed(adam, first, stream()[:7])
    adamw = AdamW(second, lr=0.3)
    adamw.load_state_dict(copy.deepcopy(adam.state_dict()))
    for w, v in zip(second, first, strict=True):
        w.data.copy_(v.data)
    for a, b in zip(feed(adamw, second, stream()[7:]), feed(adam, first, stream()[7:]), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)  # weights of order 1 in float64


def test_adamw_refuses_settings_out_of_range() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(InvalidInputError, match="0 <= beta2 < 1"):
        AdamW([weight], betas=(0.9, 1.0))
    with pytest.raises(InvalidInputError, match="0 <= eps"):
        AdamW([{"params": [weight], "eps": -1.0}])
    with pytest.raises(InvalidInputError, match="decoupled, independent"):
        AdamW([weight], decay="coupled")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="view_as_real"):
        AdamW([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
