"""Roles that do not follow from types: classes of the user's own, parametrized weights, recurrent gates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from trainer_hooks.optim.grouping.roles import find_roles


def roles_of(model: nn.Module) -> dict[str, str]:
    return {row.name: row.role for row in find_roles(model)}


class Own(nn.Module):
    """A weight in a class without a known base."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))


class ParallelEmbedding(Own):
    """The embedding of Llama's own code."""


class ColumnParallelLinear(Own):
    """The linear layer of Llama's own code."""


class LlamaLike(nn.Module):
    """Names and classes of Llama's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = ParallelEmbedding(50, 8)
        attention = nn.ModuleDict({name: ColumnParallelLinear(8, 8) for name in ("wq", "wk", "wv", "wo")})
        self.layers = nn.ModuleList([nn.ModuleDict({"attention": attention, "w_pos": ColumnParallelLinear(8, 8)})])
        self.output = ColumnParallelLinear(50, 8)


def test_a_llama_of_parallel_layers_is_sorted() -> None:
    assert roles_of(LlamaLike()) == {
        "tok_embeddings.weight": "embedding",
        **{f"layers.0.attention.{name}.weight": "linear" for name in ("wq", "wk", "wv", "wo")},
        "layers.0.w_pos.weight": "linear",  # its class is known, so its name is not asked
        "output.weight": "head",
    }


def test_tied_weights_of_parallel_layers_appear_once() -> None:
    model = LlamaLike()
    model.output.weight = model.tok_embeddings.weight
    assert roles_of(model)["tok_embeddings.weight"] == "tied"
    assert "output.weight" not in roles_of(model)


def test_names_of_modules_give_roles_to_weights_of_unknown_classes() -> None:
    model = nn.ModuleDict(
        {
            "wte": Own(50, 8),
            "codes_embed": nn.ModuleList([Own(20, 8), Own(20, 8)]),
            "blocks": nn.ModuleList([nn.ModuleDict({"qkv": Own(24, 8), "proj": Own(8, 8), "output": Own(8, 8)})]),
            "experts": nn.ModuleList([Own(8, 8)]),
            "lm_head": Own(50, 8),
        }
    )
    assert roles_of(model) == {
        "wte.weight": "embedding",
        "codes_embed.0.weight": "embedding",
        "codes_embed.1.weight": "embedding",
        "blocks.0.qkv.weight": "qkv",
        "blocks.0.proj.weight": "matrix",
        "blocks.0.output.weight": "matrix",
        "experts.0.weight": "expert",
        "lm_head.weight": "head",
    }


def test_the_shape_of_the_embedding_reveals_a_head_of_an_unknown_class() -> None:
    model = nn.ModuleDict({"embed_in": Own(50, 8), "mix": Own(8, 8), "to_words": Own(50, 8)})
    assert roles_of(model) == {"embed_in.weight": "embedding", "mix.weight": "matrix", "to_words.weight": "head"}
    model["embed_out"] = model.pop("to_words")  # GPT-NeoX calls it so
    assert roles_of(model)["embed_out.weight"] == "head"


@pytest.mark.parametrize("name", ["token_mixer", "pos_proj", "token_proj", "embed_proj", "embed_mixer"])
def test_a_matrix_that_works_on_tokens_is_not_an_embedding(name: str) -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({name: Own(8, 8)})]), "lm_head": Own(50, 8)})
    assert roles_of(model) == {f"blocks.0.{name}.weight": "matrix", "lm_head.weight": "head"}


@pytest.mark.parametrize("name", ["wpe", "tok_emb", "embed_tokens", "embed_in", "abs_pos", "embeddings", "embed_1"])
def test_tables_of_unknown_classes_are_embeddings(name: str) -> None:
    assert roles_of(nn.ModuleDict({name: Own(50, 8)})) == {f"{name}.weight": "embedding"}


def test_a_square_table_of_positions_makes_nothing_the_head() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(8, 8, bias=False), "out": nn.Linear(8, 10, bias=False)})
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(8, 8)))
    assert roles_of(model) == {"pos_embed": "embedding", "proj.weight": "linear", "out.weight": "linear"}
    model = nn.ModuleDict({"position_embeddings": nn.Embedding(8, 8), "proj": nn.Linear(8, 8, bias=False)})
    assert roles_of(model) == {"position_embeddings.weight": "embedding", "proj.weight": "linear"}


@pytest.mark.parametrize("name", ["wte", "tok_emb", "embed_tokens", "word_embeddings", "embed"])
def test_a_bare_table_of_tokens_reveals_the_head(name: str) -> None:
    model = nn.ModuleDict({"mix": nn.Linear(8, 8, bias=False), "to_words": nn.Linear(8, 50, bias=False)})
    model.register_parameter(name, nn.Parameter(torch.zeros(50, 8)))
    assert roles_of(model) == {name: "embedding", "mix.weight": "linear", "to_words.weight": "head"}


@pytest.mark.parametrize("name", ["qkv_w", "qkv_weight", "W_qkv", "in_proj_weight", "c_attn_weight"])
def test_the_name_of_a_bare_fused_projection_gives_its_role(name: str) -> None:
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.zeros(24, 8)))
    (row,) = find_roles(model)
    assert (row.role, row.split_sizes) == ("qkv", (8, 8, 8))


def test_names_give_bare_tables_and_heads_their_roles_at_any_depth() -> None:
    model = nn.Module()
    for name, rows in {"tok_emb": 50, "mixing": 8, "unembed_weight": 50}.items():
        model.register_parameter(name, nn.Parameter(torch.zeros(rows, 8)))
    expected = {"tok_emb": "embedding", "mixing": "matrix", "unembed_weight": "head"}
    assert roles_of(model) == expected
    assert roles_of(nn.ModuleDict({"model": model})) == {f"model.{name}": role for name, role in expected.items()}


def test_a_sequence_around_a_fused_projection_does_not_split_it() -> None:
    model = nn.ModuleDict({"to_qkv": nn.Sequential(nn.Linear(8, 24, bias=False))})
    assert roles_of(model) == {"to_qkv.0.weight": "qkv"}
    apart = nn.ModuleDict({"qkv": nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))})
    assert set(roles_of(apart).values()) == {"linear"}


def parametrized() -> nn.Module:
    parts: dict[str, nn.Module] = {
        "emb": nn.Embedding(50, 8),
        "qkv": nn.Linear(8, 24),
        "query_key_value": nn.Linear(8, 24, bias=False),
        "out": nn.Linear(8, 8, bias=False),
        "norm": nn.LayerNorm(8, bias=False),
        "conv": nn.Conv1d(4, 8, 3, bias=False),
        "head": nn.Linear(8, 50, bias=False),
    }
    return nn.ModuleDict(parts)


def test_normalized_weights_have_the_roles_of_plain_ones() -> None:
    model = parametrized()
    for part in (model[name] for name in model if name not in ("norm", "out")):
        parametrizations.weight_norm(part)
    parametrizations.orthogonal(model["out"])
    rows = {row.name.replace(".parametrizations.weight", ""): row for row in find_roles(model)}
    assert {name: row.role for name, row in rows.items()} == {
        "emb.original0": "vector",
        "emb.original1": "embedding",
        "qkv.bias": "bias",
        "qkv.original0": "vector",
        "qkv.original1": "qkv",
        "query_key_value.original0": "vector",
        "query_key_value.original1": "qkv",
        "out.original": "linear",
        "norm.weight": "norm",
        "conv.original0": "vector",
        "conv.original1": "conv",
        "head.original0": "vector",
        "head.original1": "head",
    }
    assert rows["qkv.original1"].split_sizes == (8, 8, 8)
    assert rows["query_key_value.original1"].split_sizes is None


def test_pruned_weights_have_the_roles_of_plain_ones() -> None:
    model = parametrized()
    for part in model.values():
        prune.identity(part, "weight")
    assert {name.removesuffix(".weight_orig"): role for name, role in roles_of(model).items()} == {
        "emb": "embedding",
        "qkv": "qkv",
        "qkv.bias": "bias",
        "query_key_value": "qkv",
        "out": "linear",
        "norm": "norm",
        "conv": "conv",
        "head": "head",
    }


def test_weights_normalized_the_old_way_have_the_roles_of_plain_ones() -> None:
    model = parametrized()
    for name in ("emb", "qkv", "conv", "head"):
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(model.get_submodule(name))
    roles = roles_of(model)
    expected = {"qkv.weight_v": "qkv", "conv.weight_v": "conv", "head.weight_v": "head", "emb.weight_v": "embedding"}
    assert {name: roles[name] for name in expected} == expected
    assert {roles[f"{name}.weight_g"] for name in ("qkv", "conv", "head")} == {"vector"}


@pytest.mark.parametrize("name", ["query_key_value", "linear_qkv"])
def test_projections_whose_rows_go_by_heads_are_not_cut_into_thirds(name: str) -> None:
    (row,) = find_roles(nn.ModuleDict({name: nn.Linear(16, 48, bias=False)}))
    assert (row.role, row.split_sizes) == ("qkv", None)


@pytest.mark.parametrize(
    ("build", "num_gates"),
    [
        (lambda: nn.LSTM(6, 8, bidirectional=True), 4),
        (lambda: nn.LSTMCell(6, 8), 4),
        (lambda: nn.GRU(6, 8, num_layers=2), 3),
        (lambda: nn.GRUCell(6, 8), 3),
        (lambda: nn.RNN(6, 8), 1),
    ],
)
def test_the_gates_of_recurrent_layers_are_matrices_of_their_own(
    build: Callable[[], nn.Module], num_gates: int
) -> None:
    rows = [row for row in find_roles(build()) if row.role != "bias"]
    sizes = (8,) * num_gates if num_gates > 1 else None
    assert [(row.role, row.split_sizes) for row in rows] == [("matrix", sizes)] * len(rows)
    assert len(rows) >= 2


def test_the_projection_of_an_lstm_is_one_matrix() -> None:
    splits = {row.name: row.split_sizes for row in find_roles(nn.LSTM(6, 8, proj_size=4, bias=False))}
    assert splits == {"weight_ih_l0": (8,) * 4, "weight_hh_l0": (8,) * 4, "weight_hr_l0": None}
