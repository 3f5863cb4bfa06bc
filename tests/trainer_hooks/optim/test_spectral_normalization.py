"""Updates of a stated spectral norm, whatever the optimizer and the width."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import nn

from gns_controller.core.errors import InvalidInputError
from tests.trainer_hooks.optim.streams import gradients
from trainer_hooks.optim import ASGO, SOAP, EShampoo, Shampoo
from trainer_hooks.optim.grouping.parameter_groups import parameter_groups
from trainer_hooks.optim.grouping.width_transfer import base_shapes_of


@pytest.mark.parametrize("kind", [Shampoo, EShampoo, SOAP, ASGO])
@pytest.mark.parametrize("shape", [(12, 6), (6, 12)])
def test_every_update_has_the_spectral_norm_of_its_shape(
    kind: type[torch.optim.Optimizer], shape: tuple[int, int]
) -> None:
    parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = kind([parameter], lr=1.0, weight_decay=0.0, spectral_normalization=True)
    (drift,) = gradients(*shape, steps=1)
    norms = []
    for noise in gradients(*shape, steps=40):
        before = parameter.detach().clone()
        parameter.grad = 5 * drift + noise
        optimizer.step()
        norms.append(float(torch.linalg.matrix_norm(parameter.detach() - before, 2)))
    norm = math.sqrt(shape[0] / shape[1])
    # The power method finds the norm from below: never under, above where a new root has just turned the top direction,
    # and never by more than the Frobenius norm allows.
    settled = norms[5:]
    assert min(settled) >= norm * (1 - 1e-9)
    assert statistics.median(settled) < 1.02 * norm
    assert max(settled) < math.sqrt(min(shape)) * norm


def test_normalized_rates_need_no_multiplier_over_widths() -> None:
    def model(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 8))

    groups = parameter_groups(
        model(64),
        hidden=SOAP,
        hidden_options={"spectral_normalization": True},
        base_shapes=base_shapes_of(model(16)),
    )
    rates = {row.name: row.learning_rate_multiplier for row in groups.groups if row.optimizer == "SOAP"}
    assert rates
    assert set(rates.values()) == {1.0}


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("kind", "setting"), [(SOAP, "epsilon"), (Shampoo, "grafting_epsilon")])
def test_normalized_epsilons_follow_the_optimizers_own_rule(
    kind: type[torch.optim.Optimizer], setting: str, normalized: bool
) -> None:
    def model(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width, bias=False), nn.Linear(width, width, bias=False), nn.Linear(width, 8))

    wide = model(64)
    groups = parameter_groups(
        wide,
        hidden=kind,
        hidden_options={setting: 1e-8, "spectral_normalization": normalized},
        base_shapes=base_shapes_of(model(16)),
    )
    epsilons = {id(p): group[setting] for group in groups.optimizers[0].param_groups for p in group["params"]}
    first_epsilons = [epsilons[id(parameter)] for parameter in list(wide.parameters())[:2]]
    # Outputs, then both sides, are four times as wide. arXiv:2512.05620v2: sqrt(din / dout); 1 / dout where Adam's.
    assert first_epsilons == pytest.approx([0.5e-8, 1e-8] if kind is SOAP else [0.25e-8, 0.25e-8], rel=1e-9)


def test_spectral_normalization_refuses_blocks() -> None:
    with pytest.raises(InvalidInputError, match="max_preconditioner_dim"):
        Shampoo([nn.Parameter(torch.zeros(8, 6))], max_preconditioner_dim=4, spectral_normalization=True)
