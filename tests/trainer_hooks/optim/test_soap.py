"""Against the published algorithm, written here in float64 with momentum in weight space; and the spike it has."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from gns_controller.core.errors import InvalidInputError
from tests.trainer_hooks.optim.matrix_streams import (
    SHAPES,
    distance,
    follow,
    goes_on_as_if_never_stopped,
    keeps_float32_beside_bfloat16,
    leaves_alone_what_has_no_gradient,
    mirrors_when_maximizing,
    start,
    stream,
)
from trainer_hooks.optim.engine.exchange import Exchange
from trainer_hooks.optim.soap import SOAP


def published(
    weight: Tensor,
    grads: list[Tensor],
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.95, 0.95),
    shampoo_beta: float = 0.95,
    precondition_frequency: int = 10,
    longest: int = 10000,
) -> tuple[Tensor, list[float]]:
    """Return the weights at the end, and the RMS of the updates over lr."""
    beta1, beta2 = betas
    bases = [torch.eye(size).double() for size in weight.shape]
    factors = [torch.zeros(size, size).double() for size in weight.shape]
    momentum, square = torch.zeros_like(weight), torch.zeros_like(weight)
    sizes = []
    for t, g in enumerate(grads):
        if t:
            rotated = bases[0].T @ g @ bases[1]
            momentum = beta1 * momentum + (1 - beta1) * g
            square = beta2 * square + (1 - beta2) * rotated**2
            direction = (bases[0].T @ momentum @ bases[1]) / (square.sqrt() + 1e-8)
            update = bases[0] @ direction @ bases[1].T * math.sqrt(1 - beta2**t) / (1 - beta1**t)
            weight = weight - lr * update
            weight = weight - lr * weight_decay * weight
            sizes.append(float(update.square().mean().sqrt()))
        for side, seen in enumerate((g @ g.T, g.T @ g)):
            factor = factors[side] = shampoo_beta * factors[side] + (1 - shampoo_beta) * seen
            if weight.shape[side] > longest:
                continue
            if t == 0:
                bases[side] = torch.linalg.eigh(factor).eigenvectors.flip(1)
            elif t % precondition_frequency == 0:
                order = (bases[side].T @ factor @ bases[side]).diagonal().argsort(descending=True)
                square = square[order] if side == 0 else square[:, order]
                bases[side] = torch.linalg.qr(factor @ bases[side][:, order]).Q
    return weight, sizes


def steps_of(optimizer: SOAP, parameter: torch.nn.Parameter, grads: list[Tensor], lr: float) -> list[float]:
    """RMS of each step, over lr."""
    ends = [parameter.detach().clone()] + [follow(optimizer, parameter, [grad]) for grad in grads]
    return [float((after - before).square().mean().sqrt()) / lr for before, after in pairwise(ends)]


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "often": {"precondition_frequency": 3, "betas": (0.9, 0.99), "shampoo_beta": 0.9},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SETTINGS)
def test_soap_without_guard_follows_the_published_algorithm(kind: str, shape: tuple[int, int]) -> None:
    # The first basis of the longer side has null directions which no two decompositions share, so that side is left
    # alone, as one that is too long is.
    parameter = start(*shape)
    settings = {"lr": 0.02, "weight_decay": 0.1, **SETTINGS[kind]}
    optimizer = SOAP([parameter], guard=False, max_preconditioner_dim=min(shape), **settings)
    weights = follow(optimizer, parameter, stream(*shape))
    expected, _ = published(start(*shape).detach(), stream(*shape), longest=min(shape), **settings)
    assert distance(weights, expected) < 1e-12


def test_soap_in_float32_stays_within_1e_6_of_the_way() -> None:
    # A way as long as the first weights, whose own rounding would be 3e-6 of it at lr=0.02.
    parameter = start(6, 6, torch.float32)
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    weights = follow(SOAP([parameter], guard=False, **settings), parameter, stream(6, 6))
    expected, _ = published(start(6, 6).detach(), stream(6, 6), **settings)
    assert distance(weights, expected) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_soap_without_guard_is_the_one_of_pytorch_optimizer(shape: tuple[int, int]) -> None:
    settings = {"lr": 3e-3, "betas": (0.95, 0.95), "precondition_frequency": 5, "weight_decay": 0.0}
    ends = []
    for build in (partial(SOAP, guard=False, **settings), partial(pytorch_optimizer.SOAP, **settings)):
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        ends.append(follow(build([parameter]), parameter, stream(*shape)))
    # The peer keeps factors and bases in float32.
    assert float((ends[0] - ends[1]).norm() / ends[1].norm()) < 1e-6


def test_the_guard_changes_nothing_while_the_basis_stands_still() -> None:
    grads = stream(6, 9)
    for betas in ((0.95, 0.95), (0.9, 0.999), (0.0, 0.5), (0.7, 0.49)):
        guarded, bare = start(6, 9), start(6, 9)
        settings: dict[str, Any] = {"betas": betas, "shampoo_beta": 0.9, "precondition_frequency": 100}
        weights = follow(SOAP([guarded], **settings), guarded, grads)
        assert distance(weights, follow(SOAP([bare], guard=False, **settings), bare, grads)) < 1e-12


def falling(side: int, seed: int) -> list[Tensor]:
    """Two gradients, and then a ten-thousandth: whatever v holds after the first refresh is from the second alone."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(side, side, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [*grads[:2], 1e-4 * grads[2], 1e-4 * grads[3]]


