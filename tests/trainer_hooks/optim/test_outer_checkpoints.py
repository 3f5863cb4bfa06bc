"""Checkpoints of outer optimizers: bit for bit however they are packed, and those that are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from gns_controller.core.errors import InvalidInputError
from tests.trainer_hooks.optim.streams import gradients, run
from tests.trainer_hooks.session.test_adaptive_batch import attach, network, train
from trainer_hooks.optim import SNOO, AdamW, Lookahead, Muon, Shampoo

SHAPE = (4, 3)
MAKERS: dict[str, Callable[[nn.Module], SNOO]] = {
    "SNOO of Muon": lambda m: SNOO(Muon(m.parameters(), lr=0.1, dtype=None), interval=5),
    "SNOO of Shampoo": lambda m: SNOO(Shampoo(m.parameters(), lr=0.1), interval=5),
    "SNOO of AdamW": lambda m: SNOO(AdamW(m.parameters(), lr=0.1), interval=5),
    "SNOO of torch.optim.AdamW": lambda m: SNOO(torch.optim.AdamW(m.parameters(), lr=0.1), interval=5),
    "Lookahead of SGD": lambda m: Lookahead(torch.optim.SGD(m.parameters(), lr=0.1), interval=5),
}


class Layer(nn.Module):
    """Model of one matrix."""

    def __init__(self, start: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SHAPE, dtype=torch.float64) if start is None else start.detach().clone())


def options(packing: str) -> StateDictOptions:
    return StateDictOptions(
        flatten_optimizer_state_dict=packing == "flat", full_state_dict=packing == "full", cpu_offload=packing == "full"
    )


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("packing", ["nested", "flat", "full"])
@pytest.mark.parametrize("stop", [3, 5, 7, 10])
@pytest.mark.parametrize("name", MAKERS)
def test_a_wrapper_resumes_bit_for_bit_within_an_interval_and_at_its_end(
    one_rank: None, tmp_path: Path, name: str, stop: int, packing: str
) -> None:
    make, grads = MAKERS[name], gradients(*SHAPE)
    straight, before = Layer(), Layer()
    expected = run(make(straight), straight.weight, grads)
    saving = make(before)
    run(saving, before.weight, grads[:stop])
    saved = get_optimizer_state_dict(before, saving, options=options(packing))
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "checkpoint")
    for through_files in (False, True):
        after = Layer(before.weight)
        resumed = make(after)
        if through_files:
            parts = {"optimizer": get_optimizer_state_dict(after, resumed, options=options(packing))}
            dcp.load(parts, checkpoint_id=tmp_path / "checkpoint")
        else:
            parts = {"optimizer": copy.deepcopy(saved)}
        set_optimizer_state_dict(after, resumed, parts["optimizer"], options=options(packing))
        assert resumed.num_steps == stop % 5
        assert torch.equal(run(resumed, after.weight, grads[stop:]), expected)


@pytest.mark.parametrize("missing", ["outer_num_steps", "outer_interval"])
def test_a_wrapper_refuses_slow_weights_without_counts_and_loads_nothing(missing: str) -> None:
    layer = Layer()
    optimizer = MAKERS["SNOO of AdamW"](layer)
    run(optimizer, layer.weight, gradients(*SHAPE)[:3])
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        del state[missing]
    with pytest.raises(InvalidInputError, match=f"slow weights and no {missing}; load a whole state_dict"):
        optimizer.load_state_dict(saved)
    assert optimizer.num_steps == 3


def test_a_wrapper_refuses_parameters_that_counted_other_steps() -> None:
    parameters = [nn.Parameter(torch.ones(SHAPE)), nn.Parameter(torch.ones(SHAPE))]
    optimizer = SNOO(torch.optim.SGD(parameters, lr=0.1), interval=5)
    for parameter in parameters:
        parameter.grad = torch.ones(SHAPE)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["outer_num_steps"] += 2
    with pytest.raises(InvalidInputError, match=r"1 of 5 steps .* 3 of 5 steps"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("num_steps", [6, 7])
def test_a_wrapper_takes_another_interval_at_a_boundary_only(num_steps: int) -> None:
    layer, grads = Layer(), gradients(*SHAPE)
    before = SNOO(AdamW(layer.parameters(), lr=0.1), interval=7)
    run(before, layer.weight, grads[:num_steps])
    after = SNOO(AdamW(layer.parameters(), lr=0.1), interval=5)
    if num_steps == 6:
        with pytest.raises(
            InvalidInputError, match=r"6 steps after .* interval=7, .* interval=5: build .* interval=7, or"
        ):
            after.load_state_dict(before.state_dict())
        return
    after.load_state_dict(before.state_dict())
    run(after, layer.weight, grads[:4])
    assert after.num_steps == 4


@pytest.mark.parametrize("packing", ["nested", "flat"])
@pytest.mark.parametrize("wraps_last", [False, True])
def test_reading_the_state_beside_a_loaded_inner_checkpoint_changes_nothing(packing: str, wraps_last: bool) -> None:
    layer, grads = Layer(), gradients(*SHAPE)
    plain = AdamW(layer.parameters(), lr=0.1)
    run(plain, layer.weight, grads[:3])
    average = plain.state[layer.weight]["exp_avg"].clone()
    saved = get_optimizer_state_dict(layer, plain, options=options(packing))
    other = Layer(layer.weight)
    inner = AdamW(other.parameters(), lr=0.1)
    if wraps_last:
        set_optimizer_state_dict(other, inner, saved, options=options(packing))
    wrapped = SNOO(inner, interval=5)
    if not wraps_last:
        set_optimizer_state_dict(other, wrapped, saved, options=options(packing))
    read = get_optimizer_state_dict(other, wrapped)
    assert float(inner.state[other.weight]["step"]) == 3
    assert torch.equal(inner.state[other.weight]["exp_avg"], average)
    assert wrapped.num_steps == 0
    assert torch.equal(read["state"]["weight"]["outer_slow"], layer.weight), "a checkpoint loads into what is there"


def test_weights_loaded_after_the_optimizer_are_where_the_interval_begins() -> None:
    """Slow weights of before are left behind: at a boundary they are the weights."""
    grads, late = gradients(*SHAPE), Layer()
    inner_alone = AdamW(late.parameters(), lr=0.1)
    run(inner_alone, late.weight, grads[:3])
    trained = late.weight.detach().clone()
    ends = []
    for loads_weights_first in (True, False):
        layer = Layer()
        wrapped = SNOO(AdamW(layer.parameters(), lr=0.1), interval=2)
        for loads_weights in (True, False) if loads_weights_first else (False, True):
            if loads_weights:
                layer.load_state_dict({"weight": trained})
            else:
                wrapped.load_state_dict(copy.deepcopy(inner_alone.state_dict()))
        with wrapped.slow_weights():
            assert torch.equal(layer.weight, trained)
        ends.append(run(wrapped, layer.weight, grads[3:8]))
    assert torch.equal(*ends)


def test_ranks_count_alike_with_any_blocks_of_the_first_gradient() -> None:
    """The rate is every rank's; that a block of the gradient is zero, or has no entries, is not."""
    blocks = torch.ones(SHAPE), torch.zeros(SHAPE), torch.zeros(0, 3)
    counted = set()
    for grad in blocks:
        parameter = nn.Parameter(torch.ones_like(grad))
        optimizer = SNOO(torch.optim.SGD([parameter], lr=0.0), interval=3)
        run(optimizer, parameter, [grad])
        counted.add(optimizer.num_steps)
    assert counted == {0}


