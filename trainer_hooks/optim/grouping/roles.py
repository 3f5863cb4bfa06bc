"""Roles of a model's parameters: by the type of the module first, by its name second.

Reads types, names and shapes only, so sharded, compiled and meta models are answered like plain ones.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import nn

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.optim.grouping.module_tree import ParameterLocation, locations_of

Role = Literal[
    "linear",
    "qkv",
    "embedding",
    "head",
    "tied",
    "conv",
    "grouped_conv",
    "transposed_conv",
    "norm",
    "bias",
    "expert",
    "matrix",
    "vector",
    "scalar",
    "tensor",
]

MATRIX_ROLES: tuple[Role, ...] = ("linear", "qkv", "conv", "expert", "matrix")
"""Hidden matrices: rows are outputs, columns inputs. Convolutions count as (out, in * kernel)."""

_Word = TypeVar("_Word")

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_EMBEDDING_CLASS = re.compile(r"Embeddings?(Bag)?$")
_BY_HEADS = re.compile(r"query_key_value|linear_qkv", re.IGNORECASE)
_FUSED = re.compile(rf"(to_)?(w_?)?qkv(_proj)?|c_attn|in_proj|{_BY_HEADS.pattern}", re.IGNORECASE)
_GATES = {(nn.LSTM, nn.LSTMCell): 4, (nn.GRU, nn.GRUCell): 3}
_GATED = re.compile(r"weight_[ih]h")
_HEAD = re.compile(r"lm_head|heads?|output|unembed\w*|embed_out|classifier|fc")
_BIAS = re.compile(r"(^|_)bias(es)?($|_)")
_TABLE = re.compile(r"(\w*_)?(wpe|wte|pos|positions?|positional|embed[a-z]*|emb|tokens?)(_in|_table|_\d+)?")
"""Names of modules that are tables; a token_proj or a pos_mixer works on tables."""
_TOKENS = re.compile(r"wte|((tokens?|tok|words?|vocab|input)_)?(emb|embed[a-z]*)(_(tokens?|words?|in|table))?|tokens?")
_POSITIONS = re.compile(r"(^|_)(wpe|pos|positions?|positional)(_|$)")
_EMBEDDED = re.compile(r"(^|_)(wpe|wte|pos|positions?|positional|embed\w*|emb|tokens?)(_|$)")


@dataclass(frozen=True, eq=False)
class RoleOfParameter:
    """One parameter and its role in the model."""

    name: str
    """Name without the prefixes of DistributedDataParallel, torch.compile and checkpointing."""
    role: Role
    parameter: nn.Parameter
    split_sizes: tuple[int, ...] | None = None
    """Rows of each matrix that a fused one is made of; None if it is one matrix, or they are not known."""


def find_roles(model: nn.Module, *, fused: Mapping[str, Sequence[int]] | None = None) -> tuple[RoleOfParameter, ...]:
    """Give every parameter of a model its role, frozen ones too, each once and in the order of named_parameters.

    Args:
        model: plain, or under DistributedDataParallel, torch.compile, fully_shard, or on the meta device.
        fused: regular expression -> rows of each matrix that was fused into one, as (q_rows, k_rows, v_rows); the first
            one found in a name counts. Biases beside them are left alone.

    Raises:
        InvalidInputError: an expression that matches no parameter, sizes that do not add up to the rows, or a parameter
            without a shape yet.
    """
    locations = locations_of(model)
    heads = _heads(locations)
    matrices = [own[0].name for parameter, own in locations.items() if parameter.ndim > 1]
    sizes = match(fused or {}, matrices, what="fused")
    rows = []
    for parameter, own in locations.items():
        name = own[0].name
        role = _role(parameter, own, heads)
        split = _split(own[0], parameter) if role in ("qkv", "matrix", "expert") and parameter.ndim == 2 else None
        if name in sizes:
            role, split = "qkv", _checked_split(name, tuple(parameter.shape), sizes[name])
        rows.append(RoleOfParameter(name, role, parameter, split))
    return tuple(rows)


def overruled(
    rows: Sequence[RoleOfParameter], words: Mapping[str, str]
) -> tuple[tuple[RoleOfParameter, ...], dict[str, str]]:
    """Overrule roles by the caller's own.

    Args:
        rows: as find_roles returned them.
        words: regular expression -> role, or "hidden" or "fallback", which leave the role alone. Roles of matrices are
            for matrices: a bias whose name is found, too, keeps its own.

    Returns:
        The rows, and name -> word of those that a pattern fits.

    Raises:
        InvalidInputError: a role that does not exist, or a pattern that fits nothing.
    """
    chosen = match(words, [row.name for row in rows], what="roles")
    unknown = sorted(set(words.values()) - {*get_args(Role), "hidden", "fallback"})
    if unknown:
        raise InvalidInputError(
            f"roles {unknown} do not exist; there are {', '.join(get_args(Role))}, and 'hidden' and 'fallback'."
        )
    # A pattern for matrices may fit the biases beside them, which keep their role.
    flat = {row.name for row in rows if row.parameter.ndim < 2}
    chosen = {name: word for name, word in chosen.items() if not (name in flat and word in MATRIX_ROLES)}
    given = {name: cast(Role, word) for name, word in chosen.items() if word not in ("hidden", "fallback")}
    return tuple(
        replace(row, role=given[row.name], split_sizes=row.split_sizes if given[row.name] == "qkv" else None)
        if row.name in given
        else row
        for row in rows
    ), chosen


def match(patterns: Mapping[str, _Word], names: Sequence[str], *, what: str) -> dict[str, _Word]:
    """Return name -> word of the first pattern that is found in it.

    Args:
        patterns: regular expression -> word; searched for anywhere in a name.
        names: of parameters.
        what: the argument's name, for errors.

    Raises:
        InvalidInputError: a pattern is not a regular expression, or fits none of the names.
    """
    words: dict[str, _Word] = {}
    for pattern, word in patterns.items():
        try:
            hits = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise InvalidInputError(f"{what}: {pattern!r} is not a regular expression: {error}.") from None
        if not hits:
            raise InvalidInputError(
                f"{what}: {pattern!r} is found in no parameter's name; they begin with {', '.join(names[:5])}."
            )
        for name in hits:
            words.setdefault(name, word)
    return words


def check_ownership(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Check that every trained parameter of a model is in exactly one parameter group; for groups made by hand, too.

    Raises:
        InvalidInputError: names the parameters that no optimizer takes, or that two take.
    """
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owners[parameter].append(type(optimizer).__name__)
    # Trained parameters of the model in no group, then those in several.
    rows = find_roles(model)
    lost = [row.name for row in rows if row.parameter.requires_grad and row.parameter not in owners]
    if lost:
        num_foreign = len(owners.keys() - {row.parameter for row in rows})
        hint = ""
        if num_foreign:
            hint = f" They hold {num_foreign} tensors that are not the model's: was it changed afterwards?"
        raise InvalidInputError(
            f"no optimizer takes {len(lost)} trained parameters: {_some(lost)}.{hint} Give them to one, or set "
            "requires_grad=False."
        )
    twice = [f"{row.name} ({', '.join(owners[row.parameter])})" for row in rows if len(owners[row.parameter]) > 1]
    if twice:
        raise InvalidInputError(
            f"{len(twice)} parameters are in two parameter groups: {_some(twice)}. Leave each in one."
        )


