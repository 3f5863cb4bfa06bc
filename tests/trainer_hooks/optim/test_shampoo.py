"""Against recursions in float64 with eigendecompositions of their own, and against closed forms."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

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
from trainer_hooks.optim.shampoo import Shampoo

SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {},
    "rms_match": {"grafting": "rms_match", "nesterov": True},
    "ungrafted": {"grafting": "none", "exponent": 0.5, "betas": (0.95, 0.8)},
    "sum": {"betas": (0.9, 1.0), "grafting": "none", "epsilon": 1e-3, "relative_epsilon": False},
    "kl": {"factors": "kl", "exponent": 0.5, "grafting": "none", "betas": (0.9, 0.9)},
    "rarely": {"precondition_frequency": 3, "start_preconditioning_step": 4},
    "newton": {"method": "newton", "epsilon": 1e-3, "relative_epsilon": False},
    "no momentum": {"betas": (0.0, 0.9), "precondition_frequency": 2, "grafting": "rms_match"},
}


def root(factor: Tensor, exponent: float, epsilon: float, relative: bool) -> Tensor:
    values, basis = torch.linalg.eigh(factor)
    values = values.clamp_min(0)
    return basis @ torch.diag((values + epsilon * (values.max() if relative else 1)) ** -exponent) @ basis.T


def recursion(
    weight: Tensor,
    grads: list[Tensor],
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-6,
    relative_epsilon: bool = True,
    exponent: float = 0.25,
    factors: str = "gradient",
    nesterov: bool = False,
    precondition_frequency: int = 1,
    start_preconditioning_step: int = 1,
    grafting: str = "adam",
    method: str = "eigh",
) -> Tensor:
    rows, columns = weight.shape
    beta1, beta2 = betas
    left, right = torch.zeros(rows, rows).double(), torch.zeros(columns, columns).double()
    left_root, right_root = torch.eye(rows).double(), torch.eye(columns).double()
    momentum, square = torch.zeros_like(weight), torch.zeros_like(weight)
    new = 1.0 if beta2 == 1 else 1 - beta2
    for t, g in enumerate(grads, start=1):
        if factors == "kl":
            seen_left = g @ right_root @ right_root @ g.T / columns
            seen_right = g.T @ left_root @ left_root @ g / rows
        else:
            seen_left, seen_right = g @ g.T, g.T @ g
        left, right = beta2 * left + new * seen_left, beta2 * right + new * seen_right
        after = t - start_preconditioning_step
        if after >= 0 and after % precondition_frequency == 0:
            weights = 1.0 if beta2 == 1 else 1 - beta2**t
            left_root = root(left / weights, exponent, epsilon, relative_epsilon)
            right_root = root(right / weights, exponent, epsilon, relative_epsilon)
        momentum = beta1 * momentum + (1 - beta1) * g
        ahead = (beta1 * momentum + (1 - beta1) * g) / (1 - beta1 ** (t + 1))
        direction = ahead if nesterov else momentum / (1 - beta1**t)
        update = left_root @ direction @ right_root
        square = 0.999 * square + 0.001 * g**2
        adam = direction / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        if grafting == "adam":
            update = adam if after < 0 else update * adam.norm() / update.norm()
        elif grafting == "rms_match":
            update = update * 0.2 * (rows * columns) ** 0.5 / update.norm()
        weight = weight - lr * weight_decay * weight - lr * update
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SETTINGS)
def test_shampoo_follows_its_recursion(kind: str, shape: tuple[int, int]) -> None:
    # Both in float64, whose rounding the roots of factors damped at 1e-6 enlarge by 1e3 at most.
    settings = {"precondition_frequency": 1, **SETTINGS[kind]}
    parameter = start(*shape)
    weights = follow(Shampoo([parameter], lr=0.02, weight_decay=0.1, **settings), parameter, stream(*shape))
    expected = recursion(start(*shape).detach(), stream(*shape), lr=0.02, weight_decay=0.1, **settings)
    assert distance(weights, expected) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
def test_shampoo_in_float32_stays_within_1e_5_of_the_way(shape: tuple[int, int]) -> None:
    # Eigenvalues are off by 1e-7 of the largest. Damped at 1e-3 of it, the root of the smallest is off by 1e-4 / 4.
    parameter = start(*shape, torch.float32)
    settings: dict[str, Any] = {"weight_decay": 0.1, "epsilon": 1e-3, "precondition_frequency": 1}
    weights = follow(Shampoo([parameter], lr=0.02, **settings), parameter, stream(*shape))
    expected = recursion(start(*shape).detach(), stream(*shape), lr=0.02, **settings)
    assert distance(weights, expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_shampoo_without_averages_and_damping_takes_the_orthogonal_factor(shape: tuple[int, int]) -> None:
    (grad,) = stream(*shape, steps=1)
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    bare = Shampoo([parameter], lr=1.0, betas=(0.0, 0.0), epsilon=0.0, grafting="none")
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    # A Gram matrix squares the condition of about 10: 1e-13 remains of float64.
    assert torch.allclose(-follow(bare, parameter, [grad]), left @ right, rtol=0, atol=1e-12)


def test_blocks_are_preconditioned_and_grafted_each_by_itself() -> None:
    grads = stream(10, 7)
    parameter = start(10, 7)
    weights = follow(
        Shampoo([parameter], lr=0.02, max_preconditioner_dim=4, precondition_frequency=1), parameter, grads
    )
    expected = start(10, 7).detach()
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        for columns in (slice(0, 4), slice(4, 7)):
            block = recursion(expected[rows, columns], [grad[rows, columns] for grad in grads], lr=0.02)
            expected[rows, columns] = block
    assert distance(weights, expected) < 1e-10


def test_equal_shapes_in_one_batch_move_as_they_would_alone() -> None:
    streams = [stream(5, 8, seed=seed) for seed in range(3)]
    together = [start(5, 8) for _ in streams]
    optimizer = Shampoo(together, lr=0.02, precondition_frequency=3)
    for grads in zip(*streams, strict=True):
        for parameter, grad in zip(together, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    for parameter, grads in zip(together, streams, strict=True):
        expected = recursion(start(5, 8).detach(), grads, lr=0.02, precondition_frequency=3)
        assert distance(parameter.detach(), expected) < 1e-10


@pytest.mark.parametrize("grafting", ["adam", "rms_match", "none"])
def test_a_zero_gradient_moves_nothing(grafting: str) -> None:
    parameter = start(6, 9)
    weights = follow(Shampoo([parameter], lr=0.02, grafting=grafting), parameter, [torch.zeros(6, 9)] * 3)
    assert torch.equal(weights, start(6, 9).double())


@pytest.mark.parametrize("halves", [False, True])
def test_a_first_gradient_of_zeros_leaves_undamped_roots_at_the_identity(halves: bool) -> None:
    """Then the update is the momentum at the norm of Adam's, until the next roots."""
    parameter = start(6, 9)
    optimizer = Shampoo([parameter], lr=0.02, epsilon=0.0, precondition_frequency=50, update_bias_correction=halves)
    if halves:
        optimizer.supply_halves({parameter: torch.zeros(6, 9)})
    (grad,) = stream(6, 9, steps=1)
    weights = follow(optimizer, parameter, [torch.zeros(6, 9), grad])
    momentum, second_moment = 0.1 * grad / (1 - 0.9**2), 0.001 * grad**2 / (1 - 0.999**2)
    adam = momentum / (second_moment.sqrt() + 1e-8)
    expected = start(6, 9).detach() - 0.02 * momentum * adam.norm() / momentum.norm()
    assert distance(weights, expected) < 1e-12


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e20, 1e37])
def test_rms_match_has_its_rms_where_squares_overflow_or_vanish(scale: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(6, 9))
    optimizer = Shampoo([parameter], lr=1.0, grafting="rms_match")
    weights = follow(optimizer, parameter, [scale * stream(6, 9)[0]])
    # Float32 rounds 54 squares and entries; entries of 1e-38 have 7 bits less.
    assert float(weights.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-5)


