"""Roles of parameters in models whose parts are known by construction."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.examples.llama import Llama, LlamaConfig
from trainer_hooks.optim.grouping.roles import check_ownership, find_roles, folded_names, overruled

LLAMA_ROLES = {
    "embedding.weight": "embedding",
    "blocks.0.attention_norm.weight": "norm",
    "blocks.0.attention.query.weight": "linear",
    "blocks.0.attention.key.weight": "linear",
    "blocks.0.attention.value.weight": "linear",
    "blocks.0.attention.out.weight": "linear",
    "blocks.0.feed_forward_norm.weight": "norm",
    "blocks.0.feed_forward.gate.weight": "linear",
    "blocks.0.feed_forward.up.weight": "linear",
    "blocks.0.feed_forward.down.weight": "linear",
    "norm.weight": "norm",
    "head.weight": "head",
}


def roles_of(model: nn.Module, **options: dict[str, tuple[int, ...]]) -> dict[str, str]:
    return {row.name: row.role for row in find_roles(model, **options)}


def compiled(model: nn.Module) -> nn.Module:
    """The wrapper alone; inductor, the default backend, warns of its own imports."""
    wrapped: nn.Module = torch.compile(model, backend="eager")
    return wrapped


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("width", [32, 256])
def test_a_llama_is_sorted_even_where_its_width_is_its_vocabulary(width: int) -> None:
    with torch.device("meta"):
        model = Llama(LlamaConfig(width=width, num_layers=1))
    assert roles_of(model) == LLAMA_ROLES


def test_wrappers_change_neither_names_nor_roles(one_rank: None) -> None:
    config = LlamaConfig(width=16, num_layers=1)
    assert roles_of(compiled(DistributedDataParallel(Llama(config)))) == LLAMA_ROLES
    assert roles_of(DistributedDataParallel(compiled(Llama(config)))) == LLAMA_ROLES
    inside = Llama(config)
    inside.blocks[0] = compiled(inside.blocks[0])
    assert roles_of(inside) == LLAMA_ROLES


def test_sharded_parameters_have_the_roles_of_whole_ones(one_rank: None) -> None:
    model = Llama(LlamaConfig(width=16, num_layers=1))
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.blocks[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert roles_of(model) == LLAMA_ROLES


def test_a_module_of_the_users_own_called_module_keeps_its_name() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(3, 3)

    assert list(roles_of(Outer())) == ["module.weight", "module.bias"]


def test_a_transformer_encoder_layer_is_sorted() -> None:
    rows = find_roles(nn.TransformerEncoderLayer(32, 4, 64))
    assert {row.name: row.role for row in rows} == {
        "self_attn.in_proj_weight": "qkv",
        "self_attn.in_proj_bias": "bias",
        "self_attn.out_proj.weight": "linear",
        "self_attn.out_proj.bias": "bias",
        "linear1.weight": "linear",
        "linear1.bias": "bias",
        "linear2.weight": "linear",
        "linear2.bias": "bias",
        "norm1.weight": "norm",
        "norm1.bias": "norm",
        "norm2.weight": "norm",
        "norm2.bias": "norm",
    }
    assert rows[0].split_sizes == (32, 32, 32)


def test_attention_with_other_key_sizes_is_not_fused() -> None:
    attention = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, add_bias_kv=True)
    assert roles_of(attention) == {
        "q_proj_weight": "linear",
        "k_proj_weight": "linear",
        "v_proj_weight": "linear",
        "in_proj_bias": "bias",
        "bias_k": "bias",
        "bias_v": "bias",
        "out_proj.weight": "linear",
        "out_proj.bias": "bias",
    }


def test_a_convolutional_net_is_sorted() -> None:
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 8, 3))
    model.add_module("norm", nn.BatchNorm2d(8))
    model.add_module("depthwise", nn.Conv2d(8, 8, 3, groups=8, bias=False))
    model.add_module("up", nn.ConvTranspose2d(8, 8, 2, bias=False))
    model.add_module("fc", nn.Linear(8, 10))
    assert roles_of(model) == {
        "stem.weight": "conv",
        "stem.bias": "bias",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "depthwise.weight": "grouped_conv",
        "up.weight": "transposed_conv",
        "fc.weight": "head",
        "fc.bias": "bias",
    }


class Mixture(nn.Module):
    """Experts stacked and experts in a list, beside bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.gate_up = nn.Parameter(torch.zeros(4, 32, 8))
        self.gate_up_bias = nn.Parameter(torch.zeros(4, 32))
        self.experts = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.mixing = nn.Parameter(torch.zeros(8, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 10, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.layer_scale = nn.Parameter(torch.zeros(8, 1, 1))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(49, 2))
        self.grid = nn.Parameter(torch.zeros(2, 3, 4, 5))


def test_experts_and_bare_parameters_are_sorted() -> None:
    assert roles_of(Mixture()) == {
        "router.weight": "linear",
        "gate_up": "expert",
        "gate_up_bias": "bias",
        "experts.0.weight": "expert",
        "experts.0.bias": "bias",
        "experts.1.weight": "expert",
        "experts.1.bias": "bias",
        "mixing": "matrix",
        "pos_embed": "embedding",
        "cls_token": "vector",
        "layer_scale": "vector",
        "temperature": "scalar",
        "relative_position_bias_table": "embedding",
        "grid": "tensor",
    }


def test_the_name_of_its_class_makes_a_module_a_norm() -> None:
    class OurRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    assert roles_of(nn.Sequential(OurRMSNorm())) == {"0.weight": "norm"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.hidden = nn.Linear(8, 8, bias=False)
        self.decoder = nn.Linear(8, 50, bias=False)
        self.decoder.weight = self.embedding.weight


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_appear_once(device: str) -> None:
    with torch.device(device):
        model = Tied()
    assert roles_of(model) == {"embedding.weight": "tied", "hidden.weight": "linear"}


def test_the_shape_of_the_embedding_reveals_a_head_without_a_name() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 8)
            self.to_words = nn.Linear(8, 50)
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 50)])

    roles = roles_of(Plain())
    assert roles["to_words.weight"] == "head"
    assert roles["layers.1.weight"] == "linear"
    sequence = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    assert roles_of(sequence)["1.weight"] == "linear"
    assert roles_of(sequence)["2.weight"] == "head"


