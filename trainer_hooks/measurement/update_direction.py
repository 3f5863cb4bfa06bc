"""The optimizer's own direction before its duality map: momentum included, second moments and weight decay left out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.distributed.sharding import local_tensor
from trainer_hooks.optim.known_optimizers import OptimizerFacts, facts_of
from trainer_hooks.optim.protocols import class_name_of, innermost


class Direction(NamedTuple):
    """u = momentum_weight * m + gradient_weight * g, with m from before this step."""

    momentum_weight: float | Tensor
    gradient_weight: float | Tensor
    momentum: Tensor | None
    """This rank's block of m; None: there is none yet, or none at all."""


def direction_of(optimizer: torch.optim.Optimizer, param_group: dict[str, Any], parameter: Tensor) -> Direction:
    """Return how this step's gradient and the momentum make the direction that the optimizer maps to a step.

        average (Signum, Adam, Lion)   u = beta m + (1 - beta) g
                 Nesterov (Muon)       u = beta^2 m + (1 - beta^2) g
        sum (SGD)                      u = mu m + (1 - dampening) g
                 Nesterov              u = mu^2 m + (1 + mu (1 - dampening)) g
        none (SpecSGD)                 u = g

    Raises:
        InvalidInputError: an optimizer whose momentum is not in the table of known optimizers.
    """
    facts = facts_of(optimizer, param_group)
    weight = _weight_of_momentum(facts, param_group)
    if weight is None:
        raise InvalidInputError(
            f"the momentum of optimizer {class_name_of(optimizer)} is not known, so its update direction cannot be "
            "measured; use directions=['gradient']."
        )
    momentum = _momentum(facts, innermost(optimizer), param_group, parameter)
    looks_ahead = param_group.get("nesterov", facts.nesterov)
    if facts.momentum == "average":
        weight = weight * weight if looks_ahead else weight
        return Direction(weight, 1 - weight, momentum)
    if weight == 0:
        return Direction(0.0, 1.0, None)
    # torch starts the sum with the whole first gradient, whatever the dampening.
    fresh = 1.0 if momentum is None else 1 - float(param_group["dampening"])
    if looks_ahead:
        return Direction(weight * weight, 1 + weight * fresh, momentum)
    return Direction(weight, fresh, momentum)


def _weight_of_momentum(facts: OptimizerFacts, param_group: dict[str, Any]) -> float | None:
    """Weight of the past in the momentum, 0 without one; None if it is not known, or m is not made of gradients."""
    if facts.momentum == "none":
        return 0.0
    if facts.momentum is None:
        return None
    weight = param_group["momentum"] if "momentum" in param_group else param_group.get("betas", (None,))[0]
    if weight is None or (weight != 0 and facts.momentum_key is None):
        return None
    return float(weight)


def _momentum(
    facts: OptimizerFacts, optimizer: torch.optim.Optimizer, param_group: dict[str, Any], parameter: Tensor
) -> Tensor | None:
    """This rank's block of the momentum, as an average of what is ascended."""
    buffer = optimizer.state.get(parameter, {}).get(facts.momentum_key)
    if not isinstance(buffer, Tensor):
        return None
    block = local_tensor(buffer)
    return -block if param_group.get("maximize") else block
