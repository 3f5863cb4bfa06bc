"""What attach finds wrong before anything is opened, in sentences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gns_controller.core.errors import InvalidInputError
from tests.trainer_hooks.session.test_adaptive_batch import attach, network
from trainer_hooks import AdaptiveBatch
from trainer_hooks.distributed.collectives import RankGroup
from trainer_hooks.distributed.layout import DataParallel, Layout
from trainer_hooks.optim import SNOO, Muon, parameter_groups
from trainer_hooks.session.attach import undivided
from trainer_hooks.session.checkpoint import check_same_state


def test_what_is_no_optimizer_is_refused_in_a_sentence() -> None:
    model = network()
    groups = parameter_groups(model, hidden=Muon)
    with pytest.raises(InvalidInputError, match=r"ParameterGroups is neither .* optimizers; give its .optim"):
        attach(model, groups)
    for given, told in ((None, "a NoneType"), ([], "an empty list"), ([groups], "a list with a ParameterGroups")):
        with pytest.raises(InvalidInputError, match=told):
            AdaptiveBatch.attach(model, given, run="x", global_batch_size=8, micro_batch_size=8, budget_samples=80)
    assert len(attach(model, groups.optimizers).optimizers) == len(groups.optimizers)


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"policy": "good_put"}, "'goodput'"),
        ({"policy": "goodput", "theta": 1}, ": theta: "),
        (
            {
                "policy": "stages",
                "stages": [
                    {"from_samples": 20, "global_batch_size": 32},
                    {"from_samples": 10, "global_batch_size": 64},
                ],
            },
            "stages must ascend",
        ),
    ],
)
def test_a_mapping_that_is_no_policy_is_told_in_one_sentence(policy: Any, told: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        attach(network(), policy=policy)
    sentence = str(caught.value)
    assert told in sentence
    assert sentence.endswith(".")
    assert ".." not in sentence
    assert ": :" not in sentence


def test_work_that_every_rank_repeats_is_named() -> None:
    """Optimizers of matrices divide work under DDP only if they are given the group."""
    model = network()
    matrix, other = model.parameters()
    both = [SNOO(Muon([matrix])), torch.optim.AdamW([other])]
    ranks = RankGroup(rank=0, size=2, device=torch.device("cpu"), process_group=None)
    ddp = Layout("DDP", ranks, DataParallel(0, 2), 1, ())
    assert undivided(both, ddp) == ["Muon"]
    alone = Layout("DDP", replace(ranks, size=1), DataParallel(0, 1), 1, ())
    assert undivided(both, alone) == undivided(both[1:], ddp) == []
    shared = Muon([matrix])
    shared._process_group = object()
    assert undivided([shared], ddp) == []


@pytest.mark.parametrize("state", [{(0, 1): 2}, [1], {"optimizer_step": "soon"}, {("a",): 1, "optimizer_step": 3}])
def test_a_state_that_cannot_be_compared_is_told_to_every_rank(state: Any) -> None:
    """Raised after the exchange, in which the other ranks wait."""
    ranks = RankGroup(rank=0, size=1, device=torch.device("cpu"), process_group=None)
    with pytest.raises(InvalidInputError, match="state: what rank 0 gave is not what state_dict returned"):
        check_same_state(state, ranks)
    check_same_state(None, ranks)
