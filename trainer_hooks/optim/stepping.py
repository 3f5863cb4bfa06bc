"""The outside of a step, the same for every optimizer here: the closure, then the optimizer's own work."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import overload

import torch


class Stepping(torch.optim.Optimizer):
    """Base of optimizers: step() evaluates the closure and calls _step."""

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
