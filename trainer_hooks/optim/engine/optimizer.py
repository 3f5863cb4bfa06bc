"""The outside of a step, the same for every optimizer here: the closure, then the optimizer's own work. And copies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.optim.engine.matrices import CUTS
from trainer_hooks.optim.engine.update import check_decay, check_settings, remember_peak
from trainer_hooks.optim.known_optimizers import OptimizerFacts

_SCHEDULERS_SETTINGS = {"initial_lr", "swa_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
_OTHERS_SETTINGS = _SCHEDULERS_SETTINGS | {"param_names", "differentiable", "peak_lr"}
"""What torch, its schedulers and remember_peak write into groups and defaults."""
OPTIMIZERS_SETTINGS = frozenset(
    [
        "batched",
        "betas",
        "cautious",
        "decay",
        "eps",
        "epsilon",
        "exponent",
        "factors",
        "grafting",
        "grafting_beta2",
        "grafting_epsilon",
        "guard",
        "lr",
        "max_preconditioner_dim",
        "maximize",
        "method",
        "momentum",
        "nesterov",
        "norm",
        "num_heads",
        "precondition_frequency",
        "qr_iterations",
        "refresh_due",
        "relative_epsilon",
        "rounds",
        "scale",
        "scale_by_nuclear_norm",
        "shampoo_beta",
        "spectral_normalization",
        "split_sizes",
        "start_preconditioning_step",
        "tolerance",
        "update_bias_correction",
        "weight_decay",
        "adjust_lr_fn",
        "alpha",
        "amsgrad",
        "capturable",
        "centered",
        "dampening",
        "decoupled_weight_decay",
        "differentiable",
        "foreach",
        "fused",
        "initial_accumulator_value",
        "lr_decay",
        "momentum_decay",
        "ns_coefficients",
        "ns_steps",
        "rho",
    ]
)
"""What the optimizers here write into groups, and torch's common ones. Any other key is the user's own."""
_SHARED_SETTINGS = {"decay", "cautious", "maximize", "spectral_normalization", "update_bias_correction", "refresh_due"}
"""Of several optimizers, as CUTS, so that they tell none from another. Older checkpoints may go without."""


class BaseOptimizer(torch.optim.Optimizer):
    """Base of optimizers: step() evaluates the closure and calls _step.

    copy.deepcopy and pickle take settings, state and what the constructor was given, but no hooks and no process group:
    a copy does all of the work by itself.
    """

    facts: ClassVar[OptimizerFacts]
    """Row of this class in the table of known optimizers."""
    _not_copied: ClassVar[tuple[str, ...]] = ()
    """Attributes that a copy gets from its class. Those of the bases count, too."""
    _torch_settings: ClassVar[frozenset[str]] = frozenset()
    """Group settings of torch's optimizer of this name whose checkpoints load here, too. They change nothing."""

    @property
    def averages(self) -> tuple[str, ...]:
        """Group settings that are weights of the past in exponential averages: those that follow a batch on request."""
        return self.facts.averaged_settings

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of; torch's own keeps no attribute of a subclass."""
        left_out = {"step"} | {name for kind in type(self).__mro__ for name in vars(kind).get("_not_copied", ())}
        own = {
            name: value
            for name, value in vars(self).items()
            if name not in left_out and not name.startswith("_optimizer_")
        }
        return own | super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a copy's or a checkpoint's; what groups of older checkpoints lack stays as it was built."""
        built = vars(self).get("param_groups", [])
        super().__setstate__(state)
        for group, own in zip(self.param_groups, built, strict=False):
            for name, value in own.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, settings included.

        Raises:
            InvalidInputError: it is another optimizer's.
        """
        self._check_checkpoint(state_dict)
        super().load_state_dict(state_dict)

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Refuse groups with another optimizer's setting that none here has, or without one of this one's own."""
        known = {name for group in self.param_groups for name in group} | _OTHERS_SETTINGS | self._torch_settings
        own = self.defaults.keys() - _SHARED_SETTINGS - _OTHERS_SETTINGS - set(CUTS)
        for group in state_dict["param_groups"]:
            strangers, missing = sorted((group.keys() & OPTIMIZERS_SETTINGS) - known), sorted(own - group.keys())
            if strangers or missing:
                found = f"hold {', '.join(strangers)}" if strangers else f"lack {', '.join(missing)}"
                raise InvalidInputError(
                    f"this checkpoint is not {type(self).__name__}'s: its groups {found}. Load it into the optimizer "
                    "that wrote it."
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own if the group has any. A refused group is not kept. Every rank."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse settings out of range, and parameters that cannot be stepped."""
        kind, infinity = type(self).__name__, float("inf")
        check_settings(kind, lr=(group["lr"], 0, infinity), weight_decay=(group["weight_decay"], 0, infinity))
        check_decay(kind, group["decay"])
        remember_peak(group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; parameters without gradient are left alone. Every rank that holds the parameters calls it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @abstractmethod
    def _step(self) -> None:
        """Move every parameter that has a gradient."""