def test_a_factor_that_cannot_be_decomposed_keeps_the_old_root() -> None:
    parameter = start(6, 9)
    optimizer = Shampoo([parameter], lr=0.02, precondition_frequency=1)
    follow(optimizer, parameter, stream(6, 9, steps=3))
    before = {name: value.clone() for name, value in optimizer.state[parameter].items() if "root" in name}
    optimizer.state[parameter]["left.0"][0, 0] = torch.inf
    weights = follow(optimizer, parameter, stream(6, 9, steps=1, seed=1))
    after = optimizer.state[parameter]
    assert torch.equal(after["left_root.0"], before["left_root.0"])
    assert not torch.equal(after["right_root.0"], before["right_root.0"])
    assert bool(weights.isfinite().all())


def test_a_batch_change_computes_the_roots_once_at_the_next_step() -> None:
    parameter = start(6, 9)
    optimizer = Shampoo([parameter], lr=0.02, precondition_frequency=100)
    roots: list[Tensor] = []
    for number, grad in enumerate(stream(6, 9, steps=6)):
        if number == 3:
            optimizer.on_batch_change(global_batch_size=64, previous=32)
        follow(optimizer, parameter, [grad])
        roots.append(optimizer.state[parameter]["left_root.0"].clone())
    assert [torch.equal(*pair) for pair in pairwise(roots)] == [True, True, False, True, True]


