"""One row per optimizer class: its geometry, its coupling, its momentum and how its settings follow the width.

Pure data: no optimizer is imported for it. Optimizers of this package carry their row themselves, as the class
attribute `facts`; KNOWN has the rows of torch's and of other packages' classes, by class name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from gns_controller.core.batch_arithmetic import LearningRateCoupling
from gns_controller.core.contract import Geometry
from trainer_hooks.optim.engine.update_scale import Scale
from trainer_hooks.optim.protocols import NamesAverages, innermost

BETA_SETTINGS = ("betas", "beta1", "beta2", "beta3", "shampoo_beta")
"""Names of group settings that are weights of the past in exponential averages, whatever the optimizer."""

RuleName = Literal["adam", "grafted_shampoo", "muon", "shampoo", "soap", "sgd", "spectral"]


@dataclass(frozen=True)
class TransferRule:
    """Properties of an optimizer by which its settings follow the size of a model."""

    name: RuleName
    """adam stands for every optimizer with entries of size 1, signs too; spectral for updates whose spectral norm is
    explicitly sqrt(out / in)."""
    scale: Scale = "none"
    """The factor that the optimizer already puts on its update; it is divided out, so that it is not counted twice."""
    exponent: float = 0.25
    """k of Shampoo: the inverse root on each side."""
    block_size: int | None = None
    """Sides are cut into blocks of this size; None: they are not."""
    largest_side: int | None = None
    """Sides above are not preconditioned; None: all are."""


@dataclass(frozen=True, kw_only=True)
class OptimizerFacts:
    """One row of the table: properties of an optimizer class that hooks and parameter groups depend on.

    The defaults are those of an optimizer that is not in the table.
    """

    geometry: Geometry | None = None
    """Norm that it descends in; None: none of the three, or not known."""
    learning_rate_coupling: LearningRateCoupling | None = None
    """Default rule by which the learning rate follows the batch: sqrt where steps do not grow with the gradient. None:
    no rule is known to be sound."""
    no_coupling_because: str = "there is no optimizer of that name in the table of known optimizers"
    """Reason for the message if learning_rate_coupling is None."""
    averaged_settings: tuple[str, ...] = BETA_SETTINGS
    """Group settings that are weights of the past in exponential averages: those that follow a batch on request. An
    optimizer's own `averages` come first."""
    declares_averages: bool = False
    """True if averaged_settings are the optimizer's own `averages`, so that any other momentum stays as it is."""
    momentum: Literal["average", "sum", "none"] | None = None
    """Form of the momentum, m <- beta m + (1 - beta) g or m <- mu m + g; None: not known."""
    momentum_key: str | None = None
    """Entry of a parameter's state that holds m; None: m is not laid out like the gradient, or not made of gradients
    alone."""
    nesterov: bool = False
    """True if it looks ahead along the momentum in groups without a setting `nesterov`."""
    transfer_rule: TransferRule | None = None
    """Rule by which its settings follow the width; None: no rule is known."""
    update_scale: Scale = "none"
    """Factor on its orthogonal updates."""
    normalizes_rows: bool = False
    """True if entries of a row or column are divided by their common size, although the geometry is sign."""
    decay_follows_width: bool = True
    """True if a weight decay that was tuned on a small model has to be another one in a wide model."""
    by_settings: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """Settings of a group -> fields above that are others there. None: settings change nothing."""

    @property
    def is_elementwise(self) -> bool:
        """True if every entry is stepped by itself, so that it does not matter which matrices a parameter holds."""
        return self.geometry in ("sign", "euclidean") and not self.normalizes_rows

    def with_settings(self, settings: Mapping[str, Any]) -> OptimizerFacts:
        """Return the row as it is for a group with these settings."""
        return self if self.by_settings is None else replace(self, **self.by_settings(settings))


def facts_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any] | None = None) -> OptimizerFacts:
    """Return the row of the innermost optimizer, as it is for one of its param groups.

    Args:
        optimizer: of any class, or a wrapper around it.
        group: the param group; None: the row without what settings change.
    """
    optimizer = innermost(optimizer)
    facts = facts_of_class(type(optimizer))
    # Settings may change fields of the row, and averages that the optimizer names itself come before either.
    if group is not None:
        facts = facts.with_settings(group)
    if isinstance(optimizer, NamesAverages):
        facts = replace(facts, averaged_settings=tuple(optimizer.averages), declares_averages=True)
    return facts


def facts_of_class(optimizer_class: type[torch.optim.Optimizer]) -> OptimizerFacts:
    """Return the row that a class carries as `facts`, its own or inherited, else that of its name."""
    # A class of another package may have an attribute of that name for something else.
    facts = getattr(optimizer_class, "facts", None)
    return facts if isinstance(facts, OptimizerFacts) else facts_named(optimizer_class.__name__)


def facts_named(class_name: str) -> OptimizerFacts:
    """Return the row of another package's class, AdaMax's as well as Adamax's; of a class without one, the defaults."""
    return KNOWN.get(class_name) or _BY_LOWER_NAME.get(class_name.lower()) or OptimizerFacts()


