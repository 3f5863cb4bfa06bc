"""Against a float64 loop written here, and against what the rounds converge to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gns_controller.core.errors import GeometryError, InvalidInputError
from tests.trainer_hooks.optim.streams import gradients, run
from trainer_hooks.optim.sinkgd import SinkGD

SHAPES = [(4, 12), (12, 4), (6, 6)]


def sinkhorn(grad: Tensor, rounds: int) -> Tensor:
    normalized = grad.double().clone()
    num_rows, num_columns = normalized.shape
    for _ in range(rounds):
        for row in normalized:
            row *= num_columns**0.5 / max(float((row**2).sum()) ** 0.5, 1e-8)
        for column in normalized.T:
            column *= num_rows**0.5 / max(float((column**2).sum()) ** 0.5, 1e-8)
    return normalized


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_sinkgd_follows_the_published_loop(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    # Ten divisions and a sum of rounded steps: some ulps of the weights, which are of the distance's order.
    moving = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    weights = run(SinkGD([moving], lr=0.05, weight_decay=0.1), moving, [grad.to(dtype) for grad in gradients(*shape)])
    expected = torch.ones(shape, dtype=torch.float64)
    for grad in gradients(*shape):
        expected = expected * (1 - 0.05 * 0.1) - 0.05 * sinkhorn(grad.to(dtype), 5)
    assert (weights - expected).norm() < bound * (expected - 1).norm()


def test_rounds_on_bfloat16_run_in_float32() -> None:
    grad = gradients(12, 4)[0].bfloat16()
    moving = torch.nn.Parameter(torch.zeros(12, 4, dtype=torch.bfloat16))
    weights, expected = run(SinkGD([moving], lr=1.0), moving, [grad]), -sinkhorn(grad, 5)
    # One rounding of the result to 8 bits, and float32's; ten divisions in bfloat16 would be off by several of these.
    assert torch.all((weights - expected).abs() <= (2**-8 + 1e-5) * expected.abs())


def test_rows_and_columns_of_a_gaussian_matrix_come_to_rms_one() -> None:
    moving = torch.nn.Parameter(torch.zeros(30, 50, dtype=torch.float64))
    step = run(SinkGD([moving], lr=1.0, rounds=30), moving, gradients(30, 50, steps=1))
    ones = torch.ones(50, dtype=torch.float64)
    # The rounds converge linearly: squares of Gaussians are far from blocks, and 30 rounds reach float64's rounding.
    assert torch.allclose(step.square().mean(0).sqrt(), ones, rtol=1e-13)
    assert torch.allclose(step.square().mean(1).sqrt(), ones[:30], rtol=1e-13)
    five = torch.nn.Parameter(torch.zeros(30, 50, dtype=torch.float64))
    early = run(SinkGD([five], lr=1.0), five, gradients(30, 50, steps=1))
    rows_off = float((early.square().mean(1).sqrt() - 1).abs().max())
    assert 1e-13 < rows_off < 1e-3  # the default's five rounds are not yet there, and nearly so
    assert torch.allclose(early.square().mean(0).sqrt(), ones, rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_size_of_the_gradient_does_not_matter(scale: float) -> None:
    one, other = (torch.nn.Parameter(torch.zeros(6, 9, dtype=torch.float64)) for _ in range(2))
    expected = run(SinkGD([one], lr=1.0), one, gradients(6, 9, steps=1))
    weights = run(SinkGD([other], lr=1.0), other, [scale * gradients(6, 9)[0]])
    assert torch.allclose(weights, expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e20, 1e37])
def test_squares_of_float32_may_overflow(scale: float) -> None:
    moving = torch.nn.Parameter(torch.zeros(6, 9))
    grad = (scale * gradients(6, 9)[0]).float()
    weights = run(SinkGD([moving], lr=1.0), moving, [grad])
    # Ten divisions in float32.
    assert torch.allclose(weights, -sinkhorn(grad, 5), rtol=1e-5, atol=1e-6)


def test_zero_rows_and_columns_stay_zero_and_do_not_change_the_rest() -> None:
    grad = torch.zeros(5, 7, dtype=torch.float64)
    inner = gradients(4, 6)[0]
    grad[1:, 1:] = inner
    moving = torch.nn.Parameter(torch.zeros(5, 7, dtype=torch.float64))
    step = -run(SinkGD([moving], lr=1.0), moving, [grad])
    assert torch.equal(step[0], torch.zeros(7, dtype=torch.float64))
    assert torch.equal(step[:, 0], torch.zeros(5, dtype=torch.float64))
    # Five rounds end with columns: the longer columns (5 entries, 4 of them filled) are all that is left of the zeros.
    assert torch.allclose(step[1:, 1:], (5 / 4) ** 0.5 * sinkhorn(inner, 5), rtol=1e-12)
    assert torch.equal(run(SinkGD([moving], lr=1.0), moving, [torch.zeros_like(grad)]), -step)


def test_sinkgd_maximizes_as_a_mirror_and_keeps_no_state() -> None:
    down, up, still = (torch.nn.Parameter(torch.zeros(4, 5, dtype=torch.float64)) for _ in range(3))
    expected = run(SinkGD([down], lr=0.1), down, gradients(4, 5))
    optimizer = SinkGD([up, still], lr=0.1, maximize=True)
    assert torch.equal(run(optimizer, up, gradients(4, 5)), -expected)
    assert torch.equal(still, torch.zeros(4, 5, dtype=torch.float64))
    assert not any(optimizer.state_dict()["state"].values())


def test_sinkgd_refuses_vectors_and_settings_out_of_range() -> None:
    with pytest.raises(GeometryError, match=r"SinkGD: .* give it to AdamW"):
        SinkGD([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(InvalidInputError, match="1 <= rounds"):
        SinkGD([torch.nn.Parameter(torch.zeros(3, 3))], rounds=0)
