"""Reachable batches: micro-batch x accumulation x data-parallel ranks, and finer below one full pass.

One full pass is micro_batch_size * data_parallel_size samples. From there on a global batch is a whole number of full
passes; below it the micro-batch itself shrinks, in multiples of micro_batch_granularity samples per rank.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from gns_controller.core.contract import Count, FrozenModel, Label, PositiveCount
from gns_controller.core.errors import BatchShapeError

LearningRateCoupling = Literal["sqrt", "linear", "adascale", "adamscale", "seesaw", "none"]
"""What a batch change does to a learning rate; formulas in coupling.py."""

BetaCoupling = Literal["half_life", "none"]
"""half_life: averages of the optimizer forget per sample, not per step."""


class BatchRules(FrozenModel):
    """The part of a run's specification that says which batches exist and how they start."""

    global_batch_size: PositiveCount
    """Batch at the start; the learning rate is tuned for it."""
    micro_batch_size: PositiveCount
    """Most samples per rank per backward pass."""
    micro_batch_granularity: PositiveCount = 1
    """Below one full pass the micro-batch shrinks in multiples of this."""
    learning_rate_coupling: LearningRateCoupling = "sqrt"
    """What a batch change does to the learning rate."""
    optimizer_couplings: dict[Label, LearningRateCoupling] = Field(default_factory=dict)
    """Optimizer class name -> its own rule, where it is not that of the others."""
    beta_coupling: BetaCoupling = "none"
    """What a batch change does to the optimizers' averages."""
    decision_delay_steps: Count = 1
    """Whole steps between a measurement and the plan it leads to. Hides the round trip to the controller."""
    plan_interval_steps: PositiveCount = 1
    """The batch changes only where the count of completed optimizer steps is a multiple of this. Outer optimizers
    compare weights over so many steps, which then all have one batch."""

    def grid(self, *, data_parallel_size: int) -> BatchGrid:
        """Return the batches that so many ranks can make."""
        return BatchGrid(
            micro_batch_size=self.micro_batch_size,
            data_parallel_size=data_parallel_size,
            micro_batch_granularity=self.micro_batch_granularity,
        )

    def effective_step(self, optimizer_step: int) -> int:
        """Return the step at which a plan comes into force that a measurement of this step leads to."""
        earliest = optimizer_step + self.decision_delay_steps
        return -(-earliest // self.plan_interval_steps) * self.plan_interval_steps


class BatchShape(NamedTuple):
    """One way to make a global batch."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int


class BatchGrid(NamedTuple):
    """The batches that a number of ranks can make, in samples: whole full passes, and finer steps below the first."""

    micro_batch_size: int
    """Most samples per rank per backward pass."""
    data_parallel_size: int
    micro_batch_granularity: int = 1
    """Below one full pass the micro-batch shrinks in multiples of this."""

    @property
    def full_pass(self) -> int:
        """Samples of one backward pass on every rank."""
        return self.micro_batch_size * self.data_parallel_size

    @property
    def finest(self) -> int:
        """The smallest reachable batch, and the distance between two below one full pass."""
        return min(self.micro_batch_granularity, self.micro_batch_size) * self.data_parallel_size

    def floor(self, batch_size: float) -> int:
        """Return the largest reachable batch that is not above `batch_size`; the smallest one if all are above."""
        full_pass, finest = self.full_pass, self.finest
        quantum = full_pass if batch_size >= full_pass else finest
        return max(int(batch_size // quantum) * quantum, finest)

    def next(self, batch_size: int) -> int:
        """Return the smallest reachable batch above `batch_size`."""
        full_pass, finest = self.full_pass, self.finest
        if batch_size >= full_pass:
            return (batch_size // full_pass + 1) * full_pass
        return min((batch_size // finest + 1) * finest, full_pass)

    def factor(self, global_batch_size: int) -> BatchShape:
        """Split a global batch over ranks and backward passes.

        Raises:
            BatchShapeError: the batch is not reachable; the message names the nearest that are.
        """
        below = self.floor(global_batch_size)
        if below != global_batch_size:
            raise BatchShapeError(self._unreachable(global_batch_size, below=below))
        if global_batch_size >= self.full_pass:
            micro_batch_size, num_passes = self.micro_batch_size, global_batch_size // self.full_pass
        else:
            micro_batch_size, num_passes = global_batch_size // self.data_parallel_size, 1
        return BatchShape(
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=num_passes,
        )

    def _unreachable(self, global_batch_size: int, *, below: int) -> str:
        nearest = f"{below} or {self.next(global_batch_size)}" if below < global_batch_size else str(below)
        if global_batch_size > self.full_pass:
            quantum = (
                f"micro_batch_size * data_parallel_size = {self.micro_batch_size} * {self.data_parallel_size} "
                f"= {self.full_pass}"
            )
        else:
            quantum = (
                f"micro_batch_granularity * data_parallel_size = {self.finest // self.data_parallel_size} * "
                f"{self.data_parallel_size} = {self.finest}"
            )
        return f"{global_batch_size=} is not a multiple of {quantum}. Nearest reachable: {nearest}."
