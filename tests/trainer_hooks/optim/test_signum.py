"""SignSGD and Signum against their recursions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gns_controller.core.errors import InvalidInputError
from tests.trainer_hooks.optim.streams import gradients, run, run_new
from trainer_hooks.optim import SignSGD, Signum


@pytest.mark.parametrize("decay", ["decoupled", "independent"])
def test_signum_follows_its_recursion(decay: str) -> None:
    grads = gradients(7, 3)
    parameter = nn.Parameter(torch.ones(7, 3, dtype=torch.float64))
    optimizer = Signum([parameter], lr=0.01, momentum=0.9, weight_decay=0.1, decay=decay)
    weight, momentum = torch.ones(7, 3, dtype=torch.float64), torch.zeros(7, 3, dtype=torch.float64)
    for step, grad in enumerate(grads):
        schedule = 1 - step / 40
        optimizer.param_groups[0]["lr"] = 0.01 * schedule
        run(optimizer, parameter, [grad])
        momentum = 0.9 * momentum + 0.1 * grad
        shrinkage = 0.1 * schedule * (0.01 if decay == "decoupled" else 1.0)
        weight = weight * (1 - shrinkage) - 0.01 * schedule * momentum.sign()
    assert torch.allclose(parameter.detach(), weight, rtol=0, atol=1e-12)


def test_signum_without_momentum_is_sign_descent() -> None:
    grads = gradients(5)
    expected = 1 - 0.5 * torch.stack([grad.sign() for grad in grads]).sum(0)
    assert torch.equal(run_new(lambda p: SignSGD(p, lr=0.5), grads), expected)
    assert torch.equal(run_new(lambda p: Signum(p, lr=0.5, momentum=0.0), grads), expected)


def test_maximizing_is_descending_along_the_negated_gradients() -> None:
    grads = gradients(4, 2)
    up = run_new(lambda p: Signum(p, lr=0.1, maximize=True), grads)
    assert torch.equal(up, run_new(lambda p: Signum(p, lr=0.1), [-grad for grad in grads]))


def test_a_saved_optimizer_goes_on_as_if_never_stopped() -> None:
    grads = gradients(4, 6)
    expected = run_new(lambda p: Signum(p, lr=0.1), grads)
    first = nn.Parameter(torch.ones(4, 6, dtype=torch.float64))
    before = Signum([first], lr=0.1)
    run(before, first, grads[:10])
    second = nn.Parameter(first.detach().clone())
    after = Signum([second], lr=0.7)
    after.load_state_dict(before.state_dict())
    assert torch.equal(run(after, second, grads[10:]), expected)


def test_a_parameter_without_gradient_does_not_even_decay() -> None:
    still, moving = (nn.Parameter(torch.ones(3)) for _ in range(2))
    moving.grad = torch.ones(3)
    Signum([still, moving], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(still.detach(), torch.ones(3))
    assert not torch.equal(moving.detach(), torch.ones(3))


def test_step_evaluates_the_closure_with_gradients() -> None:
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = Signum([parameter], lr=1.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 9.0
    assert parameter.item() == 2.0


def test_independent_decay_counts_from_the_rate_that_a_scheduler_warms_up_to() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    group = {"params": [parameter], "lr": 0.0, "initial_lr": 0.01}
    optimizer = Signum([group], momentum=0.0, weight_decay=0.5, decay="independent")
    optimizer.param_groups[0]["lr"] = 0.004
    run(optimizer, parameter, [torch.zeros(1)])
    assert parameter.item() == pytest.approx(1 - 0.5 * 0.4, abs=1e-15)


def test_signum_refuses_settings_and_gradients_that_do_not_fit() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    with pytest.raises(InvalidInputError, match="got lr=0; build the optimizer with the rate after warm-up"):
        Signum([parameter], lr=0.0, decay="independent")
    with pytest.raises(InvalidInputError, match="0 <= momentum < 1"):
        Signum([parameter], momentum=1.0)
    with pytest.raises(InvalidInputError, match="0 <= lr"):
        SignSGD([parameter], lr=-1.0)
    with pytest.raises(InvalidInputError, match="decoupled, independent"):
        Signum([parameter], decay="coupled")  # type: ignore[arg-type]
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(InvalidInputError, match="sparse=False"):
        Signum(embedding.parameters()).step()
