"""What every parameter of a model is for: by the type of its module first, by its name second.

Reads types, names and shapes only, so sharded, compiled and meta models are answered like plain ones.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from gns_controller.core.errors import InvalidInputError

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

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_FUSED = re.compile(r"(to_)?w?qkv(_proj)?|c_attn|query_key_value|in_proj", re.IGNORECASE)
_HEAD = re.compile(r"lm_head|heads?|output|unembed\w*|classifier|fc")
_BIAS = re.compile(r"(^|_)bias(es)?($|_)")
_EMBEDDED = re.compile(r"(^|_)(wpe|wte|pos|positions?|positional|embed\w*|emb|tokens?)(_|$)")


@dataclass(frozen=True, eq=False)
class RoleOfParameter:
    """One parameter and what it is for."""

    name: str
    """Without the prefixes of DistributedDataParallel, torch.compile and checkpointing."""
    role: Role
    parameter: nn.Parameter
    split_sizes: tuple[int, ...] | None = None
    """Rows of each matrix that a fused one is made of; None if it is one matrix, or nobody knows."""


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a parameter hangs in the module tree; a tied one hangs in several places."""

    path: tuple[str, ...]
    module: nn.Module
    local: str

    @property
    def name(self) -> str:
        return ".".join((*self.path, self.local))


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
    places = _places(model)
    heads = _heads(places)
    matrices = [found[0].name for parameter, found in places.items() if parameter.ndim > 1]
    sizes = match(fused or {}, matrices, what="fused")
    rows = []
    for parameter, found in places.items():
        name = found[0].name
        role = _role(parameter, found, heads)
        split = _thirds(found[0], parameter) if role == "qkv" else None
        if name in sizes:
            role, split = "qkv", _checked_split(name, tuple(parameter.shape), sizes[name])
        rows.append(RoleOfParameter(name, role, parameter, split))
    return tuple(rows)


def overruled(
    rows: Sequence[RoleOfParameter], words: Mapping[str, str]
) -> tuple[tuple[RoleOfParameter, ...], dict[str, str]]:
    """The caller's word against ours.

    Args:
        rows: as found.
        words: regular expression -> role, or "hidden" or "fallback", which leave the role alone. Roles of matrices are
            for matrices: a bias whose name is found, too, keeps its own.

    Returns:
        The rows, and name -> word of those that were spoken of.

    Raises:
        InvalidInputError: a role that does not exist, or a pattern that fits nothing.
    """
    found = match(words, [row.name for row in rows], what="roles")
    unknown = sorted(set(words.values()) - {*get_args(Role), "hidden", "fallback"})
    if unknown:
        raise InvalidInputError(
            f"roles {unknown} do not exist; there are {', '.join(get_args(Role))}, and 'hidden' and 'fallback'."
        )
    flat = {row.name for row in rows if row.parameter.ndim < 2}
    found = {name: word for name, word in found.items() if not (name in flat and word in MATRIX_ROLES)}
    given = {name: cast(Role, word) for name, word in found.items() if word not in ("hidden", "fallback")}
    return tuple(
        replace(row, role=given[row.name], split_sizes=row.split_sizes if given[row.name] == "qkv" else None)
        if row.name in given
        else row
        for row in rows
    ), found


def match(patterns: Mapping[str, _Word], names: Sequence[str], *, what: str) -> dict[str, _Word]:
    """Name -> what the first pattern found in it says.

    Args:
        patterns: regular expression -> word; searched for anywhere in a name.
        names: of parameters.
        what: the argument's name, for errors.

    Raises:
        InvalidInputError: a pattern is no regular expression, or is found in no name.
    """
    found: dict[str, _Word] = {}
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
            found.setdefault(name, word)
    return found


