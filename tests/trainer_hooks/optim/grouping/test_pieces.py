"""Parameters of several matrices: fused projections, heads, gates, stacks; what is cut, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.optim import Muon, Signum, SpecSGD
from trainer_hooks.optim.grouping.parameter_groups import GroupedParameter, ParameterGroups, parameter_groups


def rows_of(groups: ParameterGroups) -> dict[str, GroupedParameter]:
    return {row.name: row for row in groups.groups}


class GroupedQuery(nn.Module):
    """Four query heads of width 4, and one head of keys and of values."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, width + 8, bias=False)
        self.out = nn.Linear(width, width, bias=False)


def step_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.Tensor:
    """The update for a random gradient."""
    before = parameter.detach().clone()
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    return parameter.detach() - before


def test_grouped_heads_are_orthogonalized_one_by_one_only_on_request() -> None:
    with pytest.raises(
        InvalidInputError, match=r"qkv.weight: it counts as a fused projection.*24 rows of 16 columns do not say"
    ):
        parameter_groups(GroupedQuery(), hidden=Muon)
    options = {"lr": 1.0, "dtype": None}
    sizes = {}
    for case, settings in {
        "whole": {"roles": {"qkv": "hidden"}},
        "fused": {"fused": {"qkv": (16, 4, 4)}},
        "heads": {"fused": {"qkv": (16, 4, 4)}, "num_heads": {"qkv": 4}},
    }.items():
        model = GroupedQuery()
        groups = parameter_groups(model, hidden=Muon, hidden_options=options, **settings)  # type: ignore[arg-type]
        sizes[case] = rows_of(groups)["qkv.weight"].num_matrices
        update = step_of(groups.optimizers[0], model.qkv.weight)
        # Orthogonal rows of length 1 in each piece, to the width of Muon's band of singular values [0.68, 1.2].
        for rows in {"whole": (), "fused": (16, 4, 4), "heads": (4,) * 6}[case]:
            piece, update = update[:rows], update[rows:]
            assert torch.linalg.matrix_norm(piece, ord=-2) > 0.6
            assert torch.linalg.matrix_norm(piece, ord=2) < 1.3
    assert sizes == {"whole": 1, "fused": 3, "heads": 6}


def test_the_error_names_heads_that_do_not_fit() -> None:
    with pytest.raises(GeometryError, match=r"out.weight: num_heads=3 does not cut"):
        parameter_groups(GroupedQuery(), hidden=Muon, fused={"qkv": (16, 4, 4)}, num_heads={"out": 3})
    with pytest.raises(InvalidInputError, match="fused= cuts matrices into pieces, which Muon does not take"):
        parameter_groups(GroupedQuery(), hidden=torch.optim.Muon, fused={"qkv": (16, 4, 4)})


def test_elementwise_optimizers_ignore_pieces() -> None:
    groups = parameter_groups(GroupedQuery(), hidden=Signum, fused={"qkv": (16, 4, 4)}, num_heads={"qkv": 4})
    assert "split_sizes" not in groups.optimizers[0].param_groups[0]
    assert rows_of(groups)["qkv.weight"].num_matrices == 1


def test_stacked_experts_are_one_matrix_each() -> None:
    model = nn.Module()
    model.register_parameter("up", nn.Parameter(torch.zeros(3, 8, 4)))
    groups = parameter_groups(model, hidden=Muon, hidden_options={"lr": 1.0, "dtype": None})
    assert groups.optimizers[0].param_groups[0]["batched"] is True
    assert rows_of(groups)["up"].num_matrices == 3
    update = step_of(groups.optimizers[0], model.up) / 2**0.5  # Muon's own max(1, 8/4)^(1/2)
    assert bool((torch.linalg.matrix_norm(update, ord=-2) > 0.6).all())
    assert bool((torch.linalg.matrix_norm(update, ord=2) < 1.3).all())
    with pytest.raises(GeometryError, match="up: Muon takes one matrix per parameter"):
        parameter_groups(model, hidden=torch.optim.Muon)


def test_convolutions_are_matrices_unless_their_channels_are_apart() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, groups=8, bias=False))
    model.append(nn.ConvTranspose2d(8, 4, 2, bias=False))
    groups = parameter_groups(model, hidden=Muon, hidden_options={"lr": 1.0, "dtype": None})
    assert [(row.role, row.optimizer) for row in groups.groups] == [
        ("conv", "Muon"),
        ("grouped_conv", "AdamW"),
        ("transposed_conv", "AdamW"),
    ]
    update = step_of(groups.optimizers[0], model[0].weight).flatten(1)
    assert torch.linalg.matrix_norm(update, ord=-2) > 0.6
    assert torch.linalg.matrix_norm(update, ord=2) < 1.3


def head_wise(num_heads: int, width: int = 16) -> nn.Module:
    """Rows as GPT-NeoX and BLOOM order them: (heads, 3, head_dim), heads of width 4."""
    return nn.ModuleDict({"query_key_value": nn.Linear(width, 3 * 4 * num_heads, bias=False)})


INTERLEAVED: dict[str, Any] = {"roles": {"query_key_value": "linear"}}