def test_roots_due_after_a_batch_change_survive_a_checkpoint() -> None:
    grads = stream(6, 9, steps=5)
    straight, resumed = start(6, 9), start(6, 9)
    whole, before = (Shampoo([parameter], precondition_frequency=100) for parameter in (straight, resumed))
    for optimizer, parameter in ((whole, straight), (before, resumed)):
        follow(optimizer, parameter, grads[:3])
        optimizer.on_batch_change(global_batch_size=64, previous=32)
    after = Shampoo([resumed], precondition_frequency=100)
    after.load_state_dict(before.state_dict())
    assert torch.equal(follow(after, resumed, grads[3:]), follow(whole, straight, grads[3:]))


@pytest.mark.parametrize(("exponent", "constant"), [(0.25, 5 / 32), (0.5, 3 / 8)])
def test_halves_are_kept_apart_and_the_roots_corrected(exponent: float, constant: float) -> None:
    grads = stream(5, 7, steps=12)
    differences = [0.3 * other for other in stream(5, 7, steps=12, seed=1)]
    settings: dict[str, Any] = {"betas": (0.9, 0.8), "epsilon": 1e-3, "exponent": exponent, "grafting": "none"}
    parameter = start(5, 7)
    optimizer = Shampoo([parameter], lr=0.02, precondition_frequency=3, update_bias_correction=True, **settings)
    left, right = torch.zeros(5, 5).double(), torch.zeros(7, 7).double()
    momentum, expected = torch.zeros(5, 7).double(), start(5, 7).detach()
    corrected = 0
    for t, (g, d) in enumerate(zip(grads, differences, strict=True), start=1):
        if t == 7:
            d = 0 * d  # No halves at this step, one with roots: a plain step.
        else:
            optimizer.supply_halves({parameter: d})
        follow(optimizer, parameter, [g])
        left = 0.8 * left + 0.2 * (g - d) @ (g - d).T
        right = 0.8 * right + 0.2 * (g - d).T @ (g - d)
        if t % 3 == 1:
            roots = []
            for factor, half_A, half_B in ((left, g + d, g - d), (right, (g + d).T, (g - d).T)):
                values, basis = torch.linalg.eigh(factor / (1 - 0.8**t))
                values = values.clamp_min(0) + 1e-3 * values[-1]
                seen = [torch.stack([(q @ half).square().sum() for q in basis.T]) for half in (half_A, half_B)]
                variance = (0.2 / (1 - 0.8**t)) ** 2 * (seen[0] - seen[1]) ** 2 / 2
                weights = values**-exponent - constant * values ** (-exponent - 2) * variance
                corrected += int((weights < 0).sum())
                roots.append(basis @ weights.clamp_min(0).diag() @ basis.T)
        momentum = 0.9 * momentum + 0.1 * (g + d)
        expected = expected - 0.02 * roots[0] @ (momentum / (1 - 0.9**t)) @ roots[1]
    assert corrected
    assert distance(parameter.detach(), expected) < 1e-10
    assert not any("difference" in name for name in optimizer.state[parameter])


def test_halves_without_difference_are_a_plain_step() -> None:
    halved, plain = start(5, 7), start(5, 7)
    optimizers = [Shampoo([parameter], update_bias_correction=True) for parameter in (halved, plain)]
    for grad in stream(5, 7, steps=3):
        optimizers[0].supply_halves({halved: torch.zeros(5, 7)})
        follow(optimizers[0], halved, [grad])
        follow(optimizers[1], plain, [grad])
    assert distance(halved.detach(), plain.detach()) < 1e-12


def test_shampoo_resumes_maximizes_and_keeps_float32_state() -> None:
    assert goes_on_as_if_never_stopped(lambda params: Shampoo(params, lr=0.02, precondition_frequency=3, nesterov=True))
    assert mirrors_when_maximizing(Shampoo, lambda params: Shampoo(params, maximize=True))
    assert leaves_alone_what_has_no_gradient(Shampoo)
    assert keeps_float32_beside_bfloat16(Shampoo)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"0 <= betas\[0\] < 1"),
        ({"betas": (0.9, 1.1)}, r"0 <= betas\[1\] < 1"),
        ({"epsilon": -1.0}, "0 <= epsilon"),
        ({"exponent": 0.3}, "exponents of 1/4 and 1/2"),
        ({"factors": "kl"}, "pass exponent=0.5"),
        ({"grafting": "sgd"}, "there are adam, rms_match, none"),
        ({"method": "svd"}, "there are eigh, newton"),
        ({"method": "newton", "epsilon": 0.0}, "pass 1e-6"),
        ({"factors": "kl", "exponent": 0.5, "update_bias_correction": True}, "leave one"),
        ({"method": "newton", "update_bias_correction": True}, "which method='newton' does not compute"),
        ({"grafting": "none", "start_preconditioning_step": 5}, "start at 1, or graft"),
        ({"precondition_frequency": 0}, "whole numbers from 1"),
        ({"max_preconditioner_dim": 1.5}, "whole numbers from 1"),
    ],
)
def test_shampoo_refuses_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Shampoo([start(3, 3)], **settings)
