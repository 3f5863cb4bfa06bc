"""Against a recursion in float64 with momentum in weight space and bases of its own, and against torch's AdamW."""

from __future__ import annotations

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
from trainer_hooks.optim.eshampoo import EShampoo

SETTINGS: dict[str, dict[str, Any]] = {
    "always afresh": {"tolerance": 0.0, "precondition_frequency": 1, "start_preconditioning_step": 3},
    "when needed": {"tolerance": 0.05, "precondition_frequency": 2, "start_preconditioning_step": 3},
    "one QR step": {"tolerance": 0.0, "precondition_frequency": 3, "start_preconditioning_step": 4, "qr_iterations": 1},
}


def in_order(factor: Tensor, basis: Tensor) -> Tensor:
    return basis[:, (basis.T @ factor @ basis).diagonal().argsort(descending=True)]


def new_basis(factor: Tensor, basis: Tensor, qr: bool) -> Tensor:
    if not qr:
        return torch.linalg.eigh(factor).eigenvectors.flip(1)
    turned = torch.linalg.qr(factor @ in_order(factor, basis)).Q
    return in_order(factor, turned)


def recursion(
    weight: Tensor,
    grads: list[Tensor],
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    tolerance: float,
    precondition_frequency: int,
    start_preconditioning_step: int,
    qr_iterations: int = 0,
) -> Tensor:
    beta1, beta2 = betas
    factors = [torch.zeros(size, size).double() for size in weight.shape]
    bases = [torch.eye(size).double() for size in weight.shape]
    momentum, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, g in enumerate(grads, start=1):
        for side, seen in enumerate((g @ g.T, g.T @ g)):
            factors[side] = beta2 * factors[side] + (1 - beta2) * seen
            after = t - start_preconditioning_step
            if after < 0 or after % precondition_frequency:
                continue
            rotated = bases[side].T @ factors[side] @ bases[side]
            if after and (rotated - rotated.diagonal().diag()).norm() <= tolerance * rotated.norm():
                continue
            basis = new_basis(factors[side], bases[side], qr=bool(qr_iterations and after))
            turn = (basis.T @ bases[side]) ** 2
            square = turn @ square if side == 0 else square @ turn.T
            bases[side] = basis
        momentum = beta1 * momentum + (1 - beta1) * g
        square = beta2 * square + (1 - beta2) * (bases[0].T @ g @ bases[1]) ** 2
        direction = bases[0].T @ (momentum / (1 - beta1**t)) @ bases[1]
        update = bases[0] @ (direction / ((square / (1 - beta2**t)).sqrt() + 1e-8)) @ bases[1].T
        weight = weight - lr * weight_decay * weight - lr * update
    return weight


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SETTINGS)
def test_eshampoo_follows_its_recursion(kind: str, shape: tuple[int, int], betas: tuple[float, float]) -> None:
    # Both in float64. From the third step on factors have full rank, and gaps far above rounding.
    settings = {"lr": 0.02, "weight_decay": 0.1, "betas": betas, **SETTINGS[kind]}
    parameter = start(*shape)
    weights = follow(EShampoo([parameter], **settings), parameter, stream(*shape))
    expected = recursion(start(*shape).detach(), stream(*shape), **settings)
    assert distance(weights, expected) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_eshampoo_in_float32_stays_within_1e_6_of_the_way(shape: tuple[int, int]) -> None:
    # A way as long as the first weights, whose own rounding would be 3e-6 of it at lr=0.02, and bases of ten gradients
    # or more: those of three have eigenvalues so close together that float32 turns their vectors by 1e-6.
    parameter = start(*shape, torch.float32)
    settings = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95), **SETTINGS["when needed"]}
    settings |= {"precondition_frequency": 5, "start_preconditioning_step": 10}
    weights = follow(EShampoo([parameter], **settings), parameter, stream(*shape))
    expected = recursion(start(*shape).detach(), stream(*shape), **settings)
    assert distance(weights, expected) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_eshampoo_is_adamw_before_its_first_basis(dtype: torch.dtype, tolerance: float) -> None:
    # In float32 both round 20 times, at 6e-8 of weights that are five times the way.
    ours, twin = start(6, 9, dtype), start(6, 9, dtype)
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}
    weights = follow(EShampoo([ours], start_preconditioning_step=21, **settings), ours, stream(6, 9))
    assert distance(weights, follow(torch.optim.AdamW([twin], **settings), twin, stream(6, 9))) < tolerance


