"""The norm that a parameter is measured in is the one that its optimizer descends in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainer_hooks.measurement.groups import find_groups
from trainer_hooks.optim import ASGO, SOAP, EShampoo, Muon, Scion, Shampoo, SignSGD, Signum, SpecSGD
from trainer_hooks.optim.grouping.parameter_groups import parameter_groups


def test_scions_groups_are_measured_by_their_norms() -> None:
    model = nn.ModuleDict(
        {"table": nn.Embedding(8, 4), "inner": nn.Linear(4, 6), "onehot": nn.Linear(4, 4, bias=False)}
        | {"last": nn.Linear(6, 8, bias=False)}
    )
    norms = {"table.weight": "row", "inner.weight": "spectral", "inner.bias": "bias_rms"}
    norms |= {"onehot.weight": "column", "last.weight": "sign"}
    parameters = dict(model.named_parameters())
    optimizer = Scion([{"params": [parameters[name]], "norm": norm} for name, norm in norms.items()])
    found = {group.geometry: set(map(id, group.parameters)) for group in find_groups(model, [optimizer])}
    spectral = {id(model["inner"].weight)}
    assert found == {"spectral": spectral, "sign": set(map(id, parameters.values())) - spectral}
    overruled = find_groups(model, [optimizer], geometries={"Scion": "euclidean"})
    assert [group.geometry for group in overruled] == ["euclidean"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {}) for kind in (Muon, SpecSGD, Shampoo, EShampoo, SOAP, ASGO, Signum, SignSGD)],
        *[(Scion, {"norm": norm}) for norm in ("spectral", "sign", "row", "column")],
        *[(kind, {}) for kind in (torch.optim.AdamW, torch.optim.RAdam, torch.optim.SGD)],
    ],
)
def test_what_is_measured_is_what_parameter_groups_says(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model = nn.Linear(3, 2, bias=False)
    groups = parameter_groups(model, hidden=kind, hidden_options=options)
    (measured,) = find_groups(model, groups.optimizers)
    assert measured.geometry == groups.groups[0].geometry