def test_a_session_counts_a_first_step_at_rate_0() -> None:
    model = network()
    optimizer = SNOO(AdamW(model.parameters(), lr=0.01), interval=5)
    session = attach(model, optimizer, learning_rate_schedule=lambda samples: min(samples / 40, 1.0))
    train(session, until=1)
    assert optimizer.param_groups[0]["lr"] == 0
    assert optimizer.num_steps == 1
    train(session, until=8)
    assert optimizer.num_steps == 3


def test_state_merges_those_of_the_inner_and_the_outer_optimizer() -> None:
    layer = Layer()
    wrapped = SNOO(AdamW(layer.parameters(), lr=0.1), interval=5, momentum=0.5)
    state: Any = wrapped.state
    assert not state
    assert layer.weight not in state
    assert state[layer.weight] == {}
    run(wrapped, layer.weight, gradients(*SHAPE)[:2])
    assert list(wrapped.state) == [layer.weight]
    assert layer.weight in wrapped.state
    assert wrapped.state[layer.weight].keys() == wrapped.state_dict()["state"][0].keys()
    assert {"step", "exp_avg", "outer_slow", "outer_momentum"} < wrapped.state[layer.weight].keys()
    alone = AdamW(layer.parameters(), lr=0.3)
    alone.load_state_dict(wrapped.inner.state_dict())
    assert alone.state[layer.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}


