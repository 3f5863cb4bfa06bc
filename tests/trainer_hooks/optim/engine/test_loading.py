"""Checkpoints that load_state_dict takes, in which dtype, and those that it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import nn

from gns_controller.core.errors import InvalidInputError
from tests.trainer_hooks.optim.matrix_streams import follow, start, stream
from trainer_hooks.optim import (
    ASGO,
    SOAP,
    AdamW,
    EShampoo,
    Muon,
    Scion,
    Shampoo,
    SignSGD,
    Signum,
    SinkGD,
    SpecSGD,
)
from trainer_hooks.optim.engine.optimizer import OPTIMIZERS_SETTINGS

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

FACTORED: dict[str, Make] = {
    "Shampoo": lambda p: Shampoo(p, lr=0.02, precondition_frequency=5),
    "Shampoo, late": lambda p: Shampoo(p, lr=0.02, precondition_frequency=50, start_preconditioning_step=4),
    "Shampoo, kl, late": lambda p: Shampoo(
        p, lr=0.02, factors="kl", exponent=0.5, precondition_frequency=50, start_preconditioning_step=4
    ),
    "EShampoo, late": lambda p: EShampoo(p, lr=0.02, precondition_frequency=5, start_preconditioning_step=4),
    "SOAP": lambda p: SOAP(p, lr=0.02, precondition_frequency=5),
    "SOAP, one side": lambda p: SOAP(p, lr=0.02, precondition_frequency=5, max_preconditioner_dim=7),
    "ASGO, normalized": lambda p: ASGO(p, lr=0.02, spectral_normalization=True),
}
KINDS: list[Any] = [SignSGD, Signum, AdamW, Muon, Scion, SinkGD, SpecSGD, Shampoo, EShampoo, SOAP, ASGO]
MOMENTUM_BESIDE_PARAMETERS: list[Any] = [Muon, Scion, Signum, AdamW]


@pytest.mark.parametrize("name", FACTORED)
def test_the_state_that_torch_initialises_has_room_for_a_whole_checkpoint(name: str) -> None:
    """torch.distributed.checkpoint reads only what a step at rate 0 on gradients of zeros leaves behind."""
    straight, first, second = (start(6, 9) for _ in range(3))
    expected = follow(FACTORED[name]([straight]), straight, stream(6, 9))
    before, after = FACTORED[name]([first]), FACTORED[name]([second])
    follow(before, first, stream(6, 9)[:7])
    rate, after.param_groups[0]["lr"] = after.param_groups[0]["lr"], 0.0
    follow(after, second, [torch.zeros(6, 9)])
    after.param_groups[0]["lr"] = rate
    room, saved = after.state_dict(), copy.deepcopy(before.state_dict())
    shapes = {entry: value.shape for entry, value in room["state"][0].items()}
    assert shapes == {entry: value.shape for entry, value in saved["state"][0].items()}
    with torch.no_grad():
        second.copy_(first)
    after.load_state_dict({**saved, "state": {0: {entry: saved["state"][0][entry] for entry in shapes}}})
    assert torch.equal(follow(after, second, stream(6, 9)[7:]), expected)


DTYPES = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize(("saved", "loaded"), DTYPES)
@pytest.mark.parametrize("kind", [*MOMENTUM_BESIDE_PARAMETERS, Shampoo, EShampoo, SOAP, ASGO])
def test_a_checkpoint_goes_on_beside_parameters_of_another_dtype(
    kind: Any, saved: torch.dtype, loaded: torch.dtype
) -> None:
    first = start(6, 9, saved)
    before = kind([first])
    follow(before, first, stream(6, 9, steps=4))
    second = nn.Parameter(first.detach().to(loaded))
    after = kind([second])
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    beside = kind in MOMENTUM_BESIDE_PARAMETERS
    dtype = loaded if beside else torch.promote_types(loaded, torch.float32)
    for name, value in before.state[first].items():
        if value.ndim and value.is_floating_point():
            entry = after.state[second][name]
            assert entry.dtype == dtype
            assert torch.equal(entry, value.to(dtype)), name
    assert follow(after, second, stream(6, 9, steps=4)[1:]).isfinite().all()


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize(("saver", "loader"), [pair for pair in permutations(KINDS, 2) if pair != (SignSGD, Signum)])
def test_an_optimizer_refuses_another_ones_checkpoint_and_stays_as_it_was(
    saver: Any, loader: Any, tagged: bool
) -> None:
    """SignSGD is Signum with a momentum of 0, so Signum may take it, and SignSGD refuses Signum's by its momentum."""
    parameter = start(6, 9)
    before, after = saver([parameter]), loader([parameter])
    follow(before, parameter, stream(6, 9, steps=2))
    groups = copy.deepcopy(after.state_dict()["param_groups"])
    saved = copy.deepcopy(before.state_dict())
    message = f"not {loader.__name__}'s: its groups"
    if not tagged:
        del saved["optimizer_class"]
    elif (saver, loader) != (Signum, SignSGD):
        message = f"written by {saver.__name__}, and {loader.__name__} cannot .*: load it into {saver.__name__}"
    with pytest.raises(InvalidInputError, match=message):
        after.load_state_dict(saved)
    assert after.state_dict()["param_groups"] == groups
    assert not after.state


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_with_and_without_its_class(kind: Any) -> None:
    first, second, third = start(6, 9), start(6, 9), start(6, 9)
    before, with_class, without_class = kind([first]), kind([second]), kind([third])
    follow(before, first, stream(6, 9, steps=3))
    saved = copy.deepcopy(before.state_dict())
    assert saved["optimizer_class"] == kind.__name__
    for after, parameter in ((with_class, second), (without_class, third)):
        after.load_state_dict(copy.deepcopy(saved))
        with torch.no_grad():
            parameter.copy_(first)
        saved.pop("optimizer_class", None)
    expected = follow(before, first, stream(6, 9, steps=5)[3:])
    assert torch.equal(follow(with_class, second, stream(6, 9, steps=5)[3:]), expected)
    assert torch.equal(follow(without_class, third, stream(6, 9, steps=5)[3:]), expected)