def numbered(name: str) -> tuple[str, tuple[int, ...]]:
    """Return the name with * for its numbers, and the numbers: blocks.3.norm is blocks.*.norm with 3."""
    parts = name.split(".")
    numbers = tuple(int(part) for part in parts if part.isdigit())
    return ".".join("*" if part.isdigit() else part for part in parts), numbers


def folded_names(names: Sequence[str]) -> list[str]:
    """Fold names that differ in numbers only into one with ranges, if all combinations of numbers are there."""
    pattern, _ = numbered(names[0])
    numbers = [numbered(name)[1] for name in names]
    axes = [sorted(set(axis)) for axis in zip(*numbers, strict=True)]
    if sorted(numbers) != list(product(*axes)):
        return list(names)
    for axis in axes:
        pattern = pattern.replace("*", _ranges(axis), 1)
    return [pattern]


def _heads(locations: Mapping[nn.Parameter, Sequence[ParameterLocation]]) -> set[nn.Parameter]:
    """Return the matrices that give the model's output: by a name at the top, else by an embedding's shape."""
    pairs = [(location, parameter) for parameter, own in locations.items() for location in own]
    shared = _common_prefix([location.words for location, _ in pairs])
    matrices = [(location, parameter) for location, parameter in pairs if parameter.ndim == 2]
    others = [(location, parameter) for location, parameter in matrices if not _is_embedding(location, parameter)]
    # The last matrix under each name of a head at the top of the model.
    at_top: dict[str, nn.Parameter] = {}
    for location, parameter in others:
        below = location.words[shared:]
        if below and _HEAD.fullmatch(below[0]) and (location.local == "weight" or len(below) == 1):
            at_top[below[0]] = parameter
    if at_top:
        return set(at_top.values())
    # Else a weight with the shape of the table of tokens: outside of the layers, or the model's last one.
    shapes = {tuple(parameter.shape) for location, parameter in matrices if _is_of_tokens(location, parameter)}
    weights = [(location, parameter) for location, parameter in others if location.local == "weight"]
    fitting = [(location, parameter) for location, parameter in weights if tuple(parameter.shape) in shapes]
    outside = [parameter for location, parameter in fitting if not any(part.isdigit() for part in location.path)]
    last = [parameter for location, parameter in fitting if location is weights[-1][0]]
    return set(outside[-1:] or last)


