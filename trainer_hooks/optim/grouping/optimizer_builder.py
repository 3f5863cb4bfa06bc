"""What is known of an optimizer before it is built: how it takes matrices, and by which rule its settings transfer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from gns_controller.core.contract import Geometry
from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.optim.engine.update_scale import Scale
from trainer_hooks.optim.geometries_of import geometry_of
from trainer_hooks.optim.grouping.width_transfer import TransferRule
from trainer_hooks.optim.rules import own_rule


@dataclass
class OptimizerToBe:
    """Its class, its settings and its parameter groups so far."""

    kind: type[torch.optim.Optimizer]
    options: dict[str, Any]
    process_group: dist.ProcessGroup | None = None
    settings: dict[str, Any] = field(init=False)
    param_groups: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self.settings = self.kind([nn.Parameter(torch.zeros(2, 2))], **self.options).defaults
        except GeometryError:  # Scion's norm for vectors takes nothing else
            self.settings = self.kind([nn.Parameter(torch.zeros(2))], **self.options).defaults

    @property
    def name(self) -> str:
        """Of its class."""
        return self.kind.__name__

    @property
    def geometry(self) -> Geometry | None:
        """In which it descends; None: not known."""
        return geometry_of(self.name, self.settings)

    @property
    def is_elementwise(self) -> bool:
        """Whether it asks for no matrices: how entries hang together is all the same to it."""
        if "norm" in self.settings:  # Scion
            return self.settings["norm"] in ("sign", "bias_rms")
        return self.geometry in ("sign", "euclidean")

    @property
    def splits(self) -> bool:
        """Whether its groups know of fused projections, heads and stacks."""
        return "split_sizes" in self.settings

    @property
    def scale(self) -> Scale:
        """The factor that it puts on its updates itself, torch's Muon under another name."""
        if "adjust_lr_fn" in self.settings:
            return "rms_match" if self.settings["adjust_lr_fn"] == "match_rms_adamw" else "shape"
        if "norm" in self.settings:  # Scion, whose scale is a radius
            return "spectral" if self.settings["norm"] == "spectral" else "none"
        return cast(Scale, self.settings.get("scale", "none"))

    def rule(self, rules: Mapping[str, TransferRule]) -> TransferRule:
        """By which its rate and its decay follow the width.

        Raises:
            InvalidInputError: none is given, and none is known.
        """
        if self.name not in rules and self.settings.get("spectral_normalization"):
            return TransferRule("spectral")
        found = self._own_rule(rules)
        if found is None:
            raise InvalidInputError(
                f"no rule is known by which settings of this {self.name} follow the width; pass "
                f"transfer={{{self.name!r}: TransferRule(...)}}, or leave out base_shapes."
            )
        return found

    def epsilon_rule(self, rules: Mapping[str, TransferRule]) -> TransferRule:
        """By which its epsilon does: it is beside squared gradients, whatever the update's norm is made."""
        return self._own_rule(rules) or TransferRule("spectral")

    def _own_rule(self, rules: Mapping[str, TransferRule]) -> TransferRule | None:
        return rules[self.name] if self.name in rules else own_rule(self.name, self.settings, scale=self.scale)

    def built(self) -> torch.optim.Optimizer:
        """The optimizer itself, with the groups that were gathered.

        Raises:
            InvalidInputError: it divides no work, and a process group was given.
        """
        shared: dict[str, Any] = {} if self.process_group is None else {"process_group": self.process_group}
        if not shared.keys() <= inspect.signature(self.kind).parameters.keys():
            raise InvalidInputError(f"{self.name} divides no work between ranks; leave out process_group.")
        groups = [{"params": parameters, **dict(keys)} for keys, parameters in self.param_groups.items()]
        return self.kind(groups, **self.options, **shared)
