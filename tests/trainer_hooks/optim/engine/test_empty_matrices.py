"""A parameter without entries gets no update, and does not hold up the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer_hooks.optim.matrix_streams import follow, start, stream
from trainer_hooks.optim import ASGO, SOAP, EShampoo, Muon, Shampoo, SinkGD, SpecSGD


@pytest.mark.parametrize("empty", [(0, 4), (5, 0), (0, 0)])
@pytest.mark.parametrize("kind", [Muon, SpecSGD, SinkGD, Shampoo, EShampoo, SOAP, ASGO])
def test_other_matrices_move_and_resume_as_without_an_empty_one(kind: Any, empty: tuple[int, int]) -> None:
    alone, beside = start(6, 9), start(6, 9)
    expected = follow(kind([alone]), alone, stream(6, 9, steps=6))
    nothing = nn.Parameter(torch.zeros(empty))
    nothing.grad = torch.zeros(empty)
    optimizer = kind([nothing, beside])
    follow(optimizer, beside, stream(6, 9, steps=6)[:3])
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = kind([nothing, beside])
    resumed.load_state_dict(saved)
    assert torch.equal(follow(resumed, beside, stream(6, 9, steps=6)[3:]), expected)
    assert nothing.shape == empty


@pytest.mark.parametrize("kind", [Muon, SpecSGD, SinkGD, Shampoo, EShampoo, SOAP, ASGO])
def test_an_optimizer_of_empty_matrices_steps(kind: Any) -> None:
    nothing = nn.Parameter(torch.zeros(0, 4))
    optimizer = kind([nothing])
    follow(optimizer, nothing, [torch.zeros(0, 4)] * 2)
    assert nothing.shape == (0, 4)


def test_a_projection_without_rows_gets_no_update_and_keeps_no_halves() -> None:
    parameter, plain = start(6, 9), start(6, 9)
    cut = Shampoo([{"params": [parameter], "split_sizes": (0, 6)}], lr=0.02, update_bias_correction=True)
    whole = Shampoo([plain], lr=0.02, update_bias_correction=True)
    for optimizer, moving in ((cut, parameter), (whole, plain)):
        for grad in stream(6, 9, steps=3):
            optimizer.supply_halves({moving: 0.3 * grad.flip(0)})
            follow(optimizer, moving, [grad])
    assert torch.equal(parameter, plain)
    assert not any(name.endswith(".0") for name in cut.state[parameter])