def by_item(state: Any) -> None:
    for entries in state.values():
        for name in entries:
            entries[name] = entries[name].double()


def by_update(state: Any) -> None:
    for entries in state.values():
        entries.update({name: value.double() for name, value in entries.items()})


def by_union(state: Any) -> None:
    for entries in state.values():
        entries |= {name: value.double() for name, value in entries.items()}


def by_parameter(state: Any) -> None:
    for parameter, entries in state.items():
        state[parameter] = {name: value.double() for name, value in entries.items()}


def by_parameter_with_the_entries_own_class(state: Any) -> None:
    """Move collections as Lightning does."""
    for parameter, entries in state.items():
        state[parameter] = type(entries)({name: value.double() for name, value in entries.items()})


@pytest.mark.parametrize(
    "convert", [by_item, by_update, by_union, by_parameter, by_parameter_with_the_entries_own_class]
)
def test_state_can_be_moved_as_trainers_do_after_a_resume(convert: Callable[[Any], None]) -> None:
    """Moved to another dtype, as there may be no other device: what was float32 is then float64 in both optimizers."""
    parameter = nn.Parameter(torch.ones(SHAPE))
    wrapped = SNOO(torch.optim.AdamW([parameter], lr=0.1), interval=5, momentum=0.5)
    run(wrapped, parameter, gradients(*SHAPE)[:3])
    before = {name: value.clone() for name, value in wrapped.state_dict()["state"][0].items()}
    convert(wrapped.state)
    after = wrapped.state_dict()["state"][0]
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name].to(value.dtype)), name
        assert value.dtype == (torch.int64 if name in ("outer_num_steps", "outer_interval") else torch.float64), name
    assert wrapped.inner.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert wrapped.num_steps == 3


def test_state_makes_and_deletes_entries_where_they_belong() -> None:
    layer = Layer()
    wrapped = SNOO(AdamW(layer.parameters(), lr=0.1), interval=5, momentum=0.5)
    run(wrapped, layer.weight, gradients(*SHAPE)[:2])
    entries = wrapped.state[layer.weight]
    assert isinstance(entries, dict)
    assert type(copy.deepcopy(entries)) is dict, "a copy is a plain dict"
    average = wrapped.inner.state[layer.weight]["exp_avg"]
    assert entries.pop("exp_avg") is average
    entries.setdefault("mine", torch.ones(1))
    del entries["outer_momentum"]
    assert wrapped.inner.state[layer.weight].keys() == {"step", "exp_avg_sq", "mine"}
    assert "outer_momentum" not in wrapped.state[layer.weight]
    wrapped.state.clear()
    assert not wrapped.state
    assert not wrapped.inner.state


