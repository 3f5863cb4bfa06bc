"""Builder of one optimizer: its class, its settings and the parameter groups that are gathered for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.optim.engine.matrix_optimizer import MatrixOptimizer
from trainer_hooks.optim.known_optimizers import OptimizerFacts, TransferRule, facts_of_class


@dataclass
class OptimizerBuilder:
    """An optimizer's class, settings and parameter groups, before it is built."""

    optimizer_class: type[torch.optim.Optimizer]
    options: dict[str, Any]
    """Keyword arguments of the class, as the caller gave them."""
    process_group: dist.ProcessGroup | None = None
    settings: dict[str, Any] = field(init=False)
    """The options and the defaults of the class: settings of a group that has none of its own."""
    param_groups: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = field(default_factory=dict)
    """Settings in which a group differs -> its parameters."""

    def __post_init__(self) -> None:
        # The class itself fills in its defaults, for one parameter that is thrown away.
        try:
            self.settings = self.optimizer_class([nn.Parameter(torch.zeros(2, 2))], **self.options).defaults
        except GeometryError:  # Scion's norm for vectors takes nothing else
            self.settings = self.optimizer_class([nn.Parameter(torch.zeros(2))], **self.options).defaults

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.optimizer_class.__name__

    @property
    def facts(self) -> OptimizerFacts:
        """Row of the table of known optimizers, for these settings."""
        return facts_of_class(self.optimizer_class).with_settings(self.settings)

    @property
    def splits(self) -> bool:
        """True if groups have settings for the matrices of fused projections, heads and stacks."""
        return "split_sizes" in self.settings

    def rule(self, rules: Mapping[str, TransferRule]) -> TransferRule:
        """Return the rule by which learning rate and decay follow the width.

        Args:
            rules: class name -> rule of the caller, which overrides the table.

        Raises:
            InvalidInputError: none is given, and none is known.
        """
        if self.name not in rules and self.settings.get("spectral_normalization"):
            return TransferRule("spectral")
        rule = self._own_rule(rules)
        if rule is None:
            raise InvalidInputError(
                f"no rule is known by which settings of this {self.name} follow the width; pass "
                f"transfer={{{self.name!r}: TransferRule(...)}}, or leave out base_shapes."
            )
        return rule

    def epsilon_rule(self, rules: Mapping[str, TransferRule]) -> TransferRule:
        """Return the rule of the epsilon beside squared gradients, whatever norm the update is given afterwards."""
        return self._own_rule(rules) or TransferRule("spectral")

    def _own_rule(self, rules: Mapping[str, TransferRule]) -> TransferRule | None:
        return rules.get(self.name, self.facts.transfer_rule)

    def build(self) -> torch.optim.Optimizer:
        """Return the optimizer, with the groups that were gathered.

        Raises:
            InvalidInputError: a process group was given, and the class divides no work.
        """
        # One param group per set of settings; the process group goes to optimizers that divide work.
        groups = [{"params": parameters, **dict(keys)} for keys, parameters in self.param_groups.items()]
        if self.process_group is None:
            return self.optimizer_class(groups, **self.options)
        takes_group = "process_group" in inspect.signature(self.optimizer_class).parameters
        if not takes_group and not issubclass(self.optimizer_class, MatrixOptimizer):
            raise InvalidInputError(f"{self.name} divides no work between ranks; leave out process_group.")
        return self.optimizer_class(groups, **self.options, process_group=self.process_group)  # type: ignore[call-arg]
