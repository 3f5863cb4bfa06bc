"""Counterparts of parameters in the small model, and the numbers of layers in both, by names."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.examples.llama import Llama, LlamaConfig
from trainer_hooks.optim.grouping.base_model import BaseOfParameter, find_bases
from trainer_hooks.optim.grouping.parameter_groups import parameter_groups
from trainer_hooks.optim.grouping.width_transfer import base_shapes_of


def test_base_shapes_survive_json_and_need_no_memory() -> None:
    with torch.device("meta"):
        base = base_shapes_of(Llama(LlamaConfig(width=64, num_layers=2)))
    assert base["blocks.1.feed_forward.gate.weight"] == (176, 64)  # 8/3 of 64, up to a multiple of 8
    again = json.loads(json.dumps(base))
    wide = base_shapes_of(Llama(LlamaConfig(width=128, num_layers=2)))
    assert find_bases(wide, again) == find_bases(wide, base)


def test_a_deeper_model_takes_its_bases_from_the_layers_there_are() -> None:
    shapes = {f"blocks.{layer}.w": (8, 8) for layer in range(6)} | {"head": (5, 8)}
    base = {"blocks.0.w": [4, 4], "blocks.1.w": [4, 4], "head": [5, 4]}
    bases = find_bases(shapes, base)
    assert bases["blocks.5.w"] == BaseOfParameter((4, 4), depth=6, base_depth=2)
    assert bases["head"] == BaseOfParameter((5, 4), depth=1, base_depth=1)


def test_experts_and_unequal_layers_do_not_count_as_depth() -> None:
    experts = {f"layers.{layer}.experts.{number}.w": (8, 8) for layer in range(3) for number in range(4)}
    base = {f"layers.0.experts.{number}.w": (4, 4) for number in range(2)}
    assert {(row.depth, row.base_depth) for row in find_bases(experts, base).values()} == {(3, 1)}
    alone = {"experts.0.w": (8, 8), "experts.1.w": (8, 8)}
    assert find_bases(alone, {"experts.0.w": (4, 4)})["experts.1.w"] == BaseOfParameter((4, 4), 1, 1)
    # The first layer of the base is as wide as its data; that makes no stack of it.
    perceptron = {"0.weight": (8, 4), "2.weight": (8, 8), "4.weight": (8, 8)}
    base = {"0.weight": (4, 4), "2.weight": (4, 4), "4.weight": (4, 4)}
    assert {(row.depth, row.base_depth) for row in find_bases(perceptron, base).values()} == {(1, 1)}


class SequentialBlocks(nn.Module):
    """Blocks whose two matrices of other shapes hang in an nn.Sequential; in experts, too, and beside them a list."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__()

        def perceptron() -> nn.Module:
            return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def block() -> nn.Module:
            return nn.ModuleDict(
                {
                    "mlp": perceptron(),
                    "experts": nn.ModuleList(perceptron() for _ in range(num_experts)),
                    "mixers": nn.ModuleList(nn.Linear(width, width) for _ in range(3)),
                }
            )

        self.blocks = nn.ModuleList(block() for _ in range(num_layers))


@pytest.mark.parametrize(("depth", "base_depth"), [(8, 4), (4, 8), (4, 4)])
def test_lists_inside_a_layer_neither_count_as_depth_nor_hide_it(depth: int, base_depth: int) -> None:
    with torch.device("meta"):
        model, base = SequentialBlocks(16, depth, num_experts=3), SequentialBlocks(8, base_depth, num_experts=2)
    bases = find_bases(base_shapes_of(model), base_shapes_of(base))
    assert {(row.depth, row.base_depth) for row in bases.values()} == {(depth, base_depth)}
    last = f"blocks.{depth - 1}"
    shapes = {
        "mlp.0.weight": (32, 8),
        "mlp.2.weight": (8, 32),
        "experts.2.0.weight": (32, 8),
        "experts.2.2.weight": (8, 32),
        "mixers.2.weight": (8, 8),
    }
    assert {name: bases[f"{last}.{name}"].shape for name in shapes} == shapes


class Stack(nn.Module):
    """Layers under a name of their own."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_layers))


def in_a_sequence(width: int, num_layers: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(20, width), Stack(width, num_layers), nn.Linear(width, 20, bias=False))


def in_stages(width: int, num_layers: int) -> nn.Module:
    return nn.ModuleDict({"stages": nn.ModuleList(Stack(width, num_layers) for _ in range(2))})


@pytest.mark.parametrize("build", [in_a_sequence, in_stages])
@pytest.mark.parametrize(("depth", "base_depth"), [(4, 2), (2, 4), (3, 1)])
def test_a_number_before_the_layers_does_not_count_as_a_layer(
    build: Callable[[int, int], nn.Module], depth: int, base_depth: int
) -> None:
    bases = find_bases(base_shapes_of(build(16, depth)), base_shapes_of(build(8, base_depth)))
    layers = {name: row for name, row in bases.items() if ".layers." in name}
    assert len(layers) == depth * (1 if build is in_a_sequence else 2)
    assert set(layers.values()) == {BaseOfParameter((8, 8), depth, base_depth)}
    assert all(row.depth == row.base_depth for name, row in bases.items() if name not in layers)


def test_stages_of_other_widths_and_depths_have_depths_of_their_own() -> None:
    def stages(width: int, *depths: int) -> dict[str, tuple[int, ...]]:
        return {
            f"stages.{stage}.blocks.{layer}.w": (width << stage, width << stage)
            for stage, depth in enumerate(depths)
            for layer in range(depth)
        }

    bases = find_bases(stages(16, 2, 6), stages(8, 2, 2))
    assert bases["stages.0.blocks.1.w"] == BaseOfParameter((8, 8), depth=2, base_depth=2)
    assert bases["stages.1.blocks.5.w"] == BaseOfParameter((16, 16), depth=6, base_depth=2)


def test_heads_in_a_list_of_each_layer_do_not_count_as_depth() -> None:
    def heads(number: int) -> dict[str, tuple[int, ...]]:
        return {f"blocks.{layer}.heads.{head}.w": (8, 8) for layer in range(3) for head in range(number)}

    with pytest.raises(InvalidInputError, match=r"several to choose from: blocks.0.heads.2.w"):
        find_bases(heads(4), heads(2))


def test_the_rate_of_a_perceptron_inside_a_block_follows_the_depth() -> None:
    model, base = SequentialBlocks(8, 6, num_experts=1), SequentialBlocks(8, 2, num_experts=1)
    groups = parameter_groups(model, hidden=torch.optim.SGD, base_shapes=base)
    # SGD: N dout / din, three times the layers at the same width.
    assert {row.learning_rate_multiplier for row in groups.groups if row.role in ("linear", "expert")} == {3.0}


def test_find_bases_names_a_parameter_without_a_base() -> None:
    with pytest.raises(InvalidInputError, match=r"no shape for 1 parameters.*: extra"):
        find_bases({"w": (2, 2), "extra": (2,)}, {"w": (2, 2)})
    with pytest.raises(InvalidInputError, match=r"several to choose from: 4.weight"):
        find_bases(
            {"0.weight": (8, 4), "2.weight": (8, 8), "4.weight": (8, 8)}, {"0.weight": (4, 3), "2.weight": (4, 4)}
        )
    with pytest.raises(InvalidInputError, match="not of one kind"):
        find_bases({"w": (2, 2)}, {"w": (2,)})