def test_a_checkpoint_with_its_class_may_hold_settings_of_later_versions() -> None:
    """Such a checkpoint would be another optimizer's by its settings alone."""
    before, after = Muon([start(6, 9)]), Muon([start(6, 9)])
    saved = before.state_dict()
    saved["param_groups"][0]["dampening"] = 0.5
    after.load_state_dict(copy.deepcopy(saved))
    assert after.param_groups[0]["dampening"] == 0.5
    del saved["optimizer_class"]
    with pytest.raises(InvalidInputError, match="not Muon's: its groups hold dampening"):
        Muon([start(6, 9)]).load_state_dict(saved)


class Logged(Muon):
    """A subclass that changes nothing."""


def test_a_subclass_takes_the_checkpoints_of_its_base_and_not_the_other_way_round() -> None:
    base, derived = Muon([start(6, 9)]), Logged([start(6, 9)])
    derived.load_state_dict(copy.deepcopy(base.state_dict()))
    saved = derived.state_dict()
    with pytest.raises(InvalidInputError, match=r"written by Logged, and Muon .* remove 'optimizer_class' from"):
        base.load_state_dict(copy.deepcopy(saved))
    del saved["optimizer_class"]
    base.load_state_dict(saved)


def test_signum_and_signsgd_without_momentum_have_the_same_checkpoints() -> None:
    still, sign = Signum([start(6, 9)], momentum=0.0), SignSGD([start(6, 9)])
    sign.load_state_dict(copy.deepcopy(still.state_dict()))
    still.load_state_dict(copy.deepcopy(sign.state_dict()))


