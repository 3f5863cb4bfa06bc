"""Counterparts of parameters in the small model where settings were tuned, and the layers of both, by names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gns_controller.core.errors import InvalidInputError

_LAYERS = re.compile(r"layers?|blocks?|h")
"""Names of lists of layers, in which a number may stand behind another one, that of a stage."""


@dataclass(frozen=True)
class BaseOfParameter:
    """Counterpart of a parameter in the model where settings were tuned."""

    shape: tuple[int, ...]
    depth: int
    """Layers in the parameter's own stack; 1 if it is in none."""
    base_depth: int


def find_bases(
    shapes: Mapping[str, Sequence[int]], base_shapes: Mapping[str, Sequence[int]]
) -> dict[str, BaseOfParameter]:
    """Find every parameter's counterpart in the base model.

    A layer that the base does not have takes another layer's of the same place, if all of them have one shape. Stacks
    of equal layers count as depth; the entries of a list named experts do not, nor do lists inside a layer. Each of
    several stages is a stack of its own if the stages have other numbers of layers than the base's.

    Args:
        shapes: name -> shape of the model.
        base_shapes: name -> shape of the base model.

    Raises:
        InvalidInputError: a parameter has no counterpart, or several of different shapes.
    """
    # Layers with the same place and the same shape are a stack, in either model.
    layer_at = _layer_positions(shapes, base_shapes)
    stacks, base_stacks = _stacks(shapes, layer_at), _stacks(base_shapes, layer_at)
    bases, unmatched = {}, []
    for name, shape in shapes.items():
        # The parameter of the same name, else one of the same place in another layer, if these have one shape.
        place, _ = _place(name, layer_at)
        like = base_stacks.get(place, {})
        candidates = {tuple(base_shapes[name])} if name in base_shapes else set(like)
        if len(candidates) != 1:
            unmatched.append(name)
            continue
        base_shape = candidates.pop()
        if len(base_shape) != len(shape):
            raise InvalidInputError(f"{name} has shape {tuple(shape)}, its base {base_shape}: not of one kind.")
        # A depth counts where both stacks have layers of one shape alone.
        depth = base_depth = 1
        if len(stacks[place]) == len(like) == 1:
            depth, base_depth = len(stacks[place][tuple(shape)]), len(like[base_shape])
        bases[name] = BaseOfParameter(base_shape, depth, base_depth)
    if unmatched:
        raise InvalidInputError(
            f"base_shapes has no shape for {len(unmatched)} parameters, or several to choose from: "
            f"{', '.join(unmatched[:5])}. Take them from a small model of the same kind, base_shapes_of(small)."
        )
    return bases


def _layer_positions(names: Iterable[str], base_names: Iterable[str]) -> dict[str, int]:
    """Return name without numbers -> which of its parts is the layer's number; those without layers are left out.

    It is the first number that is not the same everywhere. But where that one has the same values in both models, as
    the stages in stages.0.layers.2 have, it is the first behind a word for layers that has not.
    """
    ours, theirs = _values(names), _values(base_names)
    positions = {}
    for pattern in ours.keys() | theirs.keys():
        parts = pattern.split(".")
        # Parts of the name that are numbers, with their values in either model; experts are not layers.
        axes = [
            (position, ours[pattern][position], theirs[pattern][position])
            for position, part in enumerate(parts)
            if part == "*" and (position == 0 or parts[position - 1] != "experts")
        ]
        varying = [axis for axis in axes if len(axis[1] | axis[2]) > 1]
        if not varying:
            continue
        # The first one that varies is the layer's, unless it varies alike in both models, as that of a stage does.
        first, same, base_same = varying[0]
        deeper = [at for at, own, base in varying[1:] if own != base and _LAYERS.fullmatch(parts[at - 1])]
        positions[pattern] = deeper[0] if deeper and same == base_same else first
    return positions


def _values(names: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Return name without numbers -> position of a part -> the numbers there."""
    values: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        for position, part in enumerate(name.split(".")):
            values[_pattern(name)][position].add(part)
    return values


def _pattern(name: str) -> str:
    """Return the name with * for its numbers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _stacks(
    shapes: Mapping[str, Sequence[int]], layer_at: Mapping[str, int]
) -> dict[str, dict[tuple[int, ...], set[str]]]:
    """Return place in a layer -> shape -> the layers that have it."""
    stacks: dict[str, dict[tuple[int, ...], set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, shape in shapes.items():
        place, layer = _place(name, layer_at)
        stacks[place][tuple(shape)].add(layer)
    return stacks


def _place(name: str, layer_at: Mapping[str, int]) -> tuple[str, str]:
    """Return the name with * for its layer's and its experts' numbers, and the layer's number, "" without one.

    The other numbers say which part it is: of the model before the layer's, of the layer behind it.
    """
    parts = name.split(".")
    position = layer_at.get(_pattern(name))
    # Numbers that count layers or experts give way to a star; the others are part of the place.
    is_counted = [
        at == position or (before == "experts" and part.isdigit())
        for at, (before, part) in enumerate(zip(["", *parts], parts, strict=False))
    ]
    place = ".".join("*" if counted else part for counted, part in zip(is_counted, parts, strict=True))
    return place, "" if position is None else parts[position]