def check_ownership(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Whether every trained parameter of a model is in exactly one parameter group; for groups made by hand, too.

    Raises:
        InvalidInputError: names the parameters that no optimizer takes, or that two take.
    """
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owners[parameter].append(type(optimizer).__name__)
    rows = find_roles(model)
    lost = [row.name for row in rows if row.parameter.requires_grad and row.parameter not in owners]
    if lost:
        strangers = len(owners.keys() - {row.parameter for row in rows})
        hint = (
            f" They hold {strangers} tensors that are not the model's: was it changed afterwards?" if strangers else ""
        )
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
    """The name with * for its numbers, and the numbers: blocks.3.norm is blocks.*.norm with 3."""
    parts = name.split(".")
    numbers = tuple(int(part) for part in parts if part.isdigit())
    return ".".join("*" if part.isdigit() else part for part in parts), numbers


def folded_names(names: Sequence[str]) -> list[str]:
    """Names that differ in numbers only, as one name with ranges; as they are, unless all combinations are there."""
    place, _ = numbered(names[0])
    found = [numbered(name)[1] for name in names]
    axes = [sorted(set(axis)) for axis in zip(*found, strict=True)]
    if sorted(found) != list(product(*axes)):
        return list(names)
    for axis in axes:
        place = place.replace("*", _ranges(axis), 1)
    return [place]


def _places(model: nn.Module) -> dict[nn.Parameter, list[_Place]]:
    places: dict[nn.Parameter, list[_Place]] = {}
    for path, module in _modules(model, (), frozenset()):
        for local, parameter in module._parameters.items():
            if parameter is None:
                continue
            place = _Place(path, module, local)
            if is_lazy(parameter):
                raise InvalidInputError(f"{place.name} has no shape yet: run the model on one batch first.")
            places.setdefault(parameter, []).append(place)
    return places


def _modules(
    module: nn.Module, path: tuple[str, ...], above: frozenset[int]
) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Every module at every place it hangs, wrappers left out of the path."""
    yield path, module
    for name, child in module._modules.items():
        if child is None or id(child) in above:
            continue
        is_wrapper = name in _WRAPPERS or (
            name == "module" and isinstance(module, DataParallel | DistributedDataParallel)
        )
        yield from _modules(child, path if is_wrapper else (*path, name), above | {id(module)})


def _heads(places: Mapping[nn.Parameter, Sequence[_Place]]) -> set[int]:
    """Ids of the Linear modules that give the model's output: by a name at the top, else by an embedding's shape."""
    found = [place for hanging in places.values() for place in hanging]
    shared = _common_prefix([place.path for place in found])
    linears = [place for place in found if isinstance(place.module, nn.Linear) and place.local == "weight"]
    at_top: dict[str, int] = {}
    for place in linears:
        below = place.path[shared:]
        if below and _HEAD.fullmatch(below[0]):
            at_top[below[0]] = id(place.module)
    if at_top:
        return set(at_top.values())
    sizes = {_shape_of_weight(place) for place in found if isinstance(place.module, _EMBEDDINGS)}
    fitting = [place for place in linears if _shape_of_weight(place) in sizes]
    outside = [place for place in fitting if not any(part.isdigit() for part in place.path)]
    last = [place for place in fitting if place is linears[-1]]
    return {id(place.module) for place in outside[-1:] or last}


def _shape_of_weight(place: _Place) -> tuple[int, ...]:
    parameter = place.module._parameters[place.local]
    assert parameter is not None
    return tuple(parameter.shape)


def _common_prefix(paths: Sequence[tuple[str, ...]]) -> int:
    """How many leading names all paths share; the last name of a path is never counted."""
    shared = 0
    while paths and all(len(path) > shared + 1 for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return shared


def _role(parameter: nn.Parameter, places: Sequence[_Place], heads: set[int]) -> Role:
    embedded = [isinstance(place.module, _EMBEDDINGS) for place in places]
    if any(embedded):
        return "embedding" if all(embedded) else "tied"
    place = places[0]
    module, local = place.module, place.local
    if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm"):
        return "norm"
    if local != "weight" and _BIAS.search(local) and not _EMBEDDED.search(local):
        return "bias"
    if isinstance(module, nn.Linear) and local == "weight":
        if any(id(other.module) in heads for other in places):
            return "head"
        if any(a == "experts" and b.isdigit() for a, b in zip(place.path, place.path[1:], strict=False)):
            return "expert"
        return "qkv" if _is_fused(place, parameter) else "linear"
    if isinstance(module, nn.MultiheadAttention):
        return "qkv" if local == "in_proj_weight" else "linear"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed_conv"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv" if module.groups == 1 else "grouped_conv"
    return _role_of_bare(local, tuple(parameter.shape))


def _role_of_bare(local: str, shape: tuple[int, ...]) -> Role:
    num_sides = sum(side != 1 for side in shape)
    if num_sides < 2:
        return "vector" if num_sides else "scalar"
    if _EMBEDDED.search(local):
        return "embedding"
    if len(shape) == 2:
        return "matrix"
    return "expert" if len(shape) == num_sides == 3 else "tensor"


def _is_fused(place: _Place, parameter: nn.Parameter) -> bool:
    """in_proj means other things besides (state-space layers): there the shape decides."""
    name = place.path[-1] if place.path else ""
    if not _FUSED.fullmatch(name):
        return False
    return name.lower() != "in_proj" or _thirds(place, parameter) is not None


def _thirds(place: _Place, parameter: nn.Parameter) -> tuple[int, ...] | None:
    """Equal parts if the rows are three times the columns. Else heads may be grouped, and only the caller knows."""
    rows, columns = parameter.shape
    if isinstance(place.module, nn.MultiheadAttention) or rows == 3 * columns:
        return (rows // 3,) * 3
    return None


def _checked_split(name: str, shape: tuple[int, ...], sizes: Sequence[int]) -> tuple[int, ...]:
    if len(shape) != 2 or sum(sizes) != shape[0] or min(sizes) < 1:
        raise InvalidInputError(
            f"fused: {name} has shape {shape}, and the sizes {tuple(sizes)} do not add up to its rows. Give the rows "
            "of each matrix, as (q_rows, k_rows, v_rows)."
        )
    return tuple(sizes)


def _ranges(numbers: Sequence[int]) -> str:
    """Such as 0-3,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
