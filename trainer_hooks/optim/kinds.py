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

    An outer optimizer compares weights over `interval` steps, tells `at_boundary` when it has just done so and
    `num_steps` since.

    Raises:
        InvalidInputError: several intervals, and the longest is no multiple of the others.
    """
    outer_ones = _outer_ones(optimizers)
    intervals = [int(outer.interval) for outer in outer_ones]
    common = math.lcm(*intervals)
    if intervals and common > max(intervals):
        named = ", ".join(
            f"{type(outer).__name__} around {kind_of(outer)} every {interval}"
            for outer, interval in zip(outer_ones, intervals, strict=True)
        )
        raise InvalidInputError(
            f"outer steps come at different steps ({named}), together only every {common} steps, and the batch could "
            "change no more often: give all the same interval, or the longest a multiple of the others."
        )
    return common


def check_boundaries(optimizers: Sequence[torch.optim.Optimizer], *, optimizer_step: int) -> None:
    """Whether outer optimizers and the run count the same steps.

    Raises:
        InvalidInputError: steps since the last boundary are not those of the run.
    """
    for outer in _outer_ones(optimizers):
        if outer.num_steps != optimizer_step % outer.interval:
            raise InvalidInputError(
                f"the run has {optimizer_step} optimizer steps behind it, {optimizer_step % outer.interval} since a "
                f"multiple of {outer.interval}, and {type(outer).__name__}, whose outer steps come every "
                f"{outer.interval}, has counted {outer.num_steps}: make it with the interval of its checkpoint and "
                "load its state_dict before attach; where there was none, start a new run with it, or resume at a "
                f"multiple of {outer.interval}."
            )


def count_skipped_steps(optimizers: Sequence[torch.optim.Optimizer], *, optimizer_step: int) -> None:
    """Outer optimizers count the step of the run that a gradient scaler has just kept from them."""
    for outer in _outer_ones(optimizers):
        if (optimizer_step - outer.num_steps) % outer.interval == 1:
            outer.count_skipped_step()


def _outer_ones(optimizers: Sequence[torch.optim.Optimizer]) -> list[Any]:
    return [optimizer for optimizer in optimizers if hasattr(optimizer, "at_boundary")]