def test_rows_that_may_be_ordered_by_heads_are_cut_only_as_the_caller_says() -> None:
    for model in (head_wise(4), head_wise(2)):
        with pytest.raises(InvalidInputError, match=re.escape("num_heads={pattern: 3 * heads}")):
            parameter_groups(model, hidden=Muon)
    for given, num_matrices in {
        "whole": (INTERLEAVED, 1),
        "contiguous": ({"fused": {"query_key_value": (16, 16, 16)}}, 3),
        "by heads": (INTERLEAVED | {"num_heads": {"query_key_value": 3 * 4}}, 12),
    }.values():
        assert parameter_groups(head_wise(4), hidden=Muon, **given).groups[0].num_matrices == num_matrices


def test_the_error_names_the_fallback_for_fused_projections_stored_by_columns() -> None:
    model = nn.Module()
    model.register_parameter("c_attn_w", nn.Parameter(torch.zeros(16, 48)))
    with pytest.raises(InvalidInputError, match="'fallback' is for weights that are stored"):
        parameter_groups(model, hidden=Muon)
    assert parameter_groups(model, hidden=Muon, roles={"c_attn": "fallback"}).groups[0].optimizer == "AdamW"


def test_three_pieces_per_head_are_q_k_and_v_of_one_head_each() -> None:
    model = head_wise(4)
    heads = {"query_key_value": 3 * 4}
    groups = parameter_groups(model, hidden=SpecSGD, hidden_options={"lr": 1.0}, num_heads=heads, **INTERLEAVED)
    weight = model.get_parameter("query_key_value.weight")
    before = weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    # (heads, q k v, head_dim, width): keys alone have a gradient, that of each head of another size.
    gradient = torch.zeros(4, 3, 4, 16)
    gradient[:, 1] = torch.randn(4, 4, 16, generator=generator) * torch.tensor([1e-3, 1.0, 10.0, 1e3])[:, None, None]
    weight.grad = gradient.reshape(48, 16)
    groups.optimizers[0].step()
    update = (weight.detach() - before).reshape(4, 3, 4, 16)
    assert not update[:, [0, 2]].any()
    # float32 rounding of weights of about 0.25 that move by at most 1; the factors are made in float64
    torch.testing.assert_close(torch.linalg.svdvals(update[:, 1]), torch.ones(4, 4), atol=1e-5, rtol=0)


def test_heads_of_three_pieces_transfer_at_the_width_of_a_head() -> None:
    # Eight heads of width 4 for four: a piece keeps its 4 rows, inputs grow 2 x, so Muon's rate falls by sqrt(2).
    groups = parameter_groups(
        head_wise(8, 32),
        hidden=Muon,
        num_heads={"query_key_value": 24},
        base_shapes=head_wise(4, 16),
        **INTERLEAVED,
    )
    assert groups.groups[0].learning_rate_multiplier == pytest.approx(0.5**0.5)


def test_gates_of_a_recurrent_layer_are_orthogonalized_one_by_one() -> None:
    model = nn.LSTM(8, 8, bias=False)
    groups = parameter_groups(model, hidden=SpecSGD, hidden_options={"lr": 1.0})
    assert [row.num_matrices for row in groups.groups] == [4, 4]
    before = model.weight_ih_l0.detach().clone()
    sizes = torch.tensor([1e-3, 1.0, 10.0, 1e3])[:, None, None]
    gradient: Tensor = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1)) * sizes
    model.weight_ih_l0.grad = gradient.reshape(32, 8)
    model.weight_hh_l0.grad = torch.zeros(32, 8)
    groups.optimizers[0].step()
    update = (model.weight_ih_l0.detach() - before).reshape(4, 8, 8)
    # float32 rounding of weights of about 0.35 that move by at most 1; the factors are made in float64
    torch.testing.assert_close(torch.linalg.svdvals(update), torch.ones(4, 8), atol=1e-5, rtol=0)
    whole = parameter_groups(nn.LSTM(8, 8, bias=False), hidden=Muon, roles={"weight": "matrix"})
    assert [row.num_matrices for row in whole.groups] == [1, 1]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.ModuleDict({"qkv": nn.Linear(16, 48, bias=False)}), "qkv.weight"),
        (nn.ModuleDict({"query_key_value": nn.Linear(16, 48, bias=False)}), "query_key_value.weight"),
        (nn.MultiheadAttention(16, 4), "in_proj_weight"),
        (nn.GRU(16, 16), "weight_ih_l0"),
    ],
)
def test_an_optimizer_of_single_matrices_takes_a_fused_one_only_on_request(model: nn.Module, name: str) -> None:
    message = re.escape(f"{name}: Muon takes one matrix per parameter, and this is several in one")
    with pytest.raises(GeometryError, match=rf"{message}.*roles=\{{pattern: 'linear'\}}"):
        parameter_groups(model, hidden=torch.optim.Muon)
    for word in ("linear", "hidden"):
        groups = parameter_groups(model, hidden=torch.optim.Muon, roles={"weight": word})  # type: ignore[dict-item]
        assert rows_of(groups)[name].optimizer == "Muon"
    entries = parameter_groups(model, hidden=torch.optim.AdamW)
    assert rows_of(entries)[name].num_matrices == 1
