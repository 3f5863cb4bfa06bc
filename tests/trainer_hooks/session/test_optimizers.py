"""What a session does for optimizers that want more than gradients: outer boundaries, batch changes, halves."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from gns_controller.core.contract import Decision, Span
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import HoldPolicyConfig, Stage, StagesPolicyConfig
from tests.trainer_hooks.session.test_adaptive_batch import Points, attach, loss_of, network, train
from trainer_hooks import AdaptiveBatch
from trainer_hooks.optim import SNOO, AdamW, Lookahead, Muon, Signum

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


@pytest.mark.parametrize(("interval", "counted"), [(4, 1), (4, 3), (7, 2), (4, 0)])
def test_an_outer_optimizer_that_counted_other_steps_is_refused(interval: int, counted: int) -> None:
    first = attach(network())
    train(first, until=6)
    for count, accepted in ((counted, False), (6 % interval, True)):
        model = network()
        optimizer = Lookahead(Signum(model.parameters(), lr=0.01), interval=interval)
        for _ in range(count):
            optimizer.step()
        assert optimizer.num_steps == count
        if accepted:
            attach(model, optimizer, state=first.state_dict())
        else:
            with pytest.raises(InvalidInputError, match=f"6 optimizer steps .* every {interval}, has counted {count}"):
                attach(model, optimizer, state=first.state_dict())


def test_outer_intervals_that_seldom_meet_are_refused_and_others_printed() -> None:
    model = network()
    matrix, other = model.parameters()

    def outer(first: int, second: int) -> list[torch.optim.Optimizer]:
        return [SNOO(Muon([matrix], lr=0.01), interval=first), SNOO(AdamW([other], lr=0.01), interval=second)]

    with pytest.raises(InvalidInputError, match=r"SNOO around Muon .*28, SNOO around AdamW .*27.* every 756 steps"):
        attach(model, outer(28, 27))
    for first, second, printed in ((28, 28, " plan_interval_steps=28 "), (5, 10, " plan_interval_steps=10 ")):
        assert printed in attach(model, outer(first, second)).describe()
    assert "plan_interval_steps" not in attach(model, outer(1, 1)).describe()


@pytest.mark.parametrize(("stop", "accepted"), [(6, False), (7, True), (14, True)])
def test_an_outer_optimizer_can_be_put_around_at_a_multiple_of_its_interval(stop: int, accepted: bool) -> None:
    first_model = network()
    plain = Signum(first_model.parameters(), lr=0.01)
    first = attach(first_model, plain)
    train(first, until=stop)
    model = network()
    model.load_state_dict(first_model.state_dict())
    optimizer = SNOO(Signum(model.parameters(), lr=0.01), interval=7)
    optimizer.load_state_dict(plain.state_dict())
    if not accepted:
        with pytest.raises(InvalidInputError, match="or resume at a multiple of 7"):
            attach(model, optimizer, state=first.state_dict())
        return
    resumed = attach(model, optimizer, state=first.state_dict())
    train(resumed, until=21)
    assert optimizer.at_boundary


Heard = list[tuple[int, int]]


def listening(model: nn.Module) -> tuple[Signum, Heard]:
    """An optimizer, and the list of the batch changes it hears of."""
    optimizer, heard = Signum(model.parameters(), lr=0.01), Heard()
    optimizer.on_batch_change = lambda *, global_batch_size, previous: heard.append((previous, global_batch_size))
    return optimizer, heard


# micro_batch_size=8 stands for ranks that cannot make a batch of 12: they make 8.
def resumed_on_other_ranks(*, stop: int, interval: int | None) -> tuple[AdaptiveBatch, Heard]:
    models = [network(), network()]
    (old, _), (new, heard) = (listening(model) for model in models)
    optimizers: list[torch.optim.Optimizer] = [old, new]
    if interval is not None:
        optimizers = [SNOO(each, interval=interval, momentum=0.5, batch_exponent=1.0) for each in (old, new)]
    first = attach(models[0], optimizers[0], policy=STAGES)
    train(first, until=stop)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    return attach(models[1], optimizers[1], policy=STAGES, state=first.state_dict(), micro_batch_size=8), heard


def test_an_optimizer_hears_at_attach_of_a_batch_that_these_ranks_cannot_make() -> None:
    session, heard = resumed_on_other_ranks(stop=8, interval=None)
    assert session.plan.global_batch_size == 8
    assert heard == [(12, 8)]
    train(session, until=session.optimizer_step + 6)
    assert session.plan.global_batch_size == 8
    assert heard == [(12, 8)]


def test_an_outer_optimizer_at_a_boundary_rescales_its_momentum_at_attach() -> None:
    """batch_exponent 1: the momentum that was saved times 8 / 12."""
    session, heard = resumed_on_other_ranks(stop=10, interval=5)
    assert (session.plan.global_batch_size, heard) == (8, [(12, 8)])
    straight = network()
    outer = SNOO(Signum(straight.parameters(), lr=0.01), interval=5, momentum=0.5, batch_exponent=1.0)
    train(attach(straight, outer, policy=STAGES), until=10)
    for resumed, uninterrupted in zip(session.model.parameters(), straight.parameters(), strict=True):
        found = session.optimizers[0].state[resumed]["outer_momentum"]
        torch.testing.assert_close(found, outer.state[uninterrupted]["outer_momentum"] * (8 / 12))


def test_a_cut_between_outer_steps_is_warned_of_and_heard_at_the_next_boundary(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        session, heard = resumed_on_other_ranks(stop=8, interval=5)
    assert caplog.text.count("global_batch_size=12->8") == 1
    assert caplog.text.count("between two outer steps") == 1
    train(session, until=9)
    saved = session.state_dict()
    model = network()
    again, heard_again = listening(model)
    outer = SNOO(again, interval=5)
    outer.load_state_dict(copy.deepcopy(session.optimizers[0].state_dict()))
    second = attach(model, outer, policy=STAGES, state=saved, micro_batch_size=8)
    assert heard == heard_again == []
    for each in (session, second):
        train(each, until=12)
    assert heard == heard_again == [(12, 8)], "also after a second resume"


def test_several_measurements_that_wait_for_one_boundary_cost_one_exchange() -> None:
    model, steps = network(), list[int]()

    def note(decision: Decision, source: str) -> None:
        steps.append(session.optimizer_step)

    optimizer = Lookahead(Signum(model.parameters(), lr=0.01), interval=5)
    session = attach(model, optimizer, policy=STAGES, measurement_interval=Span(steps=1), on_decision=note)
    batches = [batch for _, batch, _ in train(session)]
    assert steps == list(range(5, session.optimizer_step + 1, 5))
    seen = [sum(batches[:step]) for step in range(len(batches))]
    for at, batch in ((30, 12), (170, 32)):
        # The plan that comes into force at a boundary is that of the newest measurement one step before it.
        changed = next(step for step in range(5, len(batches), 5) if seen[step - 1] >= at)
        assert batches[changed - 1] != batch
        assert batches[changed] == batch


def train_with_overflow(session: AdaptiveBatch, *, at: int, until: int) -> list[list[Tensor]]:
    """Weights before and after each step; the loss of step `at` is infinite."""
    weights = [[parameter.detach().clone() for parameter in session.model.parameters()]]
    for step in session.steps(Points(), seed=2):
        factor = float("inf") if session.optimizer_step == at else 1.0
        for rows in step:
            step.backward(loss_of(session.model, rows) * factor)
        step.apply()
        weights.append([parameter.detach().clone() for parameter in session.model.parameters()])
        if session.optimizer_step == until:
            break
    return weights


def test_halves_of_a_step_that_the_scaler_skipped_do_not_reach_the_next() -> None:
    model, plain = network(), network()
    sessions = [
        attach(
            each,
            AdamW(each.parameters(), lr=0.01, update_bias_correction=corrects),
            policy=HoldPolicyConfig(),
            measurement_interval=Span(steps=100),
            grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10),
        )
        for each, corrects in ((model, True), (plain, False))
    ]
    corrected, without = (train_with_overflow(session, at=0, until=3) for session in sessions)
    for before, after in zip(corrected[0], corrected[1], strict=True):
        assert torch.equal(before, after), "the only measured step was skipped"
    # No later step is measured, so none of them is corrected.
    assert all(
        torch.equal(a, b)
        for mine, other in zip(corrected, without, strict=True)
        for a, b in zip(mine, other, strict=True)
    )
    assert not torch.equal(corrected[1][0], corrected[2][0])


@pytest.mark.parametrize("overflow", [2, 4, 9])
def test_boundaries_stay_those_of_the_run_when_the_scaler_skips_a_step(overflow: int) -> None:
    model = network()
    matrix, other = model.parameters()
    optimizers = SNOO(Muon([matrix], lr=0.01), interval=5), SNOO(AdamW([other], lr=0.01), interval=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    session = attach(model, optimizers, policy=STAGES, grad_scaler=scaler)
    weights = train_with_overflow(session, at=overflow, until=20)
    assert [optimizer.num_steps for optimizer in optimizers] == [0, 0]
    assert session.plan.global_batch_size == 32, "both changes of the batch were heard"
    moved = [not torch.equal(a[0], b[0]) for a, b in pairwise(weights)]
    # A boundary moves the weights though its own inner step was skipped.
    assert moved == [step != overflow or step % 5 == 4 for step in range(20)]


def test_differences_are_made_for_those_who_want_them_only_and_handed_over_once() -> None:
    model = network()
    first, second = model.parameters()
    wanting, heard = AdamW([first], lr=0.01, update_bias_correction=True), list[list[Tensor]]()
    take = wanting.supply_halves

    def listen(differences: Mapping[Tensor, Tensor]) -> None:
        heard.append(list(differences))
        take(differences)

    wanting.supply_halves = listen
    session = attach(
        model,
        [wanting, AdamW([second], lr=0.01)],
        policy=HoldPolicyConfig(),
        measurement_interval=Span(steps=1),
    )
    step = next(iter(session.steps(Points(), seed=2)))
    for rows in step:
        step.backward(loss_of(model, rows))
    session.measure()
    assert list(session._scheduler.differences) == [first]
    session.supply_halves()
    assert not session._scheduler.differences
    assert len(heard) == 1
    assert heard[0][0] is first
    for optimizer in session.optimizers:
        optimizer.step()
    session.advance(num_samples=8)
    assert heard[1:] == [[]], "what a skipped step left would be dropped"


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
