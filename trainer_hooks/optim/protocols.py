"""Abilities of optimizers that a session uses, one protocol each, and the step count of outer optimizers.

An optimizer has an ability if its class, or an object around it, defines the members: nothing has to be inherited.
From Python 3.12 on isinstance ignores what __getattr__ offers, so wrappers are looked through by `inner`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gns_controller.core.errors import InvalidInputError


@runtime_checkable
class WrapsOptimizer(Protocol):
    """An optimizer that takes the steps of another one, as SNOO and Lookahead do."""

    inner: torch.optim.Optimizer
    """The wrapped optimizer. Its class decides geometry, coupling and momentum."""


@runtime_checkable
class OuterOptimizer(Protocol):
    """An optimizer that compares weights over several steps, so that the batch may change only between two of them."""

    interval: int
    """Optimizer steps from one outer step to the next."""

    @property
    def at_boundary(self) -> bool:
        """True if an outer step has just been taken, so that the batch may change now."""
        ...

    @property
    def num_steps(self) -> int:
        """Optimizer steps since the last outer step: those of the run, modulo interval."""
        ...


@runtime_checkable
class CountsSkippedSteps(Protocol):
    """An outer optimizer that can count a step which it did not take."""

    def count_skipped_step(self) -> None:
        """Count one step of the run that a gradient scaler left out. Called on every rank after that step."""
        ...


@runtime_checkable
class UsesHalves(Protocol):
    """An optimizer whose step uses the gradients of two halves of the batch besides their mean."""

    param_groups: list[dict[str, Any]]

    @property
    def wants_halves(self) -> bool:
        """True if the next step has a use for supply_halves."""
        ...

    def supply_halves(self, differences: Mapping[Tensor, Tensor]) -> None:
        """Take half the difference of the two halves' gradients, for the next step alone.

        Args:
            differences: parameter -> this rank's block of (g_A - g_B) / 2, scaled and averaged as the gradient is.
                Empty after a skipped step, whose differences must not reach the next one.
        """
        ...


@runtime_checkable
class NotifiedOfBatchChange(Protocol):
    """An optimizer whose state depends on the batch size."""

    def on_batch_change(self, *, global_batch_size: int, previous: int) -> None:
        """React to another batch. Called on every rank between two steps, for outer optimizers at a boundary.

        Args:
            global_batch_size: samples per step from now on.
            previous: samples per step until now.
        """
        ...


@runtime_checkable
class NamesAverages(Protocol):
    """An optimizer that names its weights of the past, which follow the batch on request (beta_coupling)."""

    averages: tuple[str, ...]
    """Group settings that are weights of the past in exponential averages. They override the row of the class."""


def layers_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """Yield the optimizer, the one it wraps, and so on to the innermost."""
    yield optimizer
    while isinstance(optimizer, WrapsOptimizer) and isinstance(optimizer.inner, torch.optim.Optimizer):
        optimizer = optimizer.inner
        yield optimizer


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer itself, or the one that takes the steps inside its wrappers."""
    *_, last = layers_of(optimizer)
    return last


def class_name_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the class name of the innermost optimizer, by which tables and users name it."""
    return type(innermost(optimizer)).__name__


def halves_user(optimizer: torch.optim.Optimizer) -> UsesHalves | None:
    """Return the optimizer, or the first one inside its wrappers, whose next step has a use for halves."""
    users = (layer for layer in layers_of(optimizer) if isinstance(layer, UsesHalves))
    return next((user for user in users if user.wants_halves), None)


def boundary_interval(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Return the number of optimizer steps between steps at which the batch may change: 1 without outer optimizers.

    Raises:
        InvalidInputError: several intervals, and the longest is not a multiple of the others.
    """
    # All outer steps coincide at the least common multiple of their intervals.
    outer_optimizers = _outer_optimizers(optimizers)
    intervals = [int(outer.interval) for _, outer in outer_optimizers]
    common = math.lcm(*intervals)
    if intervals and common > max(intervals):
        listed = ", ".join(
            f"{type(optimizer).__name__} around {class_name_of(optimizer)} every {interval}"
            for (optimizer, _), interval in zip(outer_optimizers, intervals, strict=True)
        )
        raise InvalidInputError(
            f"outer steps come at different steps ({listed}), together only every {common} steps, and the batch could "
            "change no more often: give all the same interval, or the longest a multiple of the others."
        )
    return common


def check_boundaries(optimizers: Sequence[torch.optim.Optimizer], *, optimizer_step: int) -> None:
    """Check that outer optimizers and the run count the same steps.

    Raises:
        InvalidInputError: an outer optimizer has counted other steps since its last boundary than the run.
    """
    # Counts differ where an outer optimizer is new to a run in progress, or comes from another checkpoint.
    for optimizer, outer in _outer_optimizers(optimizers):
        if outer.num_steps != optimizer_step % outer.interval:
            raise InvalidInputError(
                f"the run has {optimizer_step} optimizer steps behind it, {optimizer_step % outer.interval} since a "
                f"multiple of {outer.interval}, and {type(optimizer).__name__}, whose outer steps come every "
                f"{outer.interval}, has counted {outer.num_steps}: make it with the interval of its checkpoint and "
                "load its state_dict before attach; where there was none, start a new run with it, or resume at a "
                f"multiple of {outer.interval}."
            )


def count_skipped_steps(optimizers: Sequence[torch.optim.Optimizer], *, optimizer_step: int) -> None:
    """Count, in outer optimizers that are one behind the run, the step that a gradient scaler has just left out.

    Raises:
        InvalidInputError: such an optimizer cannot count it.
    """
    for optimizer, outer in _outer_optimizers(optimizers):
        # One behind the run: the scaler did not call step().
        if (optimizer_step - outer.num_steps) % outer.interval == 1:
            if not isinstance(optimizer, CountsSkippedSteps):
                raise InvalidInputError(
                    f"a gradient scaler skipped a step, and {type(optimizer).__name__} has no count_skipped_step, so "
                    "its outer steps would come at other steps than the run's: give the class that method."
                )
            optimizer.count_skipped_step()


def _outer_optimizers(
    optimizers: Sequence[torch.optim.Optimizer],
) -> list[tuple[torch.optim.Optimizer, OuterOptimizer]]:
    """Return outer optimizers, each as the optimizer that it is and by its ability.

    Raises:
        InvalidInputError: an optimizer has boundaries, and no interval or count of steps between them.
    """
    pairs: list[tuple[torch.optim.Optimizer, OuterOptimizer]] = []
    for optimizer in optimizers:
        if isinstance(optimizer, OuterOptimizer):
            pairs.append((optimizer, optimizer))
        elif hasattr(optimizer, "at_boundary"):
            missing = [name for name in ("interval", "num_steps") if not hasattr(optimizer, name)]
            raise InvalidInputError(
                f"{type(optimizer).__name__} has at_boundary, and its class does not define "
                f"{' and '.join(missing or ['it'])}: an outer optimizer has interval, at_boundary and num_steps."
            )
    return pairs
