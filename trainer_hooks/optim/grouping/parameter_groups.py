"""Optimizers of a model in one call: hidden matrices to one, the rest to another, each parameter once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn

from gns_controller.core.contract import Geometry
from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.optim.engine.matrices import matrices_of
from trainer_hooks.optim.grouping.base_model import BaseOfParameter, find_bases
from trainer_hooks.optim.grouping.optimizer_builder import OptimizerBuilder
from trainer_hooks.optim.grouping.roles import (
    MATRIX_ROLES,
    Role,
    RoleOfParameter,
    find_roles,
    folded_names,
    match,
    numbered,
    overruled,
)
from trainer_hooks.optim.grouping.width_transfer import (
    base_shapes_of,
    epsilon_multiplier,
    learning_rate_multiplier,
    scale_in_words,
    weight_decay_multiplier,
)
from trainer_hooks.optim.known_optimizers import TransferRule

OptimizerChoice = tuple[type[torch.optim.Optimizer], Mapping[str, Any]]
"""An optimizer's class and its settings."""

NO_DECAY: tuple[Role, ...] = ("norm", "bias", "vector", "scalar")


@dataclass(frozen=True)
class GroupedParameter:
    """Optimizer and settings that one parameter got."""

    name: str
    shape: tuple[int, ...]
    role: Role
    optimizer: str | None
    """Class name of its optimizer; None: frozen."""
    geometry: Geometry | None
    """Norm in which the optimizer descends; None: not known, or frozen."""
    num_matrices: int
    """Matrices in it that are orthogonalized or preconditioned one by one."""
    update_scale: str
    """The factor on an orthogonalized update, and how it comes about; "-" without one."""
    learning_rate: float | None
    learning_rate_multiplier: float
    weight_decay: float


