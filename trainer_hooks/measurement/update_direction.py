"""The optimizer's own direction before its duality map: momentum included, second moments and weight decay left out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError
from trainer_hooks.distributed.sharding import local_tensor
from trainer_hooks.optim.kinds import innermost


class Direction(NamedTuple):
    """u = momentum_weight * m + gradient_weight * g, with m from before this step."""

    momentum_weight: float | Tensor
    gradient_weight: float | Tensor
    momentum: Tensor | None
    """This rank's block of m; None: there is none yet, or none at all."""


MOMENTUM_KEYS = {
    "SignSGD": "momentum",
    "Signum": "momentum",
    "Scion": "momentum",
    "Muon": "momentum",
    "SGD": "momentum_buffer",
    "Adam": "exp_avg",
    "AdamW": "exp_avg",
    "RAdam": "exp_avg",
    "Lion": "exp_avg",
}
"""Optimizer class -> where its state keeps m. torch.optim.Muon keeps it under "momentum_buffer"."""


def direction_of(optimizer: torch.optim.Optimizer, param_group: dict[str, Any], parameter: Tensor) -> Direction:
    """How this step's gradient and the momentum make the direction that the optimizer maps to a step.

        EMA form (Signum, Adam, Lion)   u = beta m + (1 - beta) g
        Muon, Nesterov                  u = beta^2 m + (1 - beta^2) g
        SGD                             u = mu m + (1 - dampening) g, Nesterov u = mu^2 m + (1 + mu (1 - dampening)) g

    Raises:
        InvalidInputError: an optimizer whose momentum we do not know.
    """
    optimizer = innermost(optimizer)
    kind = type(optimizer).__name__
    if kind not in MOMENTUM_KEYS:
        raise InvalidInputError(
            f"the momentum of optimizer {kind} is not known, so its update direction cannot be measured; "
            "use directions=['gradient']."
        )
    state = optimizer.state.get(parameter, {})
    found = state.get(MOMENTUM_KEYS[kind], state.get("momentum_buffer"))
    momentum = local_tensor(found) if isinstance(found, Tensor) else None
    if momentum is not None and param_group.get("maximize"):
        momentum = -momentum  # kept as an average of what is descended
    if kind == "SGD":
        mu, damping = float(param_group["momentum"]), float(param_group["dampening"])
        if mu == 0:
            return Direction(0.0, 1.0, None)
        fresh = 1.0 if momentum is None else 1 - damping  # torch starts the buffer with the whole first gradient
        if param_group["nesterov"]:
            return Direction(mu * mu, 1 + mu * fresh, momentum)
        return Direction(mu, fresh, momentum)
    if kind in ("SignSGD", "Signum", "Scion", "Muon"):
        beta = float(param_group["momentum"])
        if param_group.get("nesterov"):
            return Direction(beta * beta, 1 - beta * beta, momentum)
        return Direction(beta, 1 - beta, momentum)
    beta = float(param_group["betas"][0])
    return Direction(beta, 1 - beta, momentum)