def test_only_the_published_update_spikes_after_its_first_refresh() -> None:
    lr = 0.01
    spikes = []
    for seed in range(8):
        settings: dict[str, Any] = {"lr": lr, "weight_decay": 0.0, "precondition_frequency": 1}
        bare, guarded = start(16, 16), start(16, 16)
        _, sizes = published(start(16, 16).detach(), falling(16, seed), **settings)
        _, *steps = steps_of(SOAP([bare], guard=False, **settings), bare, falling(16, seed), lr)
        first, *held = steps_of(SOAP([guarded], **settings), guarded, falling(16, seed), lr)
        assert steps == pytest.approx(sizes, rel=1e-6)
        assert first == 0
        # Equal betas: no entry of an update exceeds 1.
        assert max(held) < 1 + 1e-9
        spikes.append(max(sizes))
    # Between 3.4 and 20.1: the size is that of the smallest of 256 squares, and so a matter of chance.
    assert min(spikes) > 3
    assert max(spikes) > 15


def test_the_guard_lets_through_what_a_basis_that_stands_still_can_give() -> None:
    # Gradients proportional to (beta1 / beta2)^(t - s) reach the bound of Cauchy and Schwarz, here at t = 12.
    beta1, beta2, t = 0.9, 0.99, 12
    grads = [(beta1 / beta2) ** (t - s) * torch.ones(1, 1, dtype=torch.float64) for s in range(t + 1)]
    guarded = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    bare = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    settings: dict[str, Any] = {"lr": 1.0, "betas": (beta1, beta2), "weight_decay": 0.0, "epsilon": 0.0}
    held = steps_of(SOAP([guarded], **settings), guarded, grads, 1.0)
    free = steps_of(SOAP([bare], guard=False, **settings), bare, grads, 1.0)
    assert held == pytest.approx(free, rel=1e-12)
    assert free[-1] > 1


def test_the_first_gradient_moves_and_decays_nothing() -> None:
    parameter = start(6, 9)
    weights = follow(SOAP([parameter], lr=0.1, weight_decay=0.5), parameter, stream(6, 9, steps=1))
    assert torch.equal(weights, start(6, 9).detach())


def test_a_distributed_state_dict_before_the_first_step_changes_no_step() -> None:
    model = torch.nn.Linear(9, 6, bias=False, dtype=torch.float64)
    begin = model.weight.detach().clone()
    optimizer = SOAP(model.parameters(), lr=0.02, weight_decay=0.1, guard=False)
    get_optimizer_state_dict(model, optimizer)
    weights = follow(optimizer, model.weight, stream(6, 9))
    expected, _ = published(begin, stream(6, 9), lr=0.02, weight_decay=0.1)
    assert float((weights - expected).norm() / (expected - begin).norm()) < 1e-9  # float64, as without asking


def test_the_cost_counts_the_sides_that_are_rotated_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[float] = []

    def recorded(parameters: Any, costs: list[float], group: Any) -> Exchange:
        counted.extend(costs)
        return Exchange(parameters, costs, group)

    monkeypatch.setattr("trainer_hooks.optim.engine.matrix_optimizer.Exchange", recorded)
    for shape in ((20, 6), (6, 5)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        optimizer = SOAP([parameter], max_preconditioner_dim=10, precondition_frequency=5)
        follow(optimizer, parameter, [torch.ones(shape)])
    # Two products per side, and decompositions of ten products every five steps.
    assert counted == [2 * 20 * 6 * 6 + 10 * 6**3 / 5, 2 * 6 * 5 * (6 + 5) + 10 * (6**3 + 5**3) / 5]


def test_a_batch_change_turns_the_basis_once_at_the_next_step() -> None:
    parameter = start(6, 9)
    optimizer = SOAP([parameter], precondition_frequency=100)
    bases: list[Tensor] = []
    for number, grad in enumerate(stream(6, 9, steps=6)):
        if number == 3:
            optimizer.on_batch_change(global_batch_size=64, previous=32)
        follow(optimizer, parameter, [grad])
        bases.append(optimizer.state[parameter]["left_basis.0"].clone())
    assert [torch.equal(*pair) for pair in pairwise(bases)] == [True, True, False, True, True]


def test_a_factor_that_is_not_finite_keeps_the_old_basis() -> None:
    parameter = start(6, 9)
    optimizer = SOAP([parameter], precondition_frequency=1)
    follow(optimizer, parameter, stream(6, 9, steps=3))
    before = optimizer.state[parameter]["left_basis.0"].clone()
    optimizer.state[parameter]["left.0"][0, 0] = torch.inf
    weights = follow(optimizer, parameter, stream(6, 9, steps=2, seed=1))
    assert torch.equal(optimizer.state[parameter]["left_basis.0"], before)
    assert bool(weights.isfinite().all())


def test_soap_resumes_maximizes_and_keeps_float32_state() -> None:
    assert goes_on_as_if_never_stopped(lambda params: SOAP(params, precondition_frequency=3))
    assert mirrors_when_maximizing(SOAP, lambda params: SOAP(params, maximize=True))
    assert leaves_alone_what_has_no_gradient(SOAP)
    assert keeps_float32_beside_bfloat16(SOAP)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"0 <= betas\[0\] < 1"),
        ({"shampoo_beta": 1.0}, "0 <= shampoo_beta < 1"),
        ({"epsilon": -1.0}, "0 <= epsilon"),
        ({"precondition_frequency": 0}, "whole numbers from 1"),
    ],
)
def test_soap_refuses_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        SOAP([start(3, 3)], **settings)
