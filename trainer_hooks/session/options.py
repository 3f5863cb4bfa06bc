"""Coupling options: how optimizers' settings follow a batch change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from gns_controller.core.batch_arithmetic import BetaCoupling, LearningRateCoupling
from gns_controller.core.errors import CouplingError


@dataclass(frozen=True, kw_only=True)
class CouplingOptions:
    """Rules by which a batch change moves learning rates and the averages of optimizers.

    Raises:
        CouplingError: a coupling does not exist.
    """

    learning_rate: LearningRateCoupling | Mapping[str, LearningRateCoupling] | None = None
    """"sqrt", "linear", "adascale", "adamscale", "seesaw" or "none", for all optimizers or by optimizer class name.
    Default: by optimizer, linear for SGD, sqrt for those whose step does not grow with the gradient."""
    betas: BetaCoupling = "none"
    """"half_life" keeps the optimizers' averages (betas, Muon's and Signum's momentum) as long in samples as they are
    at the start; see `CoupledOptimizers.set_betas`. "none" keeps them as long in steps."""

    def __post_init__(self) -> None:
        """Check that couplings of these names exist; whether they suit the optimizers is checked at attach."""
        rules = self.learning_rate
        chosen = [] if rules is None else [rules] if isinstance(rules, str) else list(rules.values())
        unknown = sorted({str(rule) for rule in chosen} - set(get_args(LearningRateCoupling)))
        if unknown:
            raise CouplingError(
                f"learning-rate coupling {unknown[0]!r} does not exist; there are "
                f"{', '.join(get_args(LearningRateCoupling))}."
            )
        if self.betas not in get_args(BetaCoupling):
            raise CouplingError(
                f"beta coupling {self.betas!r} does not exist; there are {', '.join(get_args(BetaCoupling))}."
            )