def test_a_new_basis_keeps_the_sum_of_the_second_moments() -> None:
    parameter = start(6, 9)
    optimizer = EShampoo([parameter], betas=(0.9, 0.95), tolerance=0.0, precondition_frequency=2)
    follow(optimizer, parameter, stream(6, 9, steps=3))
    before = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    # A gradient of zero at a step with a refresh: D is carried over, and decays.
    follow(optimizer, parameter, [torch.zeros(6, 9)])
    after = optimizer.state[parameter]
    assert not torch.equal(after["left_basis.0"], before["left_basis.0"])
    assert not torch.allclose(after["second_moment.0"], 0.95 * before["second_moment.0"], rtol=1e-3)
    assert float(after["second_moment.0"].sum()) == pytest.approx(0.95 * float(before["second_moment.0"].sum()), 1e-12)
    assert float(after["momentum.0"].norm()) == pytest.approx(0.9 * float(before["momentum.0"].norm()), 1e-12)


def test_a_basis_is_refreshed_only_on_the_side_that_turned() -> None:
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    (grad,) = stream(6, 6, steps=1)
    parameter = start(6, 6)
    # Rotated rows leave G^T G as it was, and turn G G^T. Without averages each factor is that of the last gradient.
    optimizer = EShampoo([parameter], betas=(0.9, 0.0), precondition_frequency=1, tolerance=0.1)
    counts = []
    for seen in (grad, grad, grad, turn @ grad, turn @ grad):
        follow(optimizer, parameter, [seen])
        counts.append(optimizer.state[parameter].get("refreshes.0", torch.zeros(2)).tolist())
    assert counts == [[0, 0], [1, 1], [1, 1], [2, 1], [2, 1]]


def test_a_batch_change_checks_the_bases_once_at_the_next_step() -> None:
    parameter = start(6, 9)
    optimizer = EShampoo([parameter], betas=(0.9, 0.9), precondition_frequency=100, tolerance=0.01)
    counts = []
    for number, grad in enumerate(stream(6, 9, steps=7)):
        if number == 4:
            optimizer.on_batch_change(global_batch_size=64, previous=32)
        follow(optimizer, parameter, [grad])
        counts.append(int(optimizer.state[parameter].get("refreshes.0", torch.zeros(2))[0]))
    assert counts == [0, 1, 1, 1, 2, 2, 2]


def test_a_factor_without_eigenvectors_keeps_the_old_ones() -> None:
    parameter = start(6, 9)
    optimizer = EShampoo([parameter], precondition_frequency=1, tolerance=0.0)
    follow(optimizer, parameter, stream(6, 9, steps=3))
    before = optimizer.state[parameter]["left_basis.0"].clone()
    optimizer.state[parameter]["left.0"][0, 0] = torch.inf
    weights = follow(optimizer, parameter, stream(6, 9, steps=1, seed=1))
    assert torch.equal(optimizer.state[parameter]["left_basis.0"], before)
    assert bool(weights.isfinite().all())


def test_blocks_have_bases_of_their_own() -> None:
    settings: dict[str, Any] = {"lr": 0.02, **SETTINGS["always afresh"]}
    parameter = start(8, 8)
    weights = follow(EShampoo([parameter], max_preconditioner_dim=4, **settings), parameter, stream(8, 8))
    expected = start(8, 8).detach()
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 8)):
            grads = [grad[rows, columns] for grad in stream(8, 8)]
            expected[rows, columns] = recursion(expected[rows, columns], grads, **settings)
    assert distance(weights, expected) < 1e-12


def test_eshampoo_resumes_maximizes_and_keeps_float32_state() -> None:
    assert goes_on_as_if_never_stopped(lambda params: EShampoo(params, lr=0.02, precondition_frequency=3))
    assert goes_on_as_if_never_stopped(lambda params: EShampoo(params, precondition_frequency=3, qr_iterations=2))
    assert mirrors_when_maximizing(EShampoo, lambda params: EShampoo(params, maximize=True))
    assert leaves_alone_what_has_no_gradient(EShampoo)
    assert keeps_float32_beside_bfloat16(EShampoo)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"0 <= betas\[1\] < 1"),
        ({"epsilon": -1.0}, "0 <= epsilon"),
        ({"tolerance": 1.5}, "0 <= tolerance"),
        ({"qr_iterations": -1}, "whole numbers from 0"),
        ({"start_preconditioning_step": 1}, "whole numbers from 2"),
    ],
)
def test_eshampoo_refuses_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        EShampoo([start(3, 3)], **settings)
