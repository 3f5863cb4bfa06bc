"""The measurement scheduler: which steps are measured, with how many sign patterns, on which layers, at what cost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gns_controller.core.contract import BatchPlan, GroupReading, Span
from gns_controller.core.errors import TooFewGroupsError
from trainer_hooks.data import cut_micro_batches
from trainer_hooks.distributed.layout import Layout
from trainer_hooks.estimators import choose_patterns
from trainer_hooks.measurement.budget import (
    FIRST_MEASURED_STEP,
    MeasurementCost,
    MeasurementLedger,
    affordable_layer_share,
    best_num_patterns,
)
from trainer_hooks.measurement.capture.captured_step import Dealing, GradientCapture
from trainer_hooks.measurement.capture.ddp import DdpCapture
from trainer_hooks.measurement.capture.fsdp2 import Fsdp2Capture, check_spread_seam
from trainer_hooks.measurement.gradient_check import check_gradients
from trainer_hooks.measurement.group_reader import GroupReader
from trainer_hooks.measurement.groups import MeasuredGroup, thinned
from trainer_hooks.measurement.requirements import Requirements
from trainer_hooks.optim.protocols import halves_user

logger = logging.getLogger(__name__)

_MOST_AUTOMATIC_PATTERNS = 7


class MeasurementScheduler:
    """Choose the steps that are measured, capture their gradients, and turn them into readings.

    Every method is called on every rank, and decides by counters and costs that are the same on every rank.

    Args:
        groups: parameter groups to measure.
        optimizers: the optimizers whose momentum makes the update direction.
        layout: how the model is spread over ranks.
        requirements: estimators, directions and norms, number of sign patterns and of sample groups.
        interval: shortest distance between measured steps; None: as the budget allows.
        budget: largest share of the run's time; None: the interval alone decides.
        micro_batch_size: most samples per rank per backward pass.
    """

    def __init__(
        self,
        *,
        groups: Sequence[MeasuredGroup],
        optimizers: Sequence[torch.optim.Optimizer],
        layout: Layout,
        requirements: Requirements,
        interval: Span | None,
        budget: float | None,
        micro_batch_size: int,
    ) -> None:
        measured = requirements.measured
        self.groups = tuple(groups)
        self._optimizers = tuple(optimizers)
        self._layout = layout
        self._measured = measured
        self._interval = interval
        self._ledger = MeasurementLedger(budget) if budget is not None else None
        self._chooses_patterns = requirements.num_sign_patterns is None and budget is not None
        self.num_patterns = requirements.num_sign_patterns or 1
        self._min_sample_groups = requirements.min_sample_groups
        self._micro_batch_size = micro_batch_size
        self.layer_share = 1.0
        self._reader = GroupReader(groups, optimizers, layout, measured)
        if "rank_variance" in measured.estimators:
            check_spread_seam(self._reader.parameters, self._reader.spectral, layout)
        self._capture: GradientCapture | None = None
        self._losses = torch.zeros(2, dtype=torch.float64, device=layout.ranks.device)
        self._next = FIRST_MEASURED_STEP if interval is None else 0
        self._next_unit_is_steps = interval is None or interval.steps is not None
        self._warned: set[str] = set()
        self.norm_seconds = 0.0
        """Seconds that reductions and norms of the latest measured step took on this rank."""
        self.differences: dict[Tensor, Tensor] = {}
        """Parameter -> this rank's block of (g_A - g_B) / 2, after a measured step with halves of equal size; only for
        parameters whose optimizer uses them."""

    # ---------------------------------------------------------------- before a step

    @property
    def is_armed(self) -> bool:
        """True while the step that runs now is a measured one."""
        return self._capture is not None

    @property
    def min_micro_batches(self) -> int:
        """Fewest backward passes per rank of a measured step."""
        if not self._layout.averages_in_backward:
            needed = max(self._min_sample_groups, self.num_patterns + 1)
            return -(-needed // self._layout.data_parallel.size)
        groups = -(-self._min_sample_groups // self._layout.data_parallel.size)
        if "split" not in self._measured.estimators:
            return groups
        return max(groups, 1 << self.num_patterns.bit_length())

    @property
    def described_groups(self) -> tuple[MeasuredGroup, ...]:
        """All groups, and again those that are measured in the l2 norm besides their own."""
        if not self._measured.also_euclidean:
            return self.groups
        return self.groups + tuple(group.in_the_euclidean_norm() for group in self.groups)

    def describe(self) -> str:
        """Return the part of the line printed at attach."""
        parts = [
            f"estimators={','.join(self._measured.estimators)}",
            f"directions={','.join(self._measured.directions)}",
        ]
        if self._measured.also_euclidean:
            parts.append("also=euclidean")
        if self._measured.inner_products:
            parts.append("inner_products")
        if self._interval is not None:
            unit = "steps" if self._interval.steps else "samples"
            parts.append(f"interval={self._interval.steps or self._interval.samples}_{unit}")
        if self._ledger is not None:
            parts.append(f"budget={self._ledger.budget:g}")
        return " ".join(parts)

    def check(self, global_batch_size: int) -> None:
        """Check that a measured step at this batch has something to compare.

        Raises:
            TooFewGroupsError: it has not.
        """
        self._dealing(global_batch_size)

    def arm(self, *, optimizer_step: int, samples_seen: int, plan: BatchPlan) -> None:
        """Decide whether the step that begins now is measured. Depends on counters only, so all ranks agree."""
        self._capture = None
        if (optimizer_step if self._next_unit_is_steps else samples_seen) < self._next:
            return
        try:
            self._capture = self._make_capture(self._dealing(plan.global_batch_size))
        except TooFewGroupsError:
            self._warn_once("too_small", "batch too small to be measured: global_batch_size=%d", plan.global_batch_size)
        self._losses.zero_()

    def self_test(self, model: nn.Module) -> None:
        """Send known gradients through the real backward path.

        Raises:
            SelfTestError: gradients do not come out as measuring relies on.
        """
        check_gradients(model, self._layout, self._reader.parameters, self._make_capture)

    # ---------------------------------------------------------------- during a step

    def micro_batch(
        self, *, num_samples: int, loss_factor: float, gradient_scale: float
    ) -> AbstractContextManager[None]:
        """Return the context around one backward pass."""
        if self._capture is None:
            return nullcontext()
        return self._capture.micro_batch(
            num_samples=num_samples, loss_factor=loss_factor, gradient_scale=gradient_scale
        )

    def observe_loss(self, loss: Tensor) -> None:
        """Sum losses of a measured step: where ranks hold no local gradient, equal losses betray equal samples."""
        if self._capture is not None and loss.dtype.itemsize >= 4:  # bf16 losses are equal by chance
            value = loss.detach().double()
            self._losses += torch.stack([value, value * value])

    def read(self) -> list[GroupReading]:
        """Return the readings of a measured step, else none. After the last backward pass, before clipping."""
        self.differences = {}
        if self._capture is None:
            return []

        # Reduce and take norms. `finish` and `read` hold collectives, and every rank has a capture or none has.
        if self._layout.ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # else the norms would be charged for the backward pass
        began = time.perf_counter()
        captured = self._capture.finish(self._losses)
        readings = self._reader.read(captured)
        self.norm_seconds = time.perf_counter() - began

        # Keep half differences for the optimizers that use them.
        counts = captured.counts
        if readings and captured.signed and 2 * counts.num_samples_a[0] == counts.num_samples:
            with_halves = _parameters_with_halves(self._optimizers)
            pairs = zip(self._reader.parameters, captured.signed[0], strict=True)
            self.differences = {parameter: half for parameter, half in pairs if parameter in with_halves}

        # Say what kept a reading away.
        self._warn_of_missing_losses()
        if counts.same_samples:
            self._warn_of_same_samples(counts.same_samples)
        elif not readings and self._layout.ranks.rank == 0:
            logger.warning(
                "measured step without a reading: sample_groups=%d samples_a=%s of %d misweighted=%d. "
                "Two micro-batches or two ranks are needed, and a loss factor of ranks * n_j / batch.",
                counts.num_groups,
                list(counts.num_samples_a),
                counts.num_samples,
                counts.num_misweighted,
            )
        if captured.is_incomplete:
            self._warn_once(
                "incomplete",
                "no rank_variance reading: a parameter got no gradient in some backward pass, or ranks' shares differ.",
            )
        return readings

    # ---------------------------------------------------------------- after a step

    def settle(self, cost: MeasurementCost | None, *, optimizer_step: int, samples_seen: int, batch_size: int) -> None:
        """Plan the next measured step, from costs that are the same on every rank."""
        self._capture = None

        # By the interval alone.
        interval = self._interval
        if interval is not None:
            length = interval.steps or interval.samples or 1
            if interval.steps is not None:
                # Recorded step numbers are multiples: a step that begins after p steps completes as number p + 1.
                self._next = -(-(optimizer_step + 1) // length) * length - 1
            else:
                self._next = (samples_seen // length + 1) * length
        if self._ledger is None:
            return

        # By the budget: not before the costs so far are a small enough share of the time.
        unit = 1 if self._next_unit_is_steps else batch_size
        now = optimizer_step if self._next_unit_is_steps else samples_seen
        if cost is None:  # the first step after a restart: an unmeasured step has not been timed yet
            self._next = max(self._next, now + FIRST_MEASURED_STEP * unit)
            return
        steps = self._ledger.settle(replace(cost, num_patterns=self.num_patterns, layer_share=self.layer_share))
        earliest = now + (steps - 1) * unit
        self._next = max(self._next, earliest) if interval is not None else earliest

        # How finely: sign patterns that pay, and a share of the layers if even one measurement is too dear.
        before = (self.num_patterns, self.layer_share)
        is_first = len(self._ledger.recent) == 1
        typical = self._ledger.typical
        if self._chooses_patterns and typical is not None:
            self.num_patterns = best_num_patterns(typical, available=self._available_patterns(batch_size))
        if any(self._reader.spectral) and typical is not None:
            share = affordable_layer_share(typical, budget=self._ledger.budget, present_share=self.layer_share)
            if share != self.layer_share:
                self._measure_share(share)
        if self._layout.ranks.rank == 0:
            level = logging.INFO if is_first or before != (self.num_patterns, self.layer_share) else logging.DEBUG
            logger.log(
                level,
                "measuring: share_of_time=%.4f budget=%.4f next_in_steps=%d sign_patterns=%d layer_share=%g",
                self._ledger.share,
                self._ledger.budget,
                steps,
                self.num_patterns,
                self.layer_share,
            )

    @property
    def share_of_time(self) -> float | None:
        """Share of the time so far that measuring took, if there is a budget."""
        return self._ledger.share if self._ledger is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's part of the checkpoint, the same on every rank."""
        return {
            "next": self._next,
            "next_in_steps": self._next_unit_is_steps,
            "num_patterns": self.num_patterns,
            "layer_share": self.layer_share,
            "ledger": self._ledger.state_dict() if self._ledger is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, optimizer_step: int, samples_seen: int) -> None:
        """Go on where the checkpoint stopped; anew from here if it counted in another unit."""
        if state["next_in_steps"] == self._next_unit_is_steps:
            self._next = int(state["next"])
        elif not self._next_unit_is_steps:
            self._next = samples_seen
        else:
            self._next = optimizer_step + FIRST_MEASURED_STEP
        if self._chooses_patterns:
            self.num_patterns = int(state["num_patterns"])
        if self._ledger is not None and state["ledger"] is not None:
            self._ledger.load_state_dict(state["ledger"])
            if state["layer_share"] != self.layer_share:
                self._measure_share(float(state["layer_share"]))

    # ---------------------------------------------------------------- inside

    def _dealing(self, global_batch_size: int) -> Dealing:
        pieces = self._num_pieces(global_batch_size, self.min_micro_batches)
        if "split" not in self._measured.estimators:
            if pieces * self._layout.data_parallel.size < 2:
                raise TooFewGroupsError("one rank with one micro-batch has no spread; cut it in two, or use two ranks.")
            return Dealing((), 1, pieces)
        return Dealing(self._patterns(self.num_patterns, pieces), _chunks(pieces, self.num_patterns), pieces)

    def _num_pieces(self, global_batch_size: int, min_pieces: int) -> int:
        share = max(global_batch_size // self._layout.data_parallel.size, 1)
        return len(cut_micro_batches(share, micro_batch_size=self._micro_batch_size, min_pieces=min_pieces))

    def _patterns(self, number: int, pieces: int) -> Any:
        return choose_patterns(
            number,
            num_ranks=self._layout.data_parallel.size,
            num_micro_batches=_chunks(pieces, number),
            over_ranks=not self._layout.averages_in_backward,
        )

    def _available_patterns(self, batch_size: int) -> int:
        """Return how many sign patterns fit without cutting micro-batches any finer than they are."""
        try:
            pieces = self._num_pieces(batch_size, self.min_micro_batches)
            return len(self._patterns(_MOST_AUTOMATIC_PATTERNS, pieces))
        except TooFewGroupsError:
            return 1

    @property
    def _make_capture(self) -> Callable[[Dealing], GradientCapture]:
        reader, layout, measured = self._reader, self._layout, self._measured
        estimators = measured.estimators

        def make(dealing: Dealing) -> GradientCapture:
            if layout.averages_in_backward:
                return Fsdp2Capture(reader.parameters, reader.spectral, estimators, dealing, layout, reader.owners)
            return DdpCapture(
                reader.parameters,
                reader.spectral,
                estimators,
                dealing,
                layout,
                inner_products=measured.inner_products,
            )

        return make

    def _measure_share(self, share: float) -> None:
        self.layer_share = share
        groups = thinned(self.groups, share)
        self._reader = GroupReader(groups, self._optimizers, self._layout, self._measured)

    def _warn_of_missing_losses(self) -> None:
        layout = self._layout
        compares_losses = layout.averages_in_backward and layout.data_parallel.size > 1
        if compares_losses and layout.ranks.rank == 0 and not bool(self._losses.any()):
            self._warn_once(
                "no_losses",
                "ranks cannot be compared for equal samples: call session.observe_loss(loss, num_samples=...) after "
                "each backward pass, with a float32 loss.",
            )

    def _warn_of_same_samples(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._warn_once(
            "same_samples",
            "data-parallel ranks see the same samples, their gradients or losses are equal to the last bit: ranks=%s. "
            "Give each rank its own part of the data (sampler with num_replicas and rank); nothing is measured so.",
            ", ".join(f"{first}={second}" for first, second in pairs[:8]),
            level=logging.ERROR,
        )

    def _warn_once(self, fault: str, message: str, *arguments: object, level: int = logging.WARNING) -> None:
        """Log on rank 0, the first time that this fault is met."""
        if self._layout.ranks.rank == 0 and fault not in self._warned:
            self._warned.add(fault)
            logger.log(level, message, *arguments)


def _parameters_with_halves(optimizers: Sequence[torch.optim.Optimizer]) -> set[Tensor]:
    users = [user for user in map(halves_user, optimizers) if user is not None]
    groups = [group for user in users for group in user.param_groups]
    return {p for group in groups if group.get("update_bias_correction", True) for p in group["params"]}


def _chunks(pieces: int, num_patterns: int) -> int:
    """Return the number of stretches in time: a power of two, as many as the patterns need, if micro-batches allow."""
    return min(1 << num_patterns.bit_length(), 1 << (pieces.bit_length() - 1))
