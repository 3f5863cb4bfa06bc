"""Matrices that a checkpoint must bring to the rank that owns them, and the error when they are missing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gns_controller.core.errors import GeometryError, InvalidInputError
from tests.trainer_hooks.optim.streams import gradients, run
from trainer_hooks.optim import ASGO, SOAP, EShampoo, Muon, Shampoo

KINDS: list[Any] = [Shampoo, EShampoo, SOAP, ASGO]
COUNTS = ("step",)
"""Entries of every parameter that every rank holds."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_refuses_counts_beside_initialised_matrices(kind: Any) -> None:
    """The full_state_dict of rank 0 looks so on the others: counts, and beside them torch's initialising step."""
    parameter = nn.Parameter(torch.ones(4, 6))
    optimizer = kind([parameter])
    run(optimizer, parameter, gradients(4, 6, steps=3))
    whole = copy.deepcopy(optimizer.state_dict())
    filled = copy.deepcopy(whole)
    other = nn.Parameter(torch.ones(4, 6))
    initialised = kind([other], lr=0.0)
    run(initialised, other, [torch.zeros(4, 6)])
    filled["state"][0] = {**initialised.state[other], **{name: filled["state"][0][name] for name in COUNTS}}
    optimizer.load_state_dict(filled)
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="full_state_dict"):
            run(optimizer, parameter, gradients(4, 6, steps=1))
    optimizer.load_state_dict(whole)
    run(optimizer, parameter, gradients(4, 6, steps=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_with_gradients_of_zeros_alone_resumes_bit_for_bit(kind: Any) -> None:
    resting, straight = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    before, whole = kind([resting]), kind([straight])
    for optimizer, parameter in ((before, resting), (whole, straight)):
        run(optimizer, parameter, [torch.zeros(4, 6)] * 3)
    before.load_state_dict(copy.deepcopy(before.state_dict()))
    actual = run(before, resting, gradients(4, 6, steps=4)).clone()
    assert torch.equal(actual, run(whole, straight, gradients(4, 6, steps=4)))
    assert not torch.equal(actual, torch.ones(4, 6).double())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_marks_of_owners_goes_on_bit_for_bit(kind: Any) -> None:
    first, straight = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    before, whole = kind([first]), kind([straight])
    for optimizer, parameter in ((before, first), (whole, straight)):
        run(optimizer, parameter, gradients(4, 6, steps=3))
    saved = copy.deepcopy(before.state_dict())
    del saved["state"][0]["owned"]
    before.load_state_dict(saved)
    grads = gradients(4, 6, steps=5)[3:]
    assert torch.equal(run(before, first, grads), run(whole, straight, grads))
    before.load_state_dict(copy.deepcopy(before.state_dict()))
    assert torch.equal(run(before, first, grads), run(whole, straight, grads))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failing_step", [1, 2, 3])
def test_a_run_that_survived_a_failed_step_resumes_from_its_checkpoint(
    kind: Any, failing_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix for which memory runs out keeps the next one from being computed."""

    def train(optimizer: Any, steps: range) -> list[Tensor]:
        parameters: list[Tensor] = optimizer.param_groups[0]["params"]
        for step in steps:
            for parameter in parameters:
                parameter.grad = grads[step].to(parameter.dtype)
            optimizer.step()
        return [parameter.detach().clone() for parameter in parameters]

    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    grads = gradients(4, 6, steps=6)
    before = kind([nn.Parameter(torch.ones(4, 6)) for _ in range(2)])
    train(before, range(failing_step - 1))
    with monkeypatch.context() as patch:
        patch.setattr(before, "_pieces", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            train(before, range(1))
    trained = train(before, range(failing_step, 5))
    after = kind([nn.Parameter(weights) for weights in trained])
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for actual, expected in zip(train(after, range(5, 6)), train(before, range(5, 6)), strict=True):
        assert torch.equal(actual, expected)


def test_the_next_step_refuses_counts_without_matrices() -> None:
    parameter = nn.Parameter(torch.ones(4, 6))
    before = Shampoo([parameter])
    run(before, parameter, gradients(4, 6, steps=3))
    share = copy.deepcopy(before.state_dict())
    share["state"][0] = {name: share["state"][0][name] for name in COUNTS}
    after = Shampoo([parameter])
    after.load_state_dict(share)
    with pytest.raises(InvalidInputError, match="consolidated_state_dict"):
        run(after, parameter, gradients(4, 6, steps=1))


def test_the_first_step_of_a_copy_refuses_a_share() -> None:
    """A copy on one of several ranks would do all of the work, with the matrices of one rank."""
    optimizer = SOAP([nn.Parameter(torch.ones(4, 6)) for _ in range(2)])
    owned, foreign = optimizer.param_groups[0]["params"]
    owned.grad = foreign.grad = torch.ones(4, 6)
    optimizer.step()
    optimizer.state[foreign] = {name: optimizer.state[foreign][name] for name in COUNTS}
    copied = copy.deepcopy(optimizer)
    for parameter in copied.param_groups[0]["params"]:
        parameter.grad = torch.ones(4, 6)
    with pytest.raises(InvalidInputError, match="only the matrices it owns"):
        copied.step()


def test_a_step_in_portions_is_the_step_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> list[Tensor]:
        shapes = [(4, 6), (6, 4), (4, 6), (5, 5), (4, 6)]
        matrices = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes]
        optimizer = Muon(matrices, dtype=None)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            for matrix in matrices:
                matrix.grad = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        return [matrix.detach() for matrix in matrices]

    at_once = trained()
    monkeypatch.setattr("trainer_hooks.optim.engine.matrix_optimizer._MAX_BATCH_NUMEL", 30)
    for actual, expected in zip(trained(), at_once, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_an_optimizer_does_not_keep_a_refused_group() -> None:
    parameter = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([parameter])
    with pytest.raises(GeometryError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 1
    run(optimizer, parameter, gradients(4, 6, steps=1))
