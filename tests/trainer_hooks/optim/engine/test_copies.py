"""Copies of optimizers, and checkpoints of before, go on as if nothing had happened."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer_hooks.optim.matrix_streams import follow, start, stream
from trainer_hooks.kernels import EXACT
from trainer_hooks.optim import ASGO, SOAP, AdamW, EShampoo, Muon, Scion, Shampoo, SignSGD, Signum, SpecSGD

MAKERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda p: AdamW(p, lr=0.02, update_bias_correction=True),
    "SignSGD": lambda p: SignSGD(p, lr=0.02),
    "Signum": lambda p: Signum(p, lr=0.02),
    "Muon": lambda p: Muon(p, lr=0.02, schedule=EXACT, dtype=None),
    "Scion": lambda p: Scion(p, lr=0.02, schedule=EXACT, dtype=None),
    "SpecSGD": lambda p: SpecSGD(p, lr=0.02),
    "Shampoo": lambda p: Shampoo(p, lr=0.02, precondition_frequency=5, update_bias_correction=True),
    "EShampoo": lambda p: EShampoo(p, lr=0.02, precondition_frequency=5),
    "SOAP": lambda p: SOAP(p, lr=0.02, precondition_frequency=5),
    "ASGO": lambda p: ASGO(p, lr=0.02),
}


def deep_copy(optimizer: Any) -> Any:
    return copy.deepcopy(optimizer)


def pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def with_halves(optimizer: Any, parameter: torch.nn.Parameter, grads: list[Tensor]) -> Tensor:
    """Follow the gradients, with halves for optimizers that use them, and return the weights at the end."""
    for grad in grads:
        if hasattr(optimizer, "supply_halves"):
            optimizer.supply_halves({parameter: 0.3 * grad.flip(0)})
        follow(optimizer, parameter, [grad])
    return parameter.detach().clone()


@pytest.mark.parametrize("copied", [deep_copy, pickled])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_copy_in_the_middle_of_a_run_goes_on_bit_for_bit(kind: str, copied: Callable[[Any], Any]) -> None:
    parameter = start(6, 9)
    optimizer = MAKERS[kind]([parameter])
    with_halves(optimizer, parameter, stream(6, 9)[:7])
    other = copied(optimizer)
    (own,) = other.param_groups[0]["params"]
    assert own is not parameter
    for either in (optimizer, other):
        if hasattr(either, "on_batch_change"):
            either.on_batch_change(global_batch_size=16, previous=8)
    weights = with_halves(other, own, stream(6, 9)[7:])
    assert torch.equal(weights, with_halves(optimizer, parameter, stream(6, 9)[7:]))
    assert not torch.equal(weights, start(6, 9))
    assert not any(group.get("refresh_due") for group in other.param_groups)


def test_a_copy_under_a_scheduler_moves_its_own_parameters() -> None:
    parameter = start(6, 9)
    optimizer = Signum([parameter], lr=0.02)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    other = copy.deepcopy(optimizer)
    (own,) = other.param_groups[0]["params"]
    follow(other, own, stream(6, 9, steps=1))
    assert torch.equal(parameter, start(6, 9))
    assert not torch.equal(own, parameter)


@pytest.mark.parametrize("kind", ["Signum", "Muon", "SOAP"])
def test_groups_of_older_checkpoints_keep_settings_that_they_lack(kind: str) -> None:
    kinds: dict[str, Any] = {"Signum": Signum, "Muon": Muon, "SOAP": SOAP}
    settings = {"lr": 0.02, "weight_decay": 0.5, "decay": "independent", "maximize": True}
    parameter = start(6, 9)
    before = kinds[kind]([parameter], **settings)
    follow(before, parameter, stream(6, 9)[:7])
    saved = copy.deepcopy(before.state_dict())
    other = torch.nn.Parameter(parameter.detach().clone())
    expected = follow(before, parameter, stream(6, 9)[7:])
    for group in saved["param_groups"]:
        for name in ("decay", "maximize", "cautious", "peak_lr", "num_heads", "split_sizes", "batched"):
            group.pop(name, None)
    after = kinds[kind]([other], **settings)
    after.load_state_dict(saved)
    assert torch.equal(follow(after, other, stream(6, 9)[7:]), expected)
