"""Abilities of optimizers are found by their members, whatever the class inherits from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gns_controller.core.contract import Span
from gns_controller.core.errors import InvalidInputError
from gns_controller.core.policies import HoldPolicyConfig
from tests.trainer_hooks.session.test_adaptive_batch import attach, network, train
from trainer_hooks.optim import SNOO, AdamW, Lookahead, Muon
from trainer_hooks.optim.known_optimizers import KNOWN
from trainer_hooks.optim.protocols import (
    NotifiedOfBatchChange,
    OuterOptimizer,
    UsesHalves,
    WrapsOptimizer,
    boundary_interval,
    check_boundaries,
    class_name_of,
    count_skipped_steps,
    halves_user,
    innermost,
)


class SlowWeights(torch.optim.SGD):
    """An outer optimizer that wraps none, as if it pulled its own weights back every three steps."""

    facts = KNOWN["SGD"]
    interval = 3
    num_steps = 0

    @property
    def at_boundary(self) -> bool:
        return self.num_steps == 0

    def step(self, closure: Any = None) -> Any:
        self.num_steps = (self.num_steps + 1) % self.interval
        return super().step(closure)


class Halved(torch.optim.SGD):
    """It records what it is supplied with."""

    wants_halves = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.supplied: list[Mapping[Tensor, Tensor]] = []

    def supply_halves(self, differences: Mapping[Tensor, Tensor]) -> None:
        self.supplied.append(dict(differences))


class Delegating(torch.optim.SGD):
    """A wrapper of the user's own, which passes nothing on."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([parameter for group in inner.param_groups for parameter in group["params"]], lr=0.1)
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, 3))


def test_wrappers_are_looked_through_to_the_innermost_optimizer() -> None:
    muon = Muon([weight()])
    for wrapped in (muon, SNOO(muon), Delegating(muon), Delegating(SNOO(muon))):
        assert innermost(wrapped) is muon
        assert class_name_of(wrapped) == "Muon"
        assert isinstance(wrapped, WrapsOptimizer) == (wrapped is not muon)


def test_an_outer_optimizer_of_the_users_own_sets_the_interval_of_plans() -> None:
    model = network()
    optimizer = SlowWeights(model.parameters(), lr=0.01)
    session = attach(model, optimizer)
    assert " plan_interval_steps=3 " in session.describe()
    train(session, until=4)
    assert optimizer.num_steps == 1
    check_boundaries([optimizer], optimizer_step=4)
    with pytest.raises(InvalidInputError, match="SlowWeights, whose outer steps come every 3, has counted 1"):
        check_boundaries([optimizer], optimizer_step=5)
    with pytest.raises(InvalidInputError, match="SlowWeights has no count_skipped_step"):
        count_skipped_steps([optimizer], optimizer_step=5)


def test_boundaries_without_their_steps_are_refused() -> None:
    class Half(torch.optim.SGD):
        at_boundary, interval = True, 3

    with pytest.raises(InvalidInputError, match="Half has at_boundary, and its class does not define num_steps"):
        boundary_interval([Half([weight()], lr=0.1)])


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_class_of_the_users_own_is_supplied_with_halves_also_inside_a_wrapper(wrapped: bool) -> None:
    model = network()
    user = Halved(model.parameters(), lr=0.01)
    optimizer = Delegating(user) if wrapped else user
    session = attach(
        model,
        optimizer,
        policy=HoldPolicyConfig(),
        measurement_interval=Span(steps=1),
        geometries={"Halved": "euclidean"},
        learning_rate_coupling="none",
    )
    train(session, until=2)
    assert halves_user(optimizer) is user
    supplied = [differences for differences in user.supplied if differences]
    assert [differences.keys() for differences in supplied] == [set(model.parameters())] * 2


def test_abilities_are_those_of_the_object() -> None:
    plain, corrected = AdamW([weight()]), AdamW([weight()], update_bias_correction=True)
    assert halves_user(plain) is None
    assert halves_user(SNOO(plain)) is None
    assert halves_user(SNOO(corrected)) is not None
    assert isinstance(corrected, UsesHalves)
    assert isinstance(Lookahead(plain), OuterOptimizer)
    assert not isinstance(plain, OuterOptimizer)
    assert not isinstance(plain, NotifiedOfBatchChange)
    plain.on_batch_change = lambda *, global_batch_size, previous: None
    assert isinstance(plain, NotifiedOfBatchChange)
