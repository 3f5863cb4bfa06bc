"""Base of every optimizer here: the closure around a step, copies, and checkpoints that name their class."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, overload

import torch

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.optim.engine.matrices import CUTS
from trainer_hooks.optim.engine.update import check_decay, check_settings, remember_peak
from trainer_hooks.optim.known_optimizers import OptimizerFacts

OPTIMIZER_CLASS = "optimizer_class"
"""Entry of a state_dict with the name of the class that wrote it."""

# Checkpoints without that entry are recognised by the settings in their groups. Those that torch.save wrote before
# there was one are read so until 0.2. torch.distributed.checkpoint's get_optimizer_state_dict keeps no entry beside
# "state" and "param_groups", so its checkpoints come without the name whatever their age.
_SCHEDULER_SETTINGS = {"initial_lr", "swa_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
_FOREIGN_SETTINGS = _SCHEDULER_SETTINGS | {"param_names", "differentiable", "peak_lr"}
"""Settings that torch, its schedulers and remember_peak write into groups and defaults."""
OPTIMIZERS_SETTINGS = frozenset(
    (
        *("batched", "betas", "cautious", "decay", "eps", "epsilon", "exponent", "factors", "grafting"),
        *("grafting_beta2", "grafting_epsilon", "guard", "lr", "max_preconditioner_dim", "maximize", "method"),
        *("momentum", "nesterov", "norm", "num_heads", "precondition_frequency", "qr_iterations", "refresh_due"),
        *("relative_epsilon", "rounds", "scale", "scale_by_nuclear_norm", "shampoo_beta", "spectral_normalization"),
        *("split_sizes", "start_preconditioning_step", "tolerance", "update_bias_correction", "weight_decay"),
        *("adjust_lr_fn", "alpha", "amsgrad", "capturable", "centered", "dampening", "decoupled_weight_decay"),
        *("differentiable", "foreach", "fused", "initial_accumulator_value", "lr_decay", "momentum_decay"),
        *("ns_coefficients", "ns_steps", "rho"),
    )
)
"""Settings that the optimizers here write into groups, and torch's common ones. Any other key is the user's own."""
_SHARED_SETTINGS = {"decay", "cautious", "maximize", "spectral_normalization", "update_bias_correction", "refresh_due"}
"""Settings of several optimizers, as CUTS are, which distinguish none. Older checkpoints may lack them."""


class BaseOptimizer(torch.optim.Optimizer):
    """Base of optimizers, whose step() evaluates the closure and calls _step.

    copy.deepcopy and pickle take settings, state and what the constructor was given, but no hooks and no process group:
    a copy does all of the work by itself.
    """

    facts: ClassVar[OptimizerFacts]
    """Row of this class in the table of known optimizers."""
    _not_copied: ClassVar[tuple[str, ...]] = ()
    """Attributes that a copy gets from its class. Those of the bases count, too."""
    _torch_settings: ClassVar[frozenset[str]] = frozenset()
    """Group settings of torch's optimizer of this name whose checkpoints load here, too. They change nothing."""
    _same_checkpoints: ClassVar[frozenset[str]] = frozenset()
    """Names of other classes with the same checkpoints. Those of the bases of a class load in any case."""

    @property
    def averages(self) -> tuple[str, ...]:
        """Group settings that are weights of the past in exponential averages: those that follow a batch on request."""
        return self.facts.averaged_settings

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of; torch's own keeps no attribute of a subclass."""
        # Torch's hooks and patches belong to this object, and _not_copied to its place in a process group.
        left_out = {"step"} | {name for kind in type(self).__mro__ for name in vars(kind).get("_not_copied", ())}
        own = {
            name: value
            for name, value in vars(self).items()
            if name not in left_out and not name.startswith("_optimizer_")
        }
        return own | super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or a checkpoint; settings that groups of older ones lack stay as they were built."""
        # Older groups lack settings that came later; torch's method replaces the groups that were built.
        built = vars(self).get("param_groups", [])
        super().__setstate__(state)
        for group, own in zip(self.param_groups, built, strict=False):
            for name, value in own.items():
                group.setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state_dict and, as "optimizer_class", the name of this class."""
        return {**super().state_dict(), OPTIMIZER_CLASS: type(self).__name__}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, settings included.

        Raises:
            InvalidInputError: another optimizer wrote it. Nothing is loaded.
        """
        self._check_checkpoint(state_dict)
        super().load_state_dict(state_dict)

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Refuse another optimizer's checkpoint, by the name of its class if it has one, else by its settings."""
        if OPTIMIZER_CLASS in state_dict:
            check_class(type(self), state_dict, also=self._same_checkpoints)
        else:
            self._check_settings(state_dict)

    def _check_settings(self, state_dict: dict[str, Any]) -> None:
        """Refuse groups with another optimizer's setting that none here has, or without one of this one's own."""
        # Settings that may be there, and those that must be.
        known = {name for group in self.param_groups for name in group} | _FOREIGN_SETTINGS | self._torch_settings
        own = self.defaults.keys() - _SHARED_SETTINGS - _FOREIGN_SETTINGS - set(CUTS)
        for group in state_dict["param_groups"]:
            foreign, missing = sorted((group.keys() & OPTIMIZERS_SETTINGS) - known), sorted(own - group.keys())
            if foreign or missing:
                difference = f"hold {', '.join(foreign)}" if foreign else f"lack {', '.join(missing)}"
                raise InvalidInputError(
                    f"this checkpoint is not {type(self).__name__}'s: its groups {difference}. Load it into the "
                    "optimizer that wrote it."
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
        """Take one step; parameters without gradient are left alone. Every rank that holds the parameters calls it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @abstractmethod
    def _step(self) -> None:
        """Move every parameter that has a gradient."""


def check_class(kind: type, state_dict: Mapping[str, Any], *, also: Collection[str] = ()) -> None:
    """Refuse a checkpoint that names a class which is neither this one nor one of its bases.

    Args:
        kind: the class of the optimizer that is to load it.
        state_dict: the checkpoint, with the name as "optimizer_class".
        also: names of other classes with the same checkpoints.

    Raises:
        InvalidInputError: another class wrote it.
    """
    writer = state_dict[OPTIMIZER_CLASS]
    if writer not in {base.__name__ for base in kind.__mro__} and writer not in also:
        raise InvalidInputError(
            f"this checkpoint was written by {writer}, and {kind.__name__} cannot go on from it: load it into "
            f"{writer}. If the two step alike, remove {OPTIMIZER_CLASS!r} from the state_dict first."
        )
