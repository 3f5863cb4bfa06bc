"""Optimizer and settings of every parameter, and the account of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.examples.llama import Llama, LlamaConfig
from trainer_hooks.examples.train_lm import build_optimizers
from trainer_hooks.optim import SNOO, SOAP, AdamW, Muon, Scion, Shampoo, Signum, SpecSGD
from trainer_hooks.optim.grouping.parameter_groups import GroupedParameter, ParameterGroups, parameter_groups
from trainer_hooks.optim.grouping.roles import check_ownership
from trainer_hooks.optim.grouping.width_transfer import base_shapes_of
from trainer_hooks.optim.known_optimizers import TransferRule


def llama(width: int = 32, num_layers: int = 2) -> Llama:
    return Llama(LlamaConfig(width=width, num_layers=num_layers))


def rows_of(groups: ParameterGroups) -> dict[str, GroupedParameter]:
    return {row.name: row for row in groups.groups}


def group_of(groups: ParameterGroups, parameter: nn.Parameter) -> dict[str, Any]:
    (only_group,) = [
        group
        for optimizer in groups.optimizers
        for group in optimizer.param_groups
        if any(parameter is other for other in group["params"])
    ]
    return only_group


def test_a_llama_is_divided_as_the_example_job_divides_it_by_hand() -> None:
    model = llama()
    ours = parameter_groups(model, hidden=Muon).optimizers
    by_hand = build_optimizers(model, "muon", 0.02)
    for own, expected in zip(ours, by_hand, strict=True):
        assert type(own) is type(expected)
        assert {p for g in own.param_groups for p in g["params"]} == {
            p for g in expected.param_groups for p in g["params"]
        }


def test_every_trained_parameter_is_owned_once() -> None:
    tied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
    tied[2].weight = tied[0].weight
    tied[1].requires_grad_(False)
    for model in (llama(), tied, nn.TransformerDecoderLayer(16, 2, 32), nn.LSTM(4, 4), nn.Conv2d(3, 4, 3)):
        check_ownership(model, parameter_groups(model, hidden=Muon).optimizers)


def test_only_matrices_decay() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    groups = parameter_groups(
        model, hidden=Muon, hidden_options={"weight_decay": 0.1}, fallback_options={"weight_decay": 0.2, "lr": 0.5}
    )
    for name, parameter in model.named_parameters():
        expected = 0.1 if parameter.ndim == 2 else 0.0
        assert group_of(groups, parameter)["weight_decay"] == rows_of(groups)[name].weight_decay == expected
    everything = parameter_groups(model, hidden=Muon, fallback_options={"weight_decay": 0.2}, no_decay=())
    assert rows_of(everything)["norm1.bias"].weight_decay == 0.2


def test_head_and_embedding_may_have_optimizers_of_their_own() -> None:
    model = llama()
    groups = parameter_groups(
        model,
        hidden=Muon,
        head=(Signum, {"lr": 0.25}),
        embedding=(torch.optim.SGD, {"lr": 0.5}),
    )
    assert [type(optimizer) for optimizer in groups.optimizers] == [Muon, Signum, torch.optim.SGD, torch.optim.AdamW]
    assert group_of(groups, model.head.weight)["lr"] == 0.25
    assert group_of(groups, model.embedding.weight)["lr"] == 0.5
    with pytest.raises(InvalidInputError, match="head= names an optimizer, and no parameter has that role"):
        parameter_groups(nn.Linear(3, 3), hidden=Muon, head=(Signum, {}))


def test_the_first_fitting_role_of_the_caller_overrules_ours() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    rows = rows_of(
        parameter_groups(
            model, hidden=Muon, roles={r"^1\.weight": "fallback", r"^2\.weight": "head", r"weight": "matrix"}
        )
    )
    assert [(rows[f"{i}.weight"].role, rows[f"{i}.weight"].optimizer) for i in range(3)] == [
        ("matrix", "Muon"),
        ("linear", "AdamW"),
        ("head", "AdamW"),
    ]
    with pytest.raises(InvalidInputError, match=r"roles \['heads'\] do not exist"):
        parameter_groups(model, hidden=Muon, roles={"weight": "heads"})  # type: ignore[dict-item]
    with pytest.raises(InvalidInputError, match=r"roles: 'wight' is found in no parameter's name"):
        parameter_groups(model, hidden=Muon, roles={"wight": "head"})
    with pytest.raises(InvalidInputError, match=r"no_decay: roles \['norms'\] do not exist"):
        parameter_groups(model, hidden=Muon, no_decay=("norms",))  # type: ignore[arg-type]


def test_frozen_parameters_are_listed_without_an_optimizer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    groups = parameter_groups(model, hidden=Muon)
    assert [row.optimizer for row in groups.groups] == [None, None, "Muon", "AdamW"]
    assert "frozen" in groups.explain().splitlines()[1]
    owned = [p for optimizer in groups.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(model[1].weight), id(model[1].bias)}
    model.requires_grad_(False)
    with pytest.raises(InvalidInputError, match="no parameter of the model is trained"):
        parameter_groups(model, hidden=Muon)


def test_tied_weights_are_stepped_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 10, bias=False))
    model[2].weight = model[0].weight
    groups = parameter_groups(model, hidden=Muon)
    assert [(row.role, row.optimizer) for row in groups.groups] == [("tied", "AdamW"), ("linear", "Muon")]


def test_a_matrix_optimizer_refuses_vectors() -> None:
    with pytest.raises(GeometryError, match=r"bias: a parameter of shape \(4,\) is not a matrix"):
        parameter_groups(nn.Linear(4, 4), hidden=Muon, roles={"bias": "hidden"})


def test_a_changed_model_gets_new_optimizers() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    first = parameter_groups(model, hidden=Muon)
    model.append(nn.Linear(4, 4))
    second = parameter_groups(model, hidden=Muon)
    assert len(first.groups) == 2
    assert len(second.groups) == 4
    assert not set(map(id, first.optimizers)) & set(map(id, second.optimizers))


def test_process_groups_go_to_optimizers_that_divide_work() -> None:
    with pytest.raises(InvalidInputError, match="Signum divides no work between ranks; leave out process_group"):
        parameter_groups(llama(), hidden=Signum, process_group=object())  # type: ignore[arg-type]


def test_geometries_are_those_that_optimizers_descend_in() -> None:
    assert {row.geometry for row in parameter_groups(llama(), hidden=Muon).groups} == {"spectral", "sign"}
    kinds = {torch.optim.SGD: "euclidean", torch.optim.RAdam: "sign", Signum: "sign", Muon: "spectral"}
    for kind, geometry in kinds.items():
        (row,) = parameter_groups(nn.Linear(2, 2, bias=False), hidden=kind).groups
        assert row.geometry == geometry
    (unknown,) = parameter_groups(nn.Linear(2, 2, bias=False), hidden=torch.optim.Adagrad).groups
    assert unknown.geometry is None


def test_transfer_scales_rates_decay_and_epsilons() -> None:
    model = llama(width=128)
    groups = parameter_groups(
        model,
        hidden=Muon,
        hidden_options={"lr": 0.02, "weight_decay": 0.1, "scale": "none"},
        fallback_options={"lr": 0.001, "weight_decay": 0.1, "eps": 1e-8},
        base_shapes=llama(width=32),
    )
    rows = rows_of(groups)
    square = rows["blocks.0.attention.query.weight"]
    assert square.learning_rate_multiplier == 1.0
    assert square.weight_decay == pytest.approx(0.1 / 4)
    # 344 of 88 rows, 128 of 32 columns: 8/3 of the width, up to a multiple of 8.
    gate = group_of(groups, model.blocks[0].feed_forward.gate.weight)
    assert gate["lr"] == pytest.approx(0.02 * ((344 / 88) / 4) ** 0.5, rel=1e-9)
    assert gate["lr"] * gate["weight_decay"] == pytest.approx(0.02 * 0.1 / 4, rel=1e-9)
    head = group_of(groups, model.head.weight)
    assert head["lr"] == pytest.approx(0.001 / 4)
    assert head["lr"] * head["weight_decay"] == pytest.approx(0.001 * 0.1 / 4)
    assert head["eps"] == 1e-8  # its outputs are the vocabulary
    embedding = group_of(groups, model.embedding.weight)
    assert (embedding["lr"], embedding["eps"]) == (0.001, pytest.approx(1e-8 / 4))
    assert embedding["weight_decay"] == pytest.approx(0.1 / 4)
    assert group_of(groups, model.norm.weight)["lr"] == 0.001


def test_equal_rates_stay_in_one_group_whatever_their_last_bits() -> None:
    model, base = (
        nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in shapes))
        for shapes in (((36, 96), (96, 200), (200, 56)), ((20, 12), (12, 44), (44, 28)))
    )
    groups = parameter_groups(model, hidden=Muon, hidden_options={"scale": "spectral"}, base_shapes=base)
    assert [row.learning_rate_multiplier for row in groups.groups] == [1.0, 1.0, 1.0]
    assert len(groups.optimizers[0].param_groups) == 1


def test_the_base_itself_is_left_as_it_is() -> None:
    options = {"hidden": Muon, "fallback_options": {"weight_decay": 0.1}}
    plain = parameter_groups(llama(), **options)  # type: ignore[arg-type]
    carried = parameter_groups(llama(), base_shapes=base_shapes_of(llama()), **options)  # type: ignore[arg-type]
    assert carried.groups == plain.groups


def test_heads_transfer_at_their_own_width() -> None:
    # Eight heads of width 4 for two: outputs of a head stay, inputs grow 4 x.
    model, base = (nn.ModuleDict({"query": nn.Linear(width, width, bias=False)}) for width in (32, 8))
    groups = parameter_groups(model, hidden=Muon, num_heads={"query": 8}, base_shapes=base)
    assert groups.groups[0].learning_rate_multiplier == pytest.approx(0.5)
    with pytest.raises(
        InvalidInputError, match=r"query.weight: heads of 16 rows do not fit into the base shape \(8, 8\)"
    ):
        parameter_groups(model, hidden=Muon, num_heads={"query": 2}, base_shapes=base)


def test_transfer_needs_a_rule_for_every_optimizer() -> None:
    model, base = nn.Linear(8, 8, bias=False), nn.Linear(4, 4, bias=False)
    with pytest.raises(
        InvalidInputError, match=r"weight: no rule is known .* Adagrad follow the width.*transfer=\{'Adagrad': Tr"
    ):
        parameter_groups(model, hidden=torch.optim.Adagrad, base_shapes=base)
    rules = {"Adagrad": TransferRule("adam")}
    groups = parameter_groups(model, hidden=torch.optim.Adagrad, base_shapes=base, transfer=rules)
    assert groups.groups[0].learning_rate_multiplier == 0.5
    with pytest.raises(InvalidInputError, match="needs base_shapes= to start from"):
        parameter_groups(model, hidden=torch.optim.Adagrad, transfer=rules)
    with pytest.raises(InvalidInputError, match="weight: rms_match and transfer over width exclude each other"):
        parameter_groups(
            model, hidden=torch.optim.Muon, hidden_options={"adjust_lr_fn": "match_rms_adamw"}, base_shapes=base
        )


@pytest.mark.parametrize(
    ("kind", "options", "rate", "epsilon"),
    [
        # From 32 x 32 to 64 x 256: dout 2, din 8.
        (Shampoo, {"grafting": "adam"}, 1 / 8, ("grafting_epsilon", 1e-8 / 2)),
        (Shampoo, {"grafting": "none"}, 1 / 2, ("epsilon", 1e-6)),  # relative
        (Shampoo, {"grafting": "none", "exponent": 0.5}, 1.0, ("epsilon", 1e-6)),
        (Shampoo, {"grafting": "none", "max_preconditioner_dim": 32}, 1 / 8, ("epsilon", 1e-6)),  # 2 x 8 blocks
        (SOAP, {}, 1 / 2, ("epsilon", 1e-8 * 2)),
        (SOAP, {"max_preconditioner_dim": 20}, 1 / 8, ("epsilon", 1e-8 / 2)),  # neither side rotated: Adam
    ],
)
def test_rules_read_an_optimizers_own_settings(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], rate: float, epsilon: tuple[str, float]
) -> None:
    model, base = nn.Linear(256, 64, bias=False), nn.Linear(32, 32, bias=False)
    groups = parameter_groups(model, hidden=kind, hidden_options=options, base_shapes=base)
    assert groups.groups[0].learning_rate_multiplier == pytest.approx(rate)
    name, value = epsilon
    assert groups.optimizers[0].param_groups[0][name] == pytest.approx(value)


def scion_everywhere(model: nn.Module, base: nn.Module | None = None) -> ParameterGroups:
    return parameter_groups(
        model,
        hidden=Scion,
        hidden_options={"scale": 50.0},
        head=(Scion, {"norm": "sign", "scale": 3000.0}),
        embedding=(Scion, {"norm": "row"}),
        fallback=Scion,
        fallback_options={"norm": "bias_rms", "weight_decay": 0.0},
        base_shapes=base,
    )


def test_scion_takes_every_role_in_a_norm_of_its_own_and_needs_no_transfer() -> None:
    plain, carried = scion_everywhere(llama(64)), scion_everywhere(llama(64), llama(32))
    assert carried.groups == plain.groups
    norms = [(row.optimizer, row.update_scale) for row in plain.groups if row.name in ("head.weight", "norm.weight")]
    assert norms == [("Scion", "-")] * 2
    assert rows_of(plain)["blocks.0.feed_forward.gate.weight"].update_scale == "spectral 1.66"  # sqrt(176 / 64)
    assert {row.weight_decay for row in plain.groups if row.role != "norm"} == {1.0}


def test_spectral_descent_by_the_nuclear_norm_has_no_rule() -> None:
    model, base = nn.Linear(8, 8, bias=False), nn.Linear(4, 4, bias=False)
    groups = parameter_groups(model, hidden=SpecSGD, base_shapes=base)
    assert groups.groups[0].learning_rate_multiplier == 1.0
    with pytest.raises(InvalidInputError, match="settings of this SpecSGD follow the width"):
        parameter_groups(model, hidden=SpecSGD, hidden_options={"scale_by_nuclear_norm": True}, base_shapes=base)


def test_shampoo_without_a_transfer_rule_refuses_base_shapes() -> None:
    model, base = nn.Linear(8, 8, bias=False), nn.Linear(4, 4, bias=False)
    whitened = {"factors": "kl", "exponent": 0.5, "grafting": "none"}
    with pytest.raises(InvalidInputError, match="no rule is known by which settings of this Shampoo"):
        parameter_groups(model, hidden=Shampoo, hidden_options=whitened, base_shapes=base)
    with pytest.raises(InvalidInputError, match="rms_match and transfer over width exclude each other"):
        parameter_groups(model, hidden=Shampoo, hidden_options={"grafting": "rms_match"}, base_shapes=base)


def test_independent_decay_is_not_divided_by_the_rate_again() -> None:
    model, base = nn.Linear(8, 8, bias=False), nn.Linear(4, 4, bias=False)
    options = {"weight_decay": 0.1, "decay": "independent"}
    groups = parameter_groups(model, hidden=Signum, hidden_options=options, base_shapes=base)
    assert groups.groups[0].learning_rate_multiplier == 0.5
    assert groups.groups[0].weight_decay == pytest.approx(0.05)


def test_the_account_has_a_line_per_parameter_or_per_stack_of_layers() -> None:
    model = llama(width=32, num_layers=3)
    groups = parameter_groups(model, hidden=Muon, hidden_options={"scale": "rms_match", "weight_decay": 0.1})
    lines = groups.explain().splitlines()
    assert len(lines) == 1 + len(list(model.parameters()))
    (down,) = [line for line in lines if line.startswith("blocks.2.feed_forward.down.weight ")]
    # 0.2 sqrt(88) = 1.876
    for cell in ("32 x 88", "linear", "Muon", "spectral", "rms_match 0.2*sqrt(88)=1.88", "x 1", "0.1"):
        assert f"  {cell}" in down
    folded = groups.explain(fold=True).splitlines()
    assert len(folded) == 1 + 3 + 9  # embedding, norm, head, and the nine of a block
    assert any(line.startswith("blocks.0-2.attention.query.weight ") for line in folded)


def test_layers_that_are_treated_differently_are_not_folded_together() -> None:
    model = llama(num_layers=4)
    model.blocks[1].attention.query.weight.requires_grad_(False)
    names = [line.split()[0] for line in parameter_groups(model, hidden=Muon).explain(fold=True).splitlines()]
    assert "blocks.0,2-3.attention.query.weight" in names
    assert "blocks.1.attention.query.weight" in names
    assert "blocks.0-3.attention.key.weight" in names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hidden": "Muon"}, "hidden= takes an optimizer's class"),
        ({"hidden": SNOO}, "goes around optimizers"),
        ({"hidden": Muon, "head": AdamW}, "head= takes"),
        ({"hidden": Muon, "embedding": (AdamW,)}, "takes an optimizer's class"),
    ],
)
def test_the_error_names_the_argument_that_is_not_an_optimizer_class(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(words)):
        parameter_groups(nn.Linear(4, 4), **arguments)


def test_parameter_groups_takes_a_model_and_not_its_parameters() -> None:
    with pytest.raises(InvalidInputError, match="takes the model itself, got generator"):
        parameter_groups(nn.Linear(4, 4).parameters(), hidden=Muon)  # type: ignore[arg-type]
