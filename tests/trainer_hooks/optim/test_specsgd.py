"""Against torch.linalg.svd in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from gns_controller.core.errors import GeometryError
from tests.trainer_hooks.optim.streams import gradients, run
from trainer_hooks.optim.specsgd import SpecSGD

SHAPES = [(4, 12), (12, 4), (6, 6)]


def recursion(shape: tuple[int, ...], *, lr: float, weight_decay: float, by_nuclear_norm: bool) -> Tensor:
    weight = torch.ones(shape, dtype=torch.float64)
    for grad in gradients(*shape):
        left, values, right = torch.linalg.svd(grad, full_matrices=False)
        step = (float(values.sum()) if by_nuclear_norm else 1.0) * left @ right
        weight = weight * (1 - lr * weight_decay) - lr * step
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by_nuclear_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_specsgd_steps_along_the_singular_vectors(
    shape: tuple[int, ...], by_nuclear_norm: bool, dtype: torch.dtype
) -> None:
    moving = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = SpecSGD([moving], lr=0.02, weight_decay=0.1, scale_by_nuclear_norm=by_nuclear_norm)
    weights = run(optimizer, moving, gradients(*shape))
    expected = recursion(shape, lr=0.02, weight_decay=0.1, by_nuclear_norm=by_nuclear_norm)
    travelled = (expected - 1).norm()
    # The factor's condition is s_1 over the gap of its smallest value to zero, about 100 here; times 20 roundings.
    bound = 2000 * torch.finfo(dtype).eps
    assert (weights - expected).norm() < bound * travelled


def test_the_step_by_nuclear_norm_is_the_steepest_of_its_size() -> None:
    # min_D <G, D> + ||D||^2 / (2 lr) is -lr ||G||_*^2 / 2, reached by -lr ||G||_* U V^T.
    grad = gradients(5, 8)[0]
    moving = torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    step = run(SpecSGD([moving], lr=0.3, scale_by_nuclear_norm=True), moving, [grad])
    nuclear = float(torch.linalg.svdvals(grad).sum())
    reached = float((grad * step).sum()) + float(torch.linalg.matrix_norm(step, 2)) ** 2 / 0.6
    assert reached == pytest.approx(-0.3 * nuclear**2 / 2, rel=1e-12)


def test_null_directions_and_zero_gradients_stay_where_they_are() -> None:
    grad = torch.zeros(3, 4, dtype=torch.float64)
    grad[0, 1] = -2.0
    moving = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = SpecSGD([moving], lr=0.5)
    assert torch.equal(run(optimizer, moving, [grad]), -0.5 * grad.sign())
    assert torch.equal(run(optimizer, moving, [torch.zeros_like(grad)]), -0.5 * grad.sign())


def test_heads_and_experts_are_matrices_of_their_own() -> None:
    fused, stacked = gradients(6, 4)[0], gradients(2, 3, 4)[0]
    moving = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in (fused, stacked)]
    optimizer = SpecSGD(
        [{"params": moving[:1], "split_sizes": (2, 4)}, {"params": moving[1:], "batched": True}], lr=1.0
    )
    for parameter, grad in zip(moving, (fused, stacked), strict=True):
        parameter.grad = grad.clone()
    optimizer.step()
    for moved, grad in ((moving[0][:2], fused[:2]), (moving[0][2:], fused[2:]), *zip(moving[1], stacked, strict=True)):
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        assert torch.allclose(moved, -left @ right, rtol=0, atol=1e-13)  # float64, condition about 10


def test_specsgd_maximizes_as_a_mirror_and_keeps_no_state() -> None:
    down, up, still = (torch.nn.Parameter(torch.zeros(4, 5, dtype=torch.float64)) for _ in range(3))
    expected = run(SpecSGD([down], lr=0.1), down, gradients(4, 5))
    optimizer = SpecSGD([up, still], lr=0.1, maximize=True)
    assert torch.equal(run(optimizer, up, gradients(4, 5)), -expected)
    assert torch.equal(still, torch.zeros(4, 5, dtype=torch.float64))
    saved = copy.deepcopy(optimizer.state_dict())
    assert not any(saved["state"].values())
    resumed = SpecSGD([up, still], lr=7.0)
    resumed.load_state_dict(saved)
    assert torch.allclose(run(resumed, up, gradients(4, 5)), -2 * expected, rtol=0, atol=1e-14)  # sums from elsewhere


def test_specsgd_refuses_vectors() -> None:
    with pytest.raises(GeometryError, match=r"SpecSGD: .* give it to AdamW"):
        SpecSGD([torch.nn.Parameter(torch.zeros(3))])
