"""The table of known optimizers, held against what the classes do, and against the tables of the documentation."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainer_hooks.optim
from gns_controller.core.errors import CouplingError, InvalidInputError
from trainer_hooks.measurement.groups import find_groups
from trainer_hooks.measurement.update_direction import direction_of
from trainer_hooks.optim import (
    ASGO,
    SNOO,
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
from trainer_hooks.optim.grouping.parameter_groups import parameter_groups
from trainer_hooks.optim.known_optimizers import KNOWN, OptimizerFacts, facts_named, facts_of
from trainer_hooks.session.optimizer_coupling import default_couplings

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

DOCS = Path(__file__).parents[3] / "docs"
OWN: dict[str, OptimizerFacts] = {
    name: value.facts for name, value in vars(trainer_hooks.optim).items() if hasattr(value, "facts")
}
ROWS = {**KNOWN, **OWN}


def default_of(*class_names: str) -> Any:
    return default_couplings({name: facts_named(name) for name in class_names})


def test_scion_groups_are_measured_by_their_norms() -> None:
    model = nn.ModuleDict(
        {"table": nn.Embedding(8, 4), "inner": nn.Linear(4, 6), "onehot": nn.Linear(4, 4, bias=False)}
        | {"last": nn.Linear(6, 8, bias=False)}
    )
    norms = {"table.weight": "row", "inner.weight": "spectral", "inner.bias": "bias_rms"}
    norms |= {"onehot.weight": "column", "last.weight": "sign"}
    parameters = dict(model.named_parameters())
    optimizer = Scion([{"params": [parameters[name]], "norm": norm} for name, norm in norms.items()])
    measured = {group.geometry: set(map(id, group.parameters)) for group in find_groups(model, [optimizer])}
    spectral = {id(model["inner"].weight)}
    assert measured == {"spectral": spectral, "sign": set(map(id, parameters.values())) - spectral}
    overruled = find_groups(model, [optimizer], geometries={"Scion": "euclidean"})
    assert [group.geometry for group in overruled] == ["euclidean"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {}) for kind in (Muon, SpecSGD, Shampoo, EShampoo, SOAP, ASGO, Signum, SignSGD)],
        *[(Scion, {"norm": norm}) for norm in ("spectral", "sign", "row", "column")],
        *[(kind, {}) for kind in (torch.optim.AdamW, torch.optim.RAdam, torch.optim.SGD)],
        *[(kind, {}) for kind in (torch.optim.RMSprop, torch.optim.Adamax)],
    ],
)
def test_measured_geometry_is_that_of_parameter_groups(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model = nn.Linear(3, 2, bias=False)
    groups = parameter_groups(model, hidden=kind, hidden_options=options)
    (measured,) = find_groups(model, groups.optimizers)
    assert measured.geometry == groups.groups[0].geometry


def test_every_sign_and_spectral_row_has_the_coupling_of_steps_that_do_not_grow() -> None:
    for name, facts in ROWS.items():
        expected = {"sign": "sqrt", "spectral": "sqrt", "euclidean": "linear"}.get(facts.geometry or "")
        assert expected in (None, facts.learning_rate_coupling), name
        assert (facts.momentum_key is None) or (facts.momentum in ("average", "sum")), name


def test_subclasses_and_wrappers_have_the_row_of_their_base() -> None:
    class Renamed(Muon):
        """A subclass that changes nothing."""

    optimizer = SNOO(Renamed([nn.Parameter(torch.ones(2, 3))]))
    assert facts_of(optimizer).geometry == "spectral"
    assert facts_of(optimizer).momentum_key == "momentum"


@pytest.mark.parametrize(
    ("norm", "geometry"),
    [
        ("Spectral", "spectral"),
        ("Auto", "spectral"),
        ("SpectralConv", "spectral"),
        ("Sign", "sign"),
        ("ColNorm", "sign"),
    ],
)
def test_groups_of_the_published_scion_have_the_geometry_of_their_norm(norm: str, geometry: str) -> None:
    assert facts_named("Scion").with_settings({"norm": norm, "momentum": 0.1}).geometry == geometry


def test_names_that_differ_in_capitals_have_one_row() -> None:
    assert facts_named("AdaMax") == facts_named("Adamax") == KNOWN["Adamax"]
    assert facts_named("AdaFactor") == KNOWN["Adafactor"]
    assert facts_named("SCION").geometry is None
    assert facts_named("Sophia") == OptimizerFacts()


@pytest.mark.parametrize("kind", [pytorch_optimizer.Muon, pytorch_optimizer.NorMuon])
def test_groups_that_muon_steps_with_adamw_are_sign(kind: type[torch.optim.Optimizer]) -> None:
    matrix, table = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4, 2))
    optimizer = kind([{"params": [matrix], "use_muon": True}, {"params": [table], "use_muon": False}])
    matrices, others = optimizer.param_groups
    assert facts_of(optimizer, matrices).geometry == "spectral"
    assert facts_of(optimizer, others).geometry == "sign"
    for parameter in (matrix, table):
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    weight, fresh, momentum = direction_of(optimizer, others, table)
    assert (weight, fresh) == (0.9, pytest.approx(0.1))
    assert momentum is optimizer.state[table]["exp_avg"]


# ---------------------------------------------------------------------------- momentum

MOMENTUM_MAKERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "torch Muon": lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.0),
    "torch Muon, plain": lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.0, nesterov=False),
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "torch SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Muon of pytorch_optimizer": lambda p: pytorch_optimizer.Muon([{"params": p, "use_muon": True}], lr=0.1),
    "NorMuon": lambda p: pytorch_optimizer.NorMuon([{"params": p, "use_muon": True}], lr=0.1),
    "SignSGD of pytorch_optimizer": lambda p: pytorch_optimizer.SignSGD(p, lr=0.1, weight_decay=0.0),
    "Muon": lambda p: Muon(p, lr=0.1, dtype=None),
    "Signum": lambda p: Signum(p, lr=0.1),
    "Scion": lambda p: Scion(p, lr=0.1, weight_decay=0.0, dtype=None),
    "SinkGD": lambda p: SinkGD(p, lr=0.1),
    "SpecSGD": lambda p: SpecSGD(p, lr=0.1),
}


@pytest.mark.parametrize("name", MOMENTUM_MAKERS)
def test_a_step_without_momentum_along_the_update_direction_is_the_step(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 6, generator=generator) for _ in range(2))

    def step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grad: Tensor) -> Tensor:
        before = parameter.detach().clone()
        parameter.grad = grad.clone()
        optimizer.step()
        return parameter.detach() - before

    parameter, twin = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(4, 6))
    optimizer, other = MOMENTUM_MAKERS[name]([parameter]), MOMENTUM_MAKERS[name]([twin])
    step(optimizer, parameter, first)
    step(other, twin, first)
    weight, fresh, momentum = direction_of(optimizer, optimizer.param_groups[0], parameter)
    direction = fresh * second + (0 if momentum is None else weight * momentum)
    # The other one has the same second moments, and its momentum is switched off.
    (group,) = other.param_groups
    group.update({key: 0.0 for key in ("momentum", "dampening") if key in group}, nesterov=False)
    torch.testing.assert_close(step(other, twin, direction), step(optimizer, parameter, second), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.NAdam([nn.Parameter(torch.zeros(2))]),
        torch.optim.RMSprop([nn.Parameter(torch.zeros(2))], momentum=0.9),
        Shampoo([nn.Parameter(torch.zeros(2, 2))]),
        torch.optim.Adagrad([nn.Parameter(torch.zeros(2))]),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_direction_of_refuses_an_unknown_momentum_and_names_the_way_out(optimizer: torch.optim.Optimizer) -> None:
    (group,) = optimizer.param_groups
    message = rf"momentum of optimizer {type(optimizer).__name__} is not known.*directions=\['gradient'\]"
    with pytest.raises(InvalidInputError, match=message):
        direction_of(optimizer, group, group["params"][0])


def test_rmsprop_without_momentum_steps_along_its_gradient() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.RMSprop([parameter])
    assert direction_of(optimizer, optimizer.param_groups[0], parameter) == (0.0, 1.0, None)


# ---------------------------------------------------------------------------- coupling


def test_optimizers_get_the_rule_that_is_sound_for_them() -> None:
    assert default_of("AdamW") == ("sqrt", {})
    assert default_of("SGD") == ("linear", {})
    assert default_of("Muon", "AdamW") == ("sqrt", {})
    assert default_of("Muon", "SGD") == ("sqrt", {"SGD": "linear"})
    assert default_of() == ("none", {})
    assert {facts.learning_rate_coupling for facts in ROWS.values()} == {"sqrt", "linear", None}


@pytest.mark.parametrize(
    ("name", "because"),
    [
        ("LBFGS", "curvature"),
        ("Adagrad", "never forgets"),
        ("DAdaptAdam", "its own learning rate"),
        ("Sophia", "no optimizer of that name"),
    ],
)
def test_default_couplings_refuse_an_unsound_rule_and_name_the_way_out(name: str, because: str) -> None:
    with pytest.raises(CouplingError, match=f"{name}.*{because}.*CouplingOptions.learning_rate='none'"):
        default_of("AdamW", name)


def test_own_averages_override_the_row_and_leave_any_other_momentum_alone() -> None:
    class Averaging(torch.optim.SGD):
        averages = ("forgetting",)

    facts = facts_of(Averaging([nn.Parameter(torch.zeros(2))], lr=0.1))
    assert (facts.averaged_settings, facts.declares_averages) == (("forgetting",), True)
    assert facts_of(AdamW([nn.Parameter(torch.zeros(2))])).averaged_settings == ("betas",)
    assert facts_of(torch.optim.AdamW([nn.Parameter(torch.zeros(2))])).declares_averages is False


# ---------------------------------------------------------------------------- documentation


def documented(page: str, pattern: str) -> list[tuple[str, str]]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(pattern, text, re.MULTILINE)


def test_every_coupling_is_on_the_page_of_policies() -> None:
    rules: dict[str, str] = {}
    for names, rule in documented("reference/couplings.md", r"^\| ([A-Z][A-Za-z, ]+) \| `([a-z]+)` \|"):
        rules |= dict.fromkeys(names.split(", "), rule)
    assert rules == {name: facts.learning_rate_coupling for name, facts in ROWS.items() if facts.learning_rate_coupling}
    [refused] = documented(
        "reference/couplings.md", r"^\| ([A-Z][A-Za-z, ]+), (and classes that are not known) \| refused"
    )
    assert refused[0].split(", ") == [
        name for name, facts in ROWS.items() if facts.no_coupling_because != OptimizerFacts.no_coupling_because
    ]


def test_every_geometry_is_in_the_guide() -> None:
    geometries: dict[str, str] = {}
    for geometry, names in documented(
        "guide/optimizers-and-couplings.md", r"^\| `(spectral|sign|euclidean)` \| (.*) \|$"
    ):
        geometries |= dict.fromkeys(re.findall(r"`([A-Z]\w*)`", names), geometry)
    assert geometries == {name: facts.geometry for name, facts in ROWS.items() if facts.geometry}
