"""Signum: steepest descent in the l-infinity norm, along the sign of the momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gns_controller.core.errors import InvalidInputError


class Signum(torch.optim.Optimizer):
    """Sign of an exponential average of gradients, with decoupled weight decay.

        m <- beta m + (1 - beta) g        w <- w (1 - lr weight_decay) - lr sign(m)

    momentum=0 is SignSGD. sign(0) is 0, so an entry that never got a gradient never moves.

    Args:
        params: parameters or groups.
        lr: size of every entry's step.
        momentum: beta in [0, 1).
        weight_decay: decoupled, times lr.

    Raises:
        InvalidInputError: a setting out of range.

    Source: Bernstein et al. 2018, arXiv:1802.04434 (with decoupled decay).
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, *, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0:
            raise InvalidInputError(
                f"Signum needs lr >= 0 and 0 <= momentum < 1, got {lr=}, {momentum=}, {weight_decay=}."
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; parameters without gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [param for param in group["params"] if param.grad is not None]
            # One foreach operation takes plain tensors or DTensors; a tensor-parallel plan leaves both in a model.
            for is_sharded in (False, True):
                alike = [param for param in params if isinstance(param, DTensor) is is_sharded]
                if alike:
                    self._step_together(alike, group)
        return loss

    def _step_together(self, params: list[Tensor], group: dict[str, Any]) -> None:
        directions: list[Tensor] = [param.grad for param in params if param.grad is not None]
        if group["momentum"] > 0:
            momenta = [_momentum(self.state[param], param) for param in params]
            torch._foreach_lerp_(momenta, directions, 1 - group["momentum"])
            directions = momenta
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, torch._foreach_sign(directions), alpha=-group["lr"])


def _momentum(state: dict[str, Any], param: Tensor) -> Tensor:
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(param)
    buffer: Tensor = state["momentum"]
    return buffer
