"""What kind of optimizer one is, looked at from outside. Nothing has to be imported for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gns_controller.core.errors import InvalidInputError


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, or the one that a wrapper such as SNOO holds as `inner`, whose steps it takes."""
    found: Any = optimizer
    while isinstance(getattr(found, "inner", None), torch.optim.Optimizer):
        found = found.inner
    assert isinstance(found, torch.optim.Optimizer)
    return found


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """Class name of the innermost optimizer."""
    return type(innermost(optimizer)).__name__


def boundary_interval(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Optimizer steps between the steps at which the batch may change: 1, or the interval of outer optimizers.

    An outer optimizer compares weights over `interval` steps and tells `at_boundary` when it has just done so.
    """
    return math.lcm(*(int(getattr(o, "interval", 1)) for o in optimizers if hasattr(o, "at_boundary")))


def check_boundaries(optimizers: Sequence[torch.optim.Optimizer], *, optimizer_step: int) -> None:
    """Whether outer optimizers and the run count the same steps.

    Raises:
        InvalidInputError: an outer step does not fall on a multiple of its interval.
    """
    for optimizer in optimizers:
        if hasattr(optimizer, "at_boundary"):
            interval = int(getattr(optimizer, "interval", 1))
            if optimizer.at_boundary != (optimizer_step % interval == 0):
                raise InvalidInputError(
                    f"the run has {optimizer_step} optimizer steps behind it, and {type(optimizer).__name__}, whose "
                    f"outer steps come every {interval}, has counted others: load its state_dict before attach, or "
                    "make it anew for a new run."
                )
