"""What a session does for optimizers that want more than gradients: outer boundaries, batch changes, halves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gns_controller.core.contract import Span
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import HoldPolicyConfig, Stage, StagesPolicyConfig
from tests.trainer_hooks.test_session import Points, attach, loss_of, network, train
from trainer_hooks.optim import SNOO, AdamW, Lookahead, Signum

STAGES = StagesPolicyConfig(
    stages=(Stage(from_samples=30, global_batch_size=12), Stage(from_samples=170, global_batch_size=32))
)


def test_an_optimizer_hears_of_every_batch_change_once() -> None:
    model, heard = network(), []
    optimizer = Signum(model.parameters(), lr=0.01)
    optimizer.on_batch_change = lambda *, global_batch_size, previous: heard.append((previous, global_batch_size))
    train(attach(model, optimizer, policy=STAGES))
    assert heard[:2] == [(8, 12), (12, 32)]
    assert len(heard) == 2


def test_batches_change_at_the_boundaries_of_outer_optimizers_only() -> None:
    model = network()
    session = attach(model, SNOO(Signum(model.parameters(), lr=0.01), interval=5, lr=0.7, momentum=0.5), policy=STAGES)
    batches = [batch for _, batch, _ in train(session)]
    changes = [step for step in range(1, len(batches) - 1) if batches[step] != batches[step - 1]]
    assert len(changes) == 2
    assert all(step % 5 == 0 for step in changes)
    assert changes != [4, 14], "stages alone would have changed here"


def test_a_run_that_stopped_between_two_outer_steps_goes_on_as_if_it_had_not() -> None:
    def outer(model: nn.Module) -> Lookahead:
        return Lookahead(Signum(model.parameters(), lr=0.01), interval=5)

    straight = network()
    expected = train(attach(straight, outer(straight), policy=STAGES))
    first_model = network()
    first_optimizer = outer(first_model)
    first = attach(first_model, first_optimizer, policy=STAGES)
    trail = train(first, until=8)
    second_model = network()
    second_model.load_state_dict(first_model.state_dict())
    second_optimizer = outer(second_model)
    second_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    trail += train(attach(second_model, second_optimizer, state=first.state_dict(), policy=STAGES))
    assert trail == expected
    for resumed, uninterrupted in zip(second_model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(resumed, uninterrupted)
    with pytest.raises(InvalidInputError, match="8 optimizer steps"):
        attach(second_model, outer(second_model), state=first.state_dict(), policy=STAGES)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_a_measured_step_hands_the_halves_of_its_batch_to_who_corrects_for_them(max_grad_norm: float | None) -> None:
    """The same optimizer, fed by hand with what the two micro-batches of the step gave."""
    ours, theirs = network(), network()
    optimizer = AdamW(ours.parameters(), lr=0.1, update_bias_correction=True)
    session = attach(
        ours,
        optimizer,
        policy=HoldPolicyConfig(estimator="split"),
        measurement_interval=Span(steps=1),
        learning_rate_schedule=None,
        max_grad_norm=max_grad_norm,
    )
    step = next(iter(session.steps(Points(), seed=2)))
    halves = []
    for rows in step:
        step.backward(loss_of(ours, rows))
        halves.append(torch.autograd.grad(loss_of(theirs, rows), list(theirs.parameters())))
    step.apply()
    assert len(halves) == 2
    means = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    norm = torch.cat([mean.flatten() for mean in means]).norm()
    clipped = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / float(norm))
    assert max_grad_norm is None or clipped < 1
    differences = [clipped * (a - b) / 2 for a, b in zip(*halves, strict=True)]
    by_hand = AdamW(theirs.parameters(), lr=0.1, update_bias_correction=True)
    plain = copy.deepcopy(theirs)
    for parameter, twin, mean in zip(theirs.parameters(), plain.parameters(), means, strict=True):
        parameter.grad, twin.grad = clipped * mean, clipped * mean
    by_hand.supply_halves(dict(zip(theirs.parameters(), differences, strict=True)))
    by_hand.step()
    AdamW(plain.parameters(), lr=0.1).step()
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    moved = [(a - b).abs().max() for a, b in zip(theirs.parameters(), plain.parameters(), strict=True)]
    assert max(moved) > 1e-3, "the correction must do something here"