@pytest.mark.parametrize("stop", [3, 5])
@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_that_counts_in_groups_goes_on_bit_for_bit(name: str, stop: int) -> None:
    """The first checkpoints did, without an interval: it is the one that was built."""
    make, grads = MAKERS[name], gradients(*SHAPE)
    before = Layer()
    saving = make(before)
    run(saving, before.weight, grads[:stop])
    saved = copy.deepcopy(saving.state_dict())
    for state in saved["state"].values():
        del state["outer_num_steps"], state["outer_interval"]
    for group in saved["param_groups"]:
        group["outer_num_steps"] = stop % 5
    after = Layer(before.weight)
    resumed = make(after)
    resumed.load_state_dict(saved)
    assert resumed.num_steps == stop % 5
    assert "outer_num_steps" not in resumed.param_groups[0]
    assert saved["param_groups"][0]["outer_num_steps"] == stop % 5, "the checkpoint stays as it was"
    assert torch.equal(run(resumed, after.weight, grads[stop:]), run(saving, before.weight, grads[stop:]))


def test_an_outer_optimizer_refuses_to_wrap_another() -> None:
    with pytest.raises(InvalidInputError, match="and no outer one"):
        Lookahead(MAKERS["SNOO of AdamW"](Layer()))


WRAPPERS: dict[str, Callable[[torch.optim.Optimizer], SNOO]] = {
    "SNOO": lambda inner: SNOO(inner, interval=5),
    "Lookahead": lambda inner: Lookahead(inner, interval=5),
}


@pytest.mark.parametrize("stop", [3, 5])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_checkpoint_carries_the_class_of_the_inner_optimizer(name: str, stop: int) -> None:
    wrap, grads = WRAPPERS[name], gradients(*SHAPE)
    layer = Layer()
    before = wrap(AdamW(layer.parameters(), lr=0.1))
    run(before, layer.weight, grads[:stop])
    saved = copy.deepcopy(before.state_dict())
    assert saved["optimizer_class"] == before.consolidated_state_dict()["optimizer_class"] == "AdamW"
    other = Layer(layer.weight)
    after = wrap(AdamW(other.parameters(), lr=0.1))
    after.load_state_dict(copy.deepcopy(saved))
    assert torch.equal(run(after, other.weight, grads[stop:]), run(before, layer.weight, grads[stop:]))
    del saved["optimizer_class"]
    wrap(AdamW(Layer().parameters(), lr=0.1)).load_state_dict(saved)


@pytest.mark.parametrize("inner", [Muon, torch.optim.SGD])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_refuses_the_checkpoint_of_another_inner_optimizer(name: str, inner: Any) -> None:
    layer, other = Layer(), Layer()
    before = WRAPPERS[name](AdamW(layer.parameters(), lr=0.1))
    run(before, layer.weight, gradients(*SHAPE)[:3])
    after = WRAPPERS[name](inner(other.parameters(), lr=0.1))
    run(after, other.weight, gradients(*SHAPE)[:2])
    weights = copy.deepcopy(after.state_dict()["state"])
    for saved in (before.state_dict(), before.inner.state_dict()):
        with pytest.raises(InvalidInputError, match=f"written by AdamW, and {inner.__name__} cannot"):
            after.load_state_dict(copy.deepcopy(saved))
    assert after.num_steps == 2
    kept = after.state_dict()["state"]
    assert all(torch.equal(torch.as_tensor(kept[0][entry]), torch.as_tensor(weights[0][entry])) for entry in weights[0])


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_of_torchs_adamw_goes_on_from_ours_and_back(name: str) -> None:
    ours, twin = Layer(), Layer()
    wrapped = [
        WRAPPERS[name](AdamW(ours.parameters(), lr=0.1, weight_decay=0.0)),
        WRAPPERS[name](torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.0)),
    ]
    run(wrapped[0], ours.weight, gradients(*SHAPE)[:3])
    wrapped[1].load_state_dict(copy.deepcopy(wrapped[0].state_dict()))
    assert wrapped[1].num_steps == 3
    assert "optimizer_class" not in wrapped[1].state_dict(), "torch writes none"
    wrapped[0].load_state_dict(copy.deepcopy(wrapped[1].state_dict()))