def _muon_groups(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of groups that Muon classes step with AdamW, as use_muon=False or algorithm names them."""
    if settings.get("use_muon") is False or settings.get("algorithm") in ("adamw", "lion"):
        return {"geometry": "sign", "momentum_key": "exp_avg", "nesterov": False, "transfer_rule": None}
    return {}


def _torch_muon(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the scale of the updates of torch's Muon, which is called adjust_lr_fn there."""
    # Other packages' Muon does not name its scale in its settings.
    scale: Scale = "none"
    if "adjust_lr_fn" in settings:
        scale = "rms_match" if settings["adjust_lr_fn"] == "match_rms_adamw" else "shape"
    return {"update_scale": scale, "transfer_rule": TransferRule("muon", scale=scale), **_muon_groups(settings)}


def _published_scion(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the geometry of a norm of the published Scion; Auto is spectral for matrices."""
    norm = str(settings.get("norm", "Auto")).lower()
    return {} if norm in ("auto", "spectral", "spectralconv") else {"geometry": "sign"}


def _in_blocks(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a transfer rule that counts the blocks of a matrix, which DistributedShampoo cuts."""
    return {"transfer_rule": TransferRule("shampoo", block_size=settings.get("max_preconditioner_dim"))}


def _torch_sgd(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return both settings of SGD's momentum, a sum, if dampening=momentum makes an average of it."""
    is_average = settings.get("momentum") and settings.get("dampening") == settings["momentum"]
    return {"averaged_settings": ("momentum", "dampening")} if is_average else {}


_SIGN = OptimizerFacts(geometry="sign", learning_rate_coupling="sqrt")
_SPECTRAL = OptimizerFacts(geometry="spectral", learning_rate_coupling="sqrt")
_ADAM = replace(_SIGN, momentum="average", momentum_key="exp_avg", transfer_rule=TransferRule("adam"))
_SIGNUM = replace(
    _SIGN,
    averaged_settings=("momentum",),
    momentum="average",
    momentum_key="momentum_buffer",
    transfer_rule=TransferRule("adam"),
)
_MUON = replace(
    _SPECTRAL,
    averaged_settings=("momentum", *BETA_SETTINGS),
    momentum="average",
    momentum_key="momentum_buffer",
    nesterov=True,
    by_settings=_muon_groups,
)
_FINDS_ITS_OWN_RATE = OptimizerFacts(no_coupling_because="it finds its own learning rate")
_FOLLOWS_ITS_OWN_CLOCK = OptimizerFacts(no_coupling_because="its relative step follows its own clock")

KNOWN: dict[str, OptimizerFacts] = {
    # Entries of about equal size: steps along signs, or gradients over the root of their averaged squares.
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "RAdam": _ADAM,
    "Lion": _ADAM,
    "NAdam": replace(_ADAM, momentum=None, momentum_key=None),  # its look-ahead follows a schedule of its own
    "Adamax": replace(_ADAM, transfer_rule=None),
    # The momentum of RMSprop adds up gradients that are divided already, so it is not an average of gradients.
    "RMSprop": replace(_SIGN, averaged_settings=("alpha", *BETA_SETTINGS), momentum="sum"),
    "SignSGD": _SIGNUM,
    "Signum": _SIGNUM,
    # Orthogonalized momentum.
    "Muon": replace(_MUON, by_settings=_torch_muon),
    "NorMuon": _MUON,  # divides the rows of the orthogonal update by their averaged size
    "Dion": replace(_SPECTRAL, by_settings=_muon_groups),
    # The weight `momentum` of the published Scion is that of the new gradient, so it is not one of the past.
    "Scion": replace(_SPECTRAL, transfer_rule=TransferRule("spectral"), by_settings=_published_scion),
    "SCION": replace(_SPECTRAL, geometry=None),  # the norms of its groups are numbers of an enumeration
    # Inverse roots of Kronecker factors, or Adam between their eigenbases.
    "Shampoo": replace(_SPECTRAL, by_settings=_in_blocks),
    "DistributedShampoo": replace(_SPECTRAL, by_settings=_in_blocks),
    "KLShampoo": _SPECTRAL,
    "SOAP": replace(_SPECTRAL, transfer_rule=TransferRule("soap")),
    "ASGO": _SPECTRAL,
    # The gradient itself.
    "SGD": OptimizerFacts(
        geometry="euclidean",
        learning_rate_coupling="linear",
        momentum="sum",
        momentum_key="momentum_buffer",
        transfer_rule=TransferRule("sgd"),
        by_settings=_torch_sgd,
    ),
    # No sound coupling.
    "LBFGS": OptimizerFacts(no_coupling_because="it searches its own step along curvature estimates of one batch size"),
    "Rprop": OptimizerFacts(no_coupling_because="it compares signs of successive full-batch gradients"),
    "Adagrad": OptimizerFacts(no_coupling_because="its sum of squares never forgets the batches before"),
    "Adadelta": OptimizerFacts(no_coupling_because="its step has no learning rate to scale"),
    "Adafactor": _FOLLOWS_ITS_OWN_CLOCK,
    "Prodigy": _FINDS_ITS_OWN_RATE,
    "DAdaptAdam": _FINDS_ITS_OWN_RATE,
    "DAdaptAdaGrad": _FINDS_ITS_OWN_RATE,
    "DAdaptAdan": _FINDS_ITS_OWN_RATE,
    "DAdaptLion": _FINDS_ITS_OWN_RATE,
    "DAdaptSGD": _FINDS_ITS_OWN_RATE,
}
"""Class name -> row, for classes that do not carry one. Packages that use one name differ in their settings."""

_BY_LOWER_NAME = {class_name.lower(): facts for class_name, facts in KNOWN.items()}
