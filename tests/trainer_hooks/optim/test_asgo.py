"""Against a recursion in float64 with an eigendecomposition of its own, and against the orthogonal factor."""

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
from trainer_hooks.optim.asgo import ASGO


@pytest.mark.parametrize("scale", [1e-12, 1e8, 1e12])
@pytest.mark.parametrize("method", ["polar_express", "eigh"])
def test_updates_do_not_depend_on_the_size_of_the_gradient(method: Any, scale: float) -> None:
    grads = stream(6, 9, steps=3)
    steps = []
    for factor in (1.0, scale):
        parameter = torch.nn.Parameter(torch.zeros(6, 9))
        steps.append(
            follow(ASGO([parameter], lr=1.0, weight_decay=0, method=method), parameter, [factor * g for g in grads])
        )
    assert float(steps[0].norm()) > 1
    # Float32 factors with a damping of 1e-6: their roots are known to some per cent.
    assert float((steps[1] - steps[0]).norm() / steps[0].norm()) < 0.1


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e20, 1e37])
@pytest.mark.parametrize("method", ["polar_express", "eigh"])
def test_updates_have_their_rms_where_squares_overflow_or_vanish(method: Any, scale: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(6, 9))
    weights = follow(ASGO([parameter], lr=1.0, weight_decay=0, method=method), parameter, [scale * stream(6, 9)[0]])
    # Float32 rounds 54 squares and entries; entries of 1e-38 have 7 bits less.
    assert float(weights.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-5)


def recursion(
    weight: Tensor,
    grads: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.8),
    epsilon: float = 1e-6,
) -> Tensor:
    rows, columns = weight.shape
    factor, momentum = torch.zeros(min(rows, columns), min(rows, columns)).double(), torch.zeros_like(weight)
    for g in grads:
        factor = betas[1] * factor + (1 - betas[1]) * (g @ g.T if rows <= columns else g.T @ g)
        momentum = betas[0] * momentum + (1 - betas[0]) * g
        values, basis = torch.linalg.eigh(factor)
        root = basis @ torch.diag((values.clamp_min(0) + epsilon * values[-1]) ** -0.5) @ basis.T
        update = root @ momentum if rows <= columns else momentum @ root
        weight = weight - lr * weight_decay * weight - lr * 0.2 * (rows * columns) ** 0.5 * update / update.norm()
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "tolerance"), [("eigh", 1e-12), ("polar_express", 1e-6)])
def test_asgo_follows_its_recursion(method: Any, tolerance: float, shape: tuple[int, int]) -> None:
    # polar_express: its polynomials end at 1 to 4e-7 for eigenvalues above 1e-6 of the norm. The largest eigenvalue,
    # which epsilon is a fraction of, it estimates to 10 %; eigenvalues of 1e-4 of it notice 1e-6 * 10 % / 1e-4 / 2.
    settings: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "epsilon": 1e-9}
    parameter = start(*shape)
    weights = follow(ASGO([parameter], method=method, **settings), parameter, stream(*shape))
    d = distance(weights, recursion(start(*shape).detach(), stream(*shape), **settings))
    assert d < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["eigh", "polar_express"])
def test_asgo_in_float32_stays_within_1e_6_of_the_way(method: Any, shape: tuple[int, int]) -> None:
    parameter = start(*shape, torch.float32)
    settings: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.1, "epsilon": 1e-6}
    weights = follow(ASGO([parameter], method=method, **settings), parameter, stream(*shape))
    d = distance(weights, recursion(start(*shape).detach(), stream(*shape), **settings))
    assert d < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "tolerance"), [("eigh", 1e-12), ("polar_express", 1e-6)])
def test_asgo_without_averages_steps_along_the_orthogonal_factor(
    method: Any, tolerance: float, shape: tuple[int, int]
) -> None:
    (grad,) = stream(*shape, steps=1)
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = ASGO([parameter], lr=1.0, betas=(0.0, 0.0), epsilon=0.0, method=method)
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    # eigh: squaring leaves 1e-13 of float64. polar_express: see above.
    expected = -0.2 * max(shape) ** 0.5 * (left @ right)
    assert torch.allclose(follow(optimizer, parameter, [grad]), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", ["eigh", "polar_express"])
def test_a_zero_gradient_moves_nothing(method: Any) -> None:
    parameter = start(6, 9)
    optimizer = ASGO([parameter], weight_decay=0.0, method=method)
    assert torch.equal(follow(optimizer, parameter, [torch.zeros(6, 9)] * 3), start(6, 9).detach())


def test_asgo_without_a_root_steps_along_the_momentum() -> None:
    parameter = start(6, 9)
    optimizer = ASGO([parameter], lr=1.0, betas=(0.0, 0.8), weight_decay=0.0)
    follow(optimizer, parameter, stream(6, 9, steps=2))
    optimizer.state[parameter]["factor.0"][0, 0] = torch.inf
    before = parameter.detach().clone()
    (grad,) = stream(6, 9, steps=1, seed=1)
    expected = before - 0.2 * 54**0.5 * grad / grad.norm()
    assert torch.allclose(follow(optimizer, parameter, [grad]), expected, rtol=0, atol=1e-12)


def test_asgo_keeps_one_factor_of_the_shorter_side() -> None:
    parameter = start(12, 5)
    optimizer = ASGO([parameter])
    follow(optimizer, parameter, stream(12, 5, steps=1))
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[parameter].items()}
    assert shapes == {"step": (), "owned": (), "factor.0": (5, 5), "momentum.0": (12, 5)}


def test_asgo_resumes_maximizes_and_keeps_float32_state() -> None:
    assert goes_on_as_if_never_stopped(ASGO)
    assert mirrors_when_maximizing(ASGO, lambda params: ASGO(params, maximize=True))
    assert leaves_alone_what_has_no_gradient(ASGO)
    assert keeps_float32_beside_bfloat16(ASGO)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"0 <= betas\[1\] < 1"),
        ({"epsilon": -1.0}, "0 <= epsilon"),
        ({"method": "newton"}, "there are eigh, polar_express"),
    ],
)
def test_asgo_refuses_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ASGO([start(3, 3)], **settings)
