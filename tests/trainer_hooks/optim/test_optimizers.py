"""Against float64 recursions written here, and against torch where conventions match."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.kernels import orthogonalize
from trainer_hooks.optim import Muon, Signum


def gradients(*shape: int, steps: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype).clone()
        optimizer.step()
    return parameter.detach().double()


def test_signum_follows_its_recursion() -> None:
    grads = gradients(7, 3)
    parameter = torch.nn.Parameter(torch.ones(7, 3, dtype=torch.float64))
    found = run(Signum([parameter], lr=0.01, momentum=0.9, weight_decay=0.1), parameter, grads)
    weight, momentum = torch.ones(7, 3, dtype=torch.float64), torch.zeros(7, 3, dtype=torch.float64)
    for grad in grads:
        momentum = 0.9 * momentum + 0.1 * grad
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * momentum.sign()
    assert torch.allclose(found, weight, rtol=0, atol=1e-12)


def test_without_momentum_signum_is_sign_descent() -> None:
    grads = gradients(5)
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    found = run(Signum([parameter], lr=0.5, momentum=0.0), parameter, grads)
    assert torch.equal(found, -0.5 * torch.stack([grad.sign() for grad in grads]).sum(0))


@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12)])
def test_muon_follows_its_recursion(shape: tuple[int, int]) -> None:
    grads = gradients(*shape)
    parameter = torch.nn.Parameter(torch.ones(shape))
    found = run(Muon([parameter], lr=0.02, weight_decay=0.1, dtype=None), parameter, grads)
    weight, momentum = torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad
        update = orthogonalize(0.05 * grad + 0.95 * momentum)
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * max(1, shape[0] / shape[1]) ** 0.5 * update
    travelled = float((weight - 1).norm())
    assert float((found - weight).norm()) < 1e-5 * travelled


def test_muon_agrees_with_the_one_in_torch() -> None:
    # torch iterates in bfloat16, so directions agree to its rounding, amplified by five steep steps.
    grads = gradients(16, 24, steps=5)
    ours, theirs = (torch.nn.Parameter(torch.zeros(16, 24)) for _ in range(2))
    settings = {"lr": 0.02, "momentum": 0.95, "nesterov": True, "weight_decay": 0.0}
    found = run(Muon([ours], **settings), ours, grads)
    expected = run(torch.optim.Muon([theirs], **settings, adjust_lr_fn="original"), theirs, grads)
    assert float(torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)) > 0.999
    assert float(found.norm()) == pytest.approx(float(expected.norm()), rel=0.02)


def test_equal_shapes_in_one_batch_move_as_they_would_alone() -> None:
    grads = gradients(2, 5, 8)
    together = [torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64)) for _ in range(2)]
    both = Muon(together, lr=0.1)
    for grad in grads:
        for parameter, piece in zip(together, grad, strict=True):
            parameter.grad = piece.clone()
        both.step()
    for index, parameter in enumerate(together):
        alone = torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
        expected = run(Muon([alone], lr=0.1), alone, [grad[index] for grad in grads])
        assert torch.allclose(parameter.detach(), expected, atol=1e-10)


@pytest.mark.parametrize("kind", [Signum, Muon])
def test_a_saved_optimizer_goes_on_as_if_never_stopped(kind: type[torch.optim.Optimizer]) -> None:
    grads = gradients(4, 6)
    straight = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    expected = run(kind([straight], lr=0.1), straight, grads)
    first = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    before = kind([first], lr=0.1)
    run(before, first, grads[:10])
    second = torch.nn.Parameter(first.detach().clone())
    after = kind([second], lr=0.7)
    after.load_state_dict(before.state_dict())
    assert torch.equal(run(after, second, grads[10:]), expected)


def test_what_they_cannot_do_is_said() -> None:
    with pytest.raises(GeometryError, match="give it to AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(InvalidInputError, match="0 <= momentum < 1"):
        Signum([torch.nn.Parameter(torch.zeros(3))], momentum=1.0)
