"""Muon: steepest descent in the spectral norm, along the orthogonalized momentum. Hidden matrices only.

M = rows, N = columns, B = matrices of one shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gns_controller.core.errors import GeometryError, InvalidInputError
from trainer_hooks.kernels import NEWTON_SCHULZ_5, OrthogonalizationSchedule, orthogonalize


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized matrix by matrix, with decoupled weight decay.

        m <- beta m + (1 - beta) g            u = (1 - beta) g + beta m  (Nesterov)  or  m
        w <- w (1 - lr weight_decay) - lr max(1, M/N)^(1/2) orthogonalize(u)

    Matrices of equal shape are orthogonalized in one batch.

    Args:
        params: 2-D parameters or groups of them. Give embeddings, heads, norms and biases to AdamW.
        lr: in units of spectral norm per step.
        momentum: beta in [0, 1).
        nesterov: look ahead along the momentum.
        weight_decay: decoupled, times lr.
        schedule: polynomials of the orthogonalization.

    Raises:
        GeometryError: a parameter is not a matrix.
        InvalidInputError: a setting out of range.

    Source: Jordan et al. 2024 (Muon), EMA form.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        schedule: OrthogonalizationSchedule = NEWTON_SCHULZ_5,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0:
            raise InvalidInputError(f"Muon needs lr >= 0, 0 <= momentum < 1, got {lr=}, {momentum=}, {weight_decay=}.")
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})
        self._schedule = schedule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; each must be a matrix."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if isinstance(param, DTensor):
                raise GeometryError(
                    f"Muon takes whole matrices, and this one of shape {tuple(param.shape)} is sharded; "
                    "use DistributedDataParallel, or a Muon made for FSDP2 (its class name decides what is measured)."
                )
            if param.ndim != 2:
                raise GeometryError(
                    f"Muon takes 2-D parameters, got shape {tuple(param.shape)}; give this one to AdamW."
                )

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
            by_shape: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape, param.dtype, param.device].append(param)
            for params in by_shape.values():
                self._step_equal_shapes(params, group)
        return loss

    def _step_equal_shapes(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads: list[Tensor] = [param.grad for param in params if param.grad is not None]
        momenta = []
        for param in params:
            state = self.state[param]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(param)
            momenta.append(state["momentum"])
        beta = group["momentum"]
        torch._foreach_lerp_(momenta, grads, 1 - beta)
        directions = torch._foreach_lerp(grads, momenta, beta) if group["nesterov"] else momenta
        updates_BMN = orthogonalize(torch.stack(directions), schedule=self._schedule)
        num_rows, num_columns = params[0].shape
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            params, list(updates_BMN.unbind()), alpha=-group["lr"] * max(1.0, num_rows / num_columns) ** 0.5
        )