def test_the_last_layer_under_a_top_name_is_the_head() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleDict({"output": nn.Linear(8, 8)})
            self.classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    expected = {"encoder.output.weight": "linear", "classifier.0.weight": "linear", "classifier.2.weight": "head"}
    roles = roles_of(Net())
    assert {name: roles[name] for name in expected} == expected
    wrapped = roles_of(nn.ModuleDict({"model": Net()}))
    assert {name: wrapped[f"model.{name}"] for name in expected} == expected


class Attention(nn.Module):
    def __init__(self, rows: int, name: str = "qkv") -> None:
        super().__init__()
        self.add_module(name, nn.Linear(16, rows, bias=False))


@pytest.mark.parametrize("name", ["qkv", "Wqkv", "qkv_proj", "c_attn", "in_proj", "to_qkv"])
def test_a_fused_projection_of_three_times_its_columns_falls_into_thirds(name: str) -> None:
    (row,) = find_roles(Attention(48, name))
    assert (row.role, row.split_sizes) == ("qkv", (16, 16, 16))


def test_grouped_heads_are_split_as_the_caller_says() -> None:
    assert find_roles(Attention(24))[0].split_sizes is None  # a third would cut through the queries
    (row,) = find_roles(Attention(24), fused={"qkv": (16, 4, 4)})
    assert (row.role, row.split_sizes) == ("qkv", (16, 4, 4))
    (row,) = find_roles(Attention(64, "in_proj"))
    assert (row.role, row.split_sizes) == ("linear", None)  # as in state-space layers


def test_the_error_names_wrong_sizes_and_patterns() -> None:
    with pytest.raises(InvalidInputError, match=r"qkv.weight has shape \(24, 16\).*\(16, 4\)"):
        find_roles(Attention(24), fused={"qkv": (16, 4)})
    with pytest.raises(InvalidInputError, match=r"'kqv' is found in no parameter's name; they begin with qkv.weight"):
        find_roles(Attention(24), fused={"kqv": (16, 4, 4)})
    with pytest.raises(InvalidInputError, match="not a regular expression"):
        find_roles(Attention(24), fused={"(": (16, 4, 4)})


def test_find_roles_refuses_a_parameter_without_a_shape() -> None:
    with pytest.raises(InvalidInputError, match=r"0.weight has no shape yet: run the model on one batch"):
        find_roles(nn.Sequential(nn.LazyLinear(4)))


def test_every_parameter_of_a_model_has_one_role_in_the_models_order() -> None:
    for model in (Mixture(), Tied(), nn.TransformerDecoderLayer(16, 2, 32), nn.LSTM(8, 8)):
        assert [row.name for row in find_roles(model)] == [name for name, _ in model.named_parameters()]


def test_a_module_that_holds_its_parent_does_not_recurse_forever() -> None:
    parent, child = nn.Module(), nn.Linear(2, 2, bias=False)
    parent.child, child.parent = child, parent
    assert roles_of(parent) == {"child.weight": "linear"}


def test_a_fused_matrix_that_is_called_something_else_is_one_matrix() -> None:
    rows, words = overruled(find_roles(Attention(48)), {"qkv": "linear"})
    assert [(row.role, row.split_sizes) for row in rows] == [("linear", None)]
    assert words == {"qkv.weight": "linear"}


def test_ownership_names_lost_and_doubled_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model)
    check_ownership(model, [first, second])
    with pytest.raises(InvalidInputError, match=r"no optimizer takes 2 trained parameters: 1.weight, 1.bias\."):
        check_ownership(model, [first])
    with pytest.raises(InvalidInputError, match=r"2 parameters are in two parameter groups: 0.weight \(SGD, SGD\)"):
        check_ownership(model, [first, second, torch.optim.SGD(model[0].parameters(), lr=0.1)])
    model[1].requires_grad_(False)
    check_ownership(model, [first])


def test_check_ownership_finds_parameters_replaced_after_construction() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(InvalidInputError, match="hold 1 tensors that are not the model's: was it changed afterwards"):
        check_ownership(model, [optimizer])


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.0.w", "a.1.w", "a.2.w"], ["a.0-2.w"]),
        (["a.0.w", "a.2.w", "a.3.w"], ["a.0,2-3.w"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.0-1.b.0-1"]),
        (["a.0.b.0", "a.1.b.1"], ["a.0.b.0", "a.1.b.1"]),
        (["norm1.w"], ["norm1.w"]),
    ],
)
def test_numbered_names_fold_into_ranges(names: list[str], folded: list[str]) -> None:
    assert folded_names(names) == folded


def test_words_for_matrices_leave_the_biases_beside_them_alone() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(8, 12), "out": nn.Linear(8, 8)})
    rows = {row.name: row for row in find_roles(model, fused={"qkv": (8, 2, 2)})}
    assert (rows["qkv.weight"].role, rows["qkv.weight"].split_sizes) == ("qkv", (8, 2, 2))
    assert rows["qkv.bias"].role == "bias"
    overruled_rows, _ = overruled(find_roles(model), {"out": "matrix"})
    assert {row.name: row.role for row in overruled_rows if row.name.startswith("out")} == {
        "out.weight": "matrix",
        "out.bias": "bias",
    }
