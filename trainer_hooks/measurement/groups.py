"""Which parameters are measured together, and in which geometry."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gns_controller.core.contract import Geometry, ParameterGroup
from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.optim.known_optimizers import facts_of
from trainer_hooks.optim.protocols import class_name_of

logger = logging.getLogger(__name__)

DEFAULT_EXCLUDE = r"(^|\.)(tok_emb|wte|wpe|embed\w*|lm_head|head|output)(\.|$)"
"""Embeddings and heads, where they share a model with spectral groups: their rows are seen by few samples each."""


@dataclass(frozen=True)
class MeasuredGroup:
    """Parameters that share a geometry and one optimizer class."""

    name: str
    geometry: Geometry
    optimizer: str
    parameters: tuple[Tensor, ...]
    param_groups: tuple[dict[str, Any], ...]
    """The torch param groups they live in; the first one's lr is reported."""

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters, in order."""
        return [tuple(parameter.shape) for parameter in self.parameters]

    def in_the_euclidean_norm(self) -> MeasuredGroup:
        """The same parameters, measured in the l2 norm besides."""
        return replace(self, name=f"{self.name}, euclidean", geometry="euclidean")

    def description(self) -> ParameterGroup:
        """For the run's specification."""
        return ParameterGroup(
            name=self.name,
            geometry=self.geometry,
            optimizer=self.optimizer,
            num_tensors=len(self.parameters),
            num_parameters=sum(parameter.numel() for parameter in self.parameters),
        )


def find_groups(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    geometries: Mapping[str, Geometry] | None = None,
    exclude: str = DEFAULT_EXCLUDE,
) -> list[MeasuredGroup]:
    """Sort a model's trained parameters into groups, spectral ones first.

    Args:
        model: for the names that `exclude` looks at; a DDP wrapper's "module." prefix is ignored.
        optimizers: whose parameters are measured; each parameter's geometry follows from its optimizer's class, and
            from its group's norm with Scion. Spectral are matrices alone; an optimizer's other parameters are sign.
        geometries: class name -> geometry, for optimizers we do not know or to overrule what we know.
        exclude: regular expression; parameters whose name it finds are not measured, if a spectral group exists.

    Raises:
        GeometryError: an optimizer of unknown geometry, `geometries` for optimizers that are not there, or nothing left
            to measure.
        InvalidInputError: `exclude` is not a regular expression.
    """
    kinds = set(map(class_name_of, optimizers))
    strangers = sorted(set(geometries or {}) - kinds)
    if strangers:
        raise GeometryError(f"geometries names {strangers}, and the optimizers are {', '.join(sorted(kinds))}.")
    unknown = sorted(set((geometries or {}).values()) - set(get_args(Geometry)))
    if unknown:
        raise GeometryError(f"geometries {unknown} do not exist; there are {', '.join(get_args(Geometry))}.")
    try:
        re.compile(exclude)
    except re.error as error:
        raise InvalidInputError(f"exclude={exclude!r} is not a regular expression: {error}.") from None
    sparse = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    }
    if sparse:
        logger.info("embeddings with sparse gradients are not measured: count=%d", len(sparse))
    names = {id(parameter): name.removeprefix("module.") for name, parameter in model.named_parameters()}
    found: dict[tuple[str, Geometry], tuple[list[Tensor], list[dict[str, Any]]]] = {}
    for optimizer in optimizers:
        kind = class_name_of(optimizer)
        for param_group in optimizer.param_groups:
            known = (geometries or {}).get(kind) or facts_of(optimizer, param_group).geometry
            if known is None:
                raise GeometryError(
                    f"the geometry of optimizer {kind} is not known; give "
                    f"MeasurementOptions(geometries={{{kind!r}: 'sign'}}), or 'euclidean', or 'spectral'."
                )
            for parameter in param_group["params"]:
                if not parameter.requires_grad or id(parameter) in sparse:
                    continue
                geometry: Geometry = "sign" if known == "spectral" and parameter.ndim != 2 else known
                parameters, param_groups = found.setdefault((kind, geometry), ([], []))
                parameters.append(parameter)
                if not any(param_group is seen for seen in param_groups):
                    param_groups.append(param_group)
    composite = any(geometry == "spectral" for _, geometry in found)
    groups: list[MeasuredGroup] = []
    for (kind, geometry), (parameters, param_groups) in found.items():
        if composite and geometry != "spectral":
            parameters = [p for p in parameters if not re.search(exclude, names.get(id(p), ""))]
        if parameters:
            label = "matrices" if geometry == "spectral" else "others" if composite else "all"
            name = label if label not in {group.name for group in groups} else f"{label}-{kind}"
            groups.append(MeasuredGroup(name, geometry, kind, tuple(parameters), tuple(param_groups)))
    if not groups:
        raise GeometryError("no trained parameter is left to measure; check requires_grad and exclude.")
    return sorted(groups, key=lambda group: group.geometry != "spectral")


def thinned(groups: Sequence[MeasuredGroup], share: float) -> list[MeasuredGroup]:
    """About this share of the matrices of spectral groups, evenly over depth within each shape; the rest as it is.

    A thinned group has another name, so that averages of the whole one are not continued with it.
    """
    if share >= 1:
        return list(groups)
    every = round(1 / share)
    found = []
    for group in groups:
        if group.geometry != "spectral":
            found.append(group)
            continue
        seen: dict[tuple[int, ...], int] = {}
        kept = []
        for parameter, shape in zip(group.parameters, group.shapes, strict=True):
            position = seen.get(shape, 0)
            seen[shape] = position + 1
            if position % every == 0:
                kept.append(parameter)
        name = f"{group.name} ({len(kept)} of {len(group.parameters)})"
        found.append(replace(group, name=name, parameters=tuple(kept)))
    return found