def test_torch_loads_a_checkpoint_with_its_class() -> None:
    first, second = start(6, 9), start(6, 9)
    before, after = AdamW([first]), torch.optim.AdamW([second])
    follow(before, first, stream(6, 9, steps=2))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert torch.equal(after.state[second]["exp_avg"], before.state[first]["exp_avg"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("loader", KINDS)
def test_an_optimizer_refuses_checkpoints_of_torchs_other_optimizers(kind: Any, loader: Any) -> None:
    parameter = start(6, 9)
    before = kind([parameter], lr=0.1)
    follow(before, parameter, stream(6, 9, steps=2))
    with pytest.raises(InvalidInputError, match=f"not {loader.__name__}'s: its groups"):
        loader([parameter]).load_state_dict(before.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_parameters_and_settings_of_schedulers_do_not_hinder_loading(kind: Any) -> None:
    layer = nn.Linear(9, 6, bias=False)
    named, unnamed = kind(layer.named_parameters()), kind(layer.parameters())
    torch.optim.lr_scheduler.OneCycleLR(named, max_lr=0.1, total_steps=5, cycle_momentum=False)
    torch.optim.swa_utils.SWALR(named, swa_lr=0.01)
    for saver, loader in ((named, unnamed), (unnamed, named), (named, named)):
        follow(saver, layer.weight, stream(6, 9, steps=2))
        loader.load_state_dict(copy.deepcopy(saver.state_dict()))
        follow(loader, layer.weight, stream(6, 9, steps=1))


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_users_wrote_into_groups_come_back_with_a_checkpoint(kind: Any) -> None:
    first, second = start(6, 9), start(6, 9)
    before, after = kind([first]), kind([second])
    before.param_groups[0].update(name="hidden", lr_scale=0.5)
    follow(before, first, stream(6, 9, steps=2))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert after.param_groups[0]["name"] == "hidden"
    assert after.param_groups[0]["lr_scale"] == 0.5


def test_the_list_of_settings_has_all_of_ours_and_of_torchs_common_ones() -> None:
    torchs = ("SGD", "Adam", "AdamW", "Muon", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta")
    kinds = [*KINDS, *(getattr(torch.optim, name) for name in torchs)]
    settings = {name for kind in kinds for name in kind([start(6, 9)], lr=0.1).defaults}
    assert settings <= OPTIMIZERS_SETTINGS


@pytest.mark.parametrize("kind", [Muon, Scion, SinkGD, SpecSGD])
def test_a_cut_without_state_of_matrices_stays_as_it_was_built(kind: Any) -> None:
    """The momentum of before lies beside the parameter, so the next step is that of the matrices cut now."""
    whole, cut, other = start(6, 9), start(6, 9), start(6, 9)
    before, after = kind([whole]), kind([{"params": [cut], "split_sizes": (2, 4)}])
    straight = kind([{"params": [other], "split_sizes": (2, 4)}])
    (grad,) = stream(6, 9, steps=1)
    follow(before, whole, [grad])
    follow(straight, other, [grad])
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert after.param_groups[0]["split_sizes"] == (2, 4)
    with torch.no_grad():
        other.copy_(cut)
    assert torch.equal(follow(after, cut, [grad]), follow(straight, other, [grad]))
    assert not torch.equal(cut, whole)


@pytest.mark.parametrize("kind", [Shampoo, EShampoo, SOAP, ASGO])
@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({}, {"num_heads": 3}, "group 1 was built with num_heads=3, and the checkpoint has num_heads=None"),
        ({"num_heads": 3}, {"num_heads": 2}, "num_heads=2, and the checkpoint has num_heads=3"),
        ({"split_sizes": (2, 4)}, {}, r"split_sizes=None, and the checkpoint has split_sizes=\[2, 4\]"),
        ({"batched": True}, {}, "batched=False, and the checkpoint has batched=True"),
    ],
)
def test_the_shampoo_family_refuses_checkpoints_of_another_cut(kind: Any, there: Any, here: Any, message: str) -> None:
    plain, cut = start(6, 9), start(6, 9)
    before, after = (kind([{"params": [plain]}, {"params": [cut], **settings}]) for settings in (there, here))
    follow(before, plain, stream(6, 9, steps=1))
    follow(before, cut, stream(6, 9, steps=1))
    with pytest.raises(InvalidInputError, match=message):
        after.load_state_dict(before.state_dict())
    again = kind([{"params": [plain]}, {"params": [cut], **there}])
    saved = copy.deepcopy(before.state_dict())
    if "split_sizes" in there:
        saved["param_groups"][1]["split_sizes"] = list(there["split_sizes"])
    again.load_state_dict(saved)
    follow(again, cut, stream(6, 9, steps=1))