@dataclass(frozen=True)
class ParameterGroups:
    """A model's optimizers and the account of them."""

    optimizers: tuple[torch.optim.Optimizer, ...]
    """Optimizers for `AdaptiveBatch.attach`; that of the hidden matrices first."""
    groups: tuple[GroupedParameter, ...]

    def explain(self, *, fold: bool = False) -> str:
        """A table with a line per parameter; with fold, one per stack of layers that are treated alike."""
        # Parameters that are treated alike, under one name if folded.
        lines = [("name", "shape", "role", "optimizer", "geometry", "update scale", "rate", "decay")]
        alike: dict[tuple[str, GroupedParameter], list[str]] = {}
        for row in self.groups:
            pattern = numbered(row.name)[0] if fold else row.name
            alike.setdefault((pattern, replace(row, name="")), []).append(row.name)
        # A line of cells for each, then columns of equal width.
        for name, row in ((name, row) for (_, row), names in alike.items() for name in folded_names(names)):
            shape = " x ".join(map(str, row.shape)) or "()"
            if row.optimizer is None:
                lines.append((name, shape, row.role, "frozen", "-", "-", "-", "-"))
                continue
            pieces = f", {row.num_matrices} matrices" if row.num_matrices > 1 else ""
            geometry = f"{row.geometry or '-'}{pieces}"
            rate = f"x {row.learning_rate_multiplier:.4g}"
            lines.append(
                (name, shape, row.role, row.optimizer, geometry, row.update_scale, rate, f"{row.weight_decay:.4g}")
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def parameter_groups(
    model: nn.Module,
    *,
    hidden: type[torch.optim.Optimizer],
    hidden_options: Mapping[str, Any] | None = None,
    fallback: type[torch.optim.Optimizer] = torch.optim.AdamW,
    fallback_options: Mapping[str, Any] | None = None,
    head: OptimizerChoice | None = None,
    embedding: OptimizerChoice | None = None,
    roles: Mapping[str, Role | Literal["hidden", "fallback"]] | None = None,
    fused: Mapping[str, Sequence[int]] | None = None,
    num_heads: Mapping[str, int] | None = None,
    no_decay: Sequence[Role] = NO_DECAY,
    base_shapes: Mapping[str, Sequence[int]] | nn.Module | None = None,
    transfer: Mapping[str, TransferRule] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> ParameterGroups:
    """Build a model's optimizers: hidden matrices to one, embeddings, head, norms, biases and vectors to another.

    Call it after fully_shard, before or after DistributedDataParallel and torch.compile, and anew when the model's
    parameters have changed.

    Args:
        model: whose parameters are trained.
        hidden: optimizer of the roles in MATRIX_ROLES.
        hidden_options: its settings.
        fallback: optimizer of the other roles.
        fallback_options: its settings.
        head: optimizer of the output layer, with settings; default: the fallback.
        embedding: optimizer of embeddings and tied weights, with settings; default: the fallback.
        roles: regular expression -> role, or the optimizer that takes it. The first one found in a name counts.
        fused: regular expression -> rows of each fused matrix, as (q_rows, k_rows, v_rows), one after the other. Needed
            where heads are grouped; equal thirds are found.
        num_heads: regular expression -> number of (query) heads that are orthogonalized one by one.
        no_decay: roles without weight decay.
        base_shapes: shapes of the model that the settings were tuned on, or that model: learning rates, weight decay
            and epsilons are then carried over to this one.
        transfer: class name -> rule, for optimizers that have none here, or to overrule the table.
        process_group: ranks that hold copies of plain parameters (DDP), between which `hidden` divides its work.

    Raises:
        InvalidInputError: a trained parameter would be without optimizer, a pattern fits nothing, fused sizes are not
            known, or no rule carries an optimizer's settings over.
        GeometryError: a parameter that its optimizer cannot take.
    """
    # Optimizers by what they are for, and the role of every parameter.
    choices: dict[str, Any] = {"hidden": (hidden, hidden_options), "head": head, "embedding": embedding}
    choices["fallback"] = (fallback, fallback_options)
    _check_choices(model, choices)
    rows, words = overruled(find_roles(model, fused=fused), roles or {})
    unknown = sorted(set(no_decay) - set(get_args(Role)))
    if unknown:
        raise InvalidInputError(f"no_decay: roles {unknown} do not exist; there are {', '.join(get_args(Role))}.")
    heads = match(num_heads or {}, [row.name for row in rows], what="num_heads")
    builders = {key: OptimizerBuilder(choice[0], dict(choice[1] or {})) for key, choice in choices.items() if choice}
    builders["hidden"].process_group = process_group
    _check_arguments(rows, builders, splits={"fused": fused, "num_heads": num_heads})
    if transfer is not None and base_shapes is None:
        raise InvalidInputError("transfer= is how settings follow the width; it needs base_shapes= to start from.")
    # Counterparts in the model where settings were tuned.
    bases: dict[str, BaseOfParameter] = {}
    if base_shapes is not None:
        tuned = base_shapes_of(base_shapes) if isinstance(base_shapes, nn.Module) else base_shapes
        bases = find_bases({row.name: tuple(row.parameter.shape) for row in rows}, tuned)
    # Each parameter goes into a group of its optimizer, with the settings that its matrices and the width ask for.
    account = []
    for row in rows:
        word = words.get(row.name)
        builder = builders[_builder_for(row.role, word, builders)]
        try:
            keys = _structure(row, builder, num_heads=heads.get(row.name), keeps_whole=word == "hidden")
            account.append(
                _assigned(row, builder, keys, bases.get(row.name), transfer or {}, decays=row.role not in no_decay)
            )
        except InvalidInputError as error:
            raise type(error)(f"{row.name}: {error}") from None
    # Optimizers that got a parameter.
    optimizers = tuple(builder.build() for builder in builders.values() if builder.param_groups)
    if not optimizers:
        raise InvalidInputError("no parameter of the model is trained; check requires_grad.")
    return ParameterGroups(optimizers, tuple(account))


def _check_choices(model: object, choices: Mapping[str, object]) -> None:
    """Refuse a model that is not one, and optimizers that are not classes."""
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"parameter_groups takes the model itself, got {type(model).__name__}.")
    for name, choice in choices.items():
        if choice is None:
            continue
        kind = choice[0] if isinstance(choice, tuple) and len(choice) == 2 else None
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise InvalidInputError(f"{name}= takes an optimizer's class; head= and embedding= take (class, settings).")
        if next(iter(inspect.signature(kind).parameters)) == "optimizer":
            raise InvalidInputError(
                f"{kind.__name__} goes around optimizers: [{kind.__name__}(o) for o in groups.optimizers]."
            )


def _check_arguments(
    rows: Sequence[RoleOfParameter], builders: Mapping[str, OptimizerBuilder], *, splits: Mapping[str, object]
) -> None:
    """Refuse arguments that no parameter or no optimizer has a use for."""
    hidden = builders["hidden"]
    given = [f"{name}=" for name, patterns in splits.items() if patterns]
    if given and not hidden.splits and not hidden.facts.is_elementwise:
        raise InvalidInputError(
            f"{given[0]} cuts matrices into pieces, which {hidden.name} does not take; trainer_hooks.optim's do."
        )
    for key, roles in (("head", ("head",)), ("embedding", ("embedding", "tied"))):
        if key in builders and not any(row.role in roles for row in rows):
            raise InvalidInputError(f"{key}= names an optimizer, and no parameter has that role; name one with roles=.")


def _builder_for(role: Role, word: str | None, builders: Mapping[str, OptimizerBuilder]) -> str:
    """Return the key of the builder that takes a parameter of this role, unless the caller has named one."""
    if word in ("hidden", "fallback"):
        return word
    key = "hidden" if role in MATRIX_ROLES else "embedding" if role == "tied" else role
    return key if key in builders else "fallback"


def _structure(
    row: RoleOfParameter, builder: OptimizerBuilder, *, num_heads: int | None, keeps_whole: bool
) -> dict[str, Any]:
    """Return the group keys for the matrices that a parameter holds; none for an optimizer of single entries."""
    if builder.facts.is_elementwise or not row.parameter.requires_grad:
        return {}
    # Several matrices in one parameter need an optimizer that can take them apart.
    is_stack = row.role == "expert" and row.parameter.ndim > 2
    is_fused = (row.role == "qkv" or row.split_sizes is not None) and not keeps_whole
    if not builder.splits:
        if (is_stack or is_fused) and builder.facts.geometry == "spectral":
            way_out = "'linear'} to take it as one" if is_fused else "'fallback'}"
            raise GeometryError(
                f"{builder.name} takes one matrix per parameter, and this is several in one. Use an optimizer of "
                f"trainer_hooks.optim, or roles={{pattern: {way_out}."
            )
        return {}
    # Rows of fused projections, then heads, then experts.
    keys: dict[str, Any] = {}
    if is_fused:
        if row.split_sizes is None:
            raise InvalidInputError(
                f"it counts as a fused projection, and its {row.parameter.shape[0]} rows of "
                f"{row.parameter.shape[1]} columns do not say where q, k and v are. If they follow one another, pass "
                "fused={pattern: (q_rows, k_rows, v_rows)}; if every head has its q, k and v in turn, "
                "roles={pattern: 'linear'} and num_heads={pattern: 3 * heads}; roles={pattern: 'linear'} alone takes "
                "it as one matrix, and 'fallback' is for weights that are stored (in, out)."
            )
        keys["split_sizes"] = row.split_sizes
    if num_heads:
        keys["num_heads"] = num_heads
    if is_stack:
        keys["batched"] = True
    return keys


def _multipliers(
    row: RoleOfParameter,
    builder: OptimizerBuilder,
    base: BaseOfParameter | None,
    keys: Mapping[str, Any],
    rules: Mapping[str, TransferRule],
) -> tuple[float, float, float]:
    """Return the multipliers of learning rate, weight decay and epsilon."""
    if base is None:
        return 1.0, 1.0, 1.0
    # The rate: one for all pieces that are updated by themselves.
    rule = builder.rule(rules)
    shape = tuple(row.parameter.shape)
    depths = {"depth": base.depth, "base_depth": base.base_depth}
    role: Role = "linear" if "split_sizes" in keys or "num_heads" in keys else row.role
    rates = {
        # Rounded, so that equal multipliers make one group although their last bits differ.
        float(f"{learning_rate_multiplier(rule, role=role, shape=own, base_shape=other, **depths):.12g}")
        for own, other in _pieces(shape, base.shape, keys)
    }
    if len(rates) > 1:
        raise InvalidInputError(f"its pieces need different learning rates, times {sorted(rates)}; do not fuse them.")
    rate = rates.pop()
    # Decay and epsilon are of the whole parameter.
    decay = 1.0
    if builder.facts.decay_follows_width:
        coupled = 1.0 if builder.settings.get("decay") == "independent" else rate
        decay = weight_decay_multiplier(
            role=row.role, shape=shape, base_shape=base.shape, learning_rate_multiplier=coupled
        )
    epsilon_rule = builder.epsilon_rule(rules)
    epsilon = epsilon_multiplier(epsilon_rule, role=row.role, shape=shape, base_shape=base.shape, **depths)
    return rate, decay, epsilon


def _pieces(
    shape: tuple[int, ...], base_shape: tuple[int, ...], keys: Mapping[str, Any]
) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return shapes of the pieces here and at the base: fused ones in the same proportions, heads of the same width."""
    if not shape:
        return {(shape, base_shape)}
    # Rows of fused matrices here, and as many parts of the base's rows.
    sizes = keys.get("split_sizes") or (shape[0],)
    base_sizes = [size * base_shape[0] / shape[0] for size in sizes]
    if "num_heads" in keys:
        head = sizes[0] // keys["num_heads"]
        if any(size % head for size in base_sizes):
            raise InvalidInputError(
                f"heads of {head} rows do not fit into the base shape {base_shape}: heads must have the base's width, "
                "only their number may differ."
            )
        sizes, base_sizes = (head,), [float(head)]
    # The base's parts have to be whole rows, too.
    if any(size % 1 for size in base_sizes):
        raise InvalidInputError(f"the base shape {base_shape} cannot be split in the proportions of {sizes}.")
    return {((own, *shape[1:]), (int(other), *base_shape[1:])) for own, other in zip(sizes, base_sizes, strict=True)}


def _assigned(
    row: RoleOfParameter,
    builder: OptimizerBuilder,
    keys: dict[str, Any],
    base: BaseOfParameter | None,
    rules: Mapping[str, TransferRule],
    *,
    decays: bool,
) -> GroupedParameter:
    """Put one parameter into the group of its settings, and return the account of it."""
    shape = tuple(row.parameter.shape)
    if not row.parameter.requires_grad:
        return GroupedParameter(row.name, shape, row.role, None, None, 1, "-", None, 1.0, 0.0)
    # Shapes of the matrices that are updated one by one.
    matrices = []
    if not builder.facts.is_elementwise and (builder.splits or len(shape) > 1):
        pieces = matrices_of(torch.empty(shape, device="meta"), keys)
        matrices = [(piece.shape[0], piece.shape[1]) for piece in pieces]
    # Settings that differ from those of the optimizer: parameters with the same ones share a group.
    rate, decay, epsilon = _multipliers(row, builder, base, keys, rules)
    settings = {"lr": None, "weight_decay": 0.0} | builder.settings
    changed = {"lr": rate, "weight_decay": decay if decays else 0.0}
    changed |= dict.fromkeys(["grafting_epsilon"] if "grafting_epsilon" in settings else ["eps", "epsilon"], epsilon)
    keys |= {
        name: float(settings[name]) * factor for name, factor in changed.items() if settings.get(name) and factor != 1
    }
    builder.param_groups.setdefault(tuple(sorted(keys.items())), []).append(row.parameter)
    settings |= keys
    return GroupedParameter(
        name=row.name,
        shape=shape,
        role=row.role,
        optimizer=builder.name,
        geometry=builder.facts.geometry,
        num_matrices=max(len(matrices), 1),
        update_scale=scale_in_words(builder.facts.update_scale, matrices),
        learning_rate=None if settings["lr"] is None else float(settings["lr"]),
        learning_rate_multiplier=rate,
        weight_decay=float(settings["weight_decay"]),
    )