def _common_prefix(paths: Sequence[tuple[str, ...]]) -> int:
    """Count the leading names that all paths share, without the last name of a path."""
    shared = 0
    while paths and all(len(path) > shared + 1 for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return shared


def _role(parameter: nn.Parameter, locations: Sequence[ParameterLocation], heads: Collection[nn.Parameter]) -> Role:
    """Return the role of one parameter, by the first rule that applies."""
    # Tables: embeddings, and weights that are tied to one.
    embedded = [_is_embedding(location, parameter) for location in locations]
    if any(embedded):
        return "embedding" if all(embedded) else "tied"
    # Types of modules, and names of biases.
    location = locations[0]
    module, local = location.module, location.local
    if _is_norm(module):
        return "norm"
    if local != "weight" and _BIAS.search(local) and not _EMBEDDED.search(local):
        return "bias"
    if isinstance(module, nn.MultiheadAttention):
        return "qkv" if local == "in_proj_weight" else "linear"
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and local == "weight":
        return "transposed_conv"
    if isinstance(module, nn.modules.conv._ConvNd) and local == "weight":
        return "conv" if module.groups == 1 else "grouped_conv"
    # Vectors and scalars, by shape. A linear layer of one output is a matrix all the same.
    num_sides, is_linear = _num_sides(parameter), _is_linear(location) and parameter.ndim == 2
    if num_sides < 2 and not is_linear:
        return "vector" if num_sides else "scalar"
    # Matrices: heads, stacks, fused projections, one expert of a list, and the layers between.
    if parameter in heads:
        return "head"
    if parameter.ndim != 2:
        return "expert" if parameter.ndim == num_sides == 3 else "tensor"
    if _is_fused(location, parameter):
        return "qkv"
    if any(a == "experts" and b.isdigit() for a, b in pairwise(location.path)):
        return "expert"
    return "linear" if is_linear else "matrix"


def _num_sides(parameter: nn.Parameter) -> int:
    """Count sides of more than one entry."""
    return sum(side != 1 for side in parameter.shape)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or type(module).__name__.endswith("Norm")


def _is_linear(location: ParameterLocation) -> bool:
    """Return whether the module is a linear layer, of the user's own too, such as ColumnParallelLinear."""
    return location.local == "weight" and (
        isinstance(location.module, nn.Linear) or "Linear" in type(location.module).__name__
    )


def _is_embedding(location: ParameterLocation, parameter: nn.Parameter) -> bool:
    """Return whether it is a table: by the class, then by the name of the module or of the bare parameter."""
    # Embeddings of torch are tables, and norms, convolutions and linear layers are none.
    module = location.module
    if isinstance(module, _EMBEDDINGS):
        return True
    is_known = _is_norm(module) or (location.local == "weight" and isinstance(module, nn.modules.conv._ConvNd))
    if _num_sides(parameter) < 2 or is_known or _is_linear(location):
        return False
    # Otherwise the name decides: that of the class, of the module, or of the bare parameter.
    if _is_embedding_class(location):
        return True
    is_table = _TABLE.fullmatch(location.noun) if location.local == "weight" else _EMBEDDED.search(location.noun)
    return bool(is_table) and not _HEAD.fullmatch(location.noun)


def _is_of_tokens(location: ParameterLocation, parameter: nn.Parameter) -> bool:
    """Return whether it is an embedding of tokens, whose shape is the head's; a table of positions may be square."""
    if not _is_embedding(location, parameter) or _POSITIONS.search(location.noun):
        return False
    return _is_embedding_class(location) or bool(_TOKENS.fullmatch(location.noun))


def _is_embedding_class(location: ParameterLocation) -> bool:
    """Return whether the class of the module is an embedding, by type or by name."""
    is_named = location.local == "weight" and _EMBEDDING_CLASS.search(type(location.module).__name__)
    return isinstance(location.module, _EMBEDDINGS) or bool(is_named)


def _is_fused(location: ParameterLocation, parameter: nn.Parameter) -> bool:
    """Return whether it is a fused projection, by its name.

    in_proj means other things besides (state-space layers), and a list may hold q, k and v: there the shape decides.
    """
    if not _FUSED.fullmatch(location.noun):
        return False
    is_sure = location.noun == location.words[-1] and location.noun.lower() != "in_proj"
    return is_sure or _split(location, parameter) is not None


def _split(location: ParameterLocation, parameter: nn.Parameter) -> tuple[int, ...] | None:
    """Return rows of each matrix in one that is made of several, as far as they follow from its type and shape.

    Thirds if the rows are three times the columns, else heads may be grouped; none if a model of this name may order
    its rows by heads. Then only the caller can give them.
    """
    # Gates of recurrent layers, and torch's own attention: the type has the number.
    rows, columns = parameter.shape
    for kinds, num_gates in _GATES.items():
        if isinstance(location.module, kinds) and _GATED.match(location.local):
            return (rows // num_gates,) * num_gates
    if isinstance(location.module, nn.MultiheadAttention):
        return (rows // 3,) * 3 if location.local == "in_proj_weight" else None
    # Any other fused projection, by its name and its shape.
    is_cut = _FUSED.fullmatch(location.noun) and not _BY_HEADS.fullmatch(location.noun) and rows == 3 * columns
    return (columns,) * 3 if is_cut else None


def _checked_split(name: str, shape: tuple[int, ...], sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the caller's sizes, which have to add up to the rows."""
    if len(shape) != 2 or sum(sizes) != shape[0] or min(sizes) < 1:
        raise InvalidInputError(
            f"fused: {name} has shape {shape}, and the sizes {tuple(sizes)} do not add up to its rows. Give the rows "
            "of each matrix, as (q_rows, k_rows, v_rows)."
        )
    return tuple(sizes)


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers as ranges, such as 0-3,5."""
    # Runs of numbers that follow one another.
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _some(names: Sequence[str]) -> str:
    """Write the first five names, and dots for the rest."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
