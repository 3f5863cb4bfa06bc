"""What was measured at one checkpoint, from the branches' records to rows, sentences and a policy document."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gns_controller.core.contract import Estimator, GroupReading
from gns_controller.experiments.calibration.arithmetic import (
    averaged,
    critical_batch,
    growth_price,
    noise_tolerance,
    smoothed_loss,
    table_policy,
)

ESTIMATORS: tuple[Estimator, ...] = ("split", "rank_variance")


@dataclass(frozen=True)
class BranchResult:
    """One finished branch."""

    multiple: int
    global_batch_size: int
    learning_rate_factor: float
    """On the base learning rate at the end, coupling alone."""
    optimizer_steps: int
    """Of the branch alone."""
    samples: tuple[int, ...]
    """Of the evaluations, from the start of the run."""
    losses: tuple[float, ...]
    """At `samples`, nats."""
    training_seconds: float

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], *, multiple: int, start_step: int) -> BranchResult:
        """From the lines of the job's output."""
        evaluations = [record for record in records if record["kind"] == "evaluation"]
        return cls(
            multiple=multiple,
            global_batch_size=int(evaluations[-1]["global_batch_size"]),
            learning_rate_factor=float(evaluations[-1]["learning_rate_factor"]),
            optimizer_steps=int(records[-1]["optimizer_steps"]) - start_step,
            samples=tuple(int(record["samples"]) for record in evaluations),
            losses=tuple(float(record["validation_loss"]) for record in evaluations),
            training_seconds=float(records[-1]["training_seconds"]),
        )

    @property
    def loss(self) -> float:
        """Smoothed, nats."""
        return smoothed_loss(self.losses)


@dataclass(frozen=True)
class NoiseScaleResult:
    """One estimator's noise scale over the branch at the checkpoint's own batch, and the theta that fits it."""

    estimator: Estimator
    group: str
    num_measurements: int
    noise_scale: float | None
    """Averaged noise_sq over averaged signal_sq, samples; None: the averaged signal is not positive."""
    noise_scale_low: float | None
    noise_scale_high: float | None
    """Two standard errors around; None above: no upper end."""
    resolution: float | None
    unresolved: bool
    theta: float | None = None
    theta_low: float | None = None
    theta_high: float | None = None
    """theta for the ends of the noise scale's interval alone."""


@dataclass(frozen=True)
class CheckpointResult:
    """Everything about one checkpoint."""

    checkpoint: str
    seed: int
    samples: int
    optimizer_step: int
    global_batch_size: int
    branches: tuple[BranchResult, ...]
    noise_scales: tuple[NoiseScaleResult, ...]
    critical_batch_size: int | None = None
    """None: only the price was asked for."""
    next_batch_size: int | None = None
    """The smallest larger batch tried."""
    bound: Literal["", "at_least", "at_most"] = ""
    """Whether the critical batch is only known from one side."""
    price: float | None = None
    """Nats per saved step, from B to 2 B; None: not asked for."""
    steps_saved: int | None = None

    def as_row(self) -> dict[str, Any]:
        """For JSON: smoothed losses added, null for numbers that are not finite."""
        row: dict[str, Any] = _finite(asdict(self))
        for shown, branch in zip(row["branches"], self.branches, strict=True):
            shown["loss"] = _finite(branch.loss)
        return row


def evaluate(
    *,
    checkpoint: str,
    description: Mapping[str, Any],
    records: Mapping[int, Sequence[Mapping[str, Any]]],
    tolerance: float,
    price: bool,
) -> CheckpointResult:
    """The numbers of one checkpoint.

    Args:
        checkpoint: its path.
        description: what the job says about it.
        records: multiple -> lines of that branch's output; 1 among them, with readings.
        tolerance: eps, nats.
        price: the price of growth from multiples 1 and 2, instead of the critical batch.
    """
    batch_size, step = int(description["global_batch_size"]), int(description["optimizer_step"])
    branches = {k: BranchResult.of(lines, multiple=k, start_step=step) for k, lines in sorted(records.items())}
    found: dict[str, Any] = {}
    critical: int | None = None
    if price:
        one, two = branches[1], branches[2]
        found["price"] = growth_price(
            loss=one.loss, loss_of_double=two.loss, steps=one.optimizer_steps, steps_of_double=two.optimizer_steps
        )
        found["steps_saved"] = one.optimizer_steps - two.optimizer_steps
    else:
        losses = {k: branch.loss for k, branch in branches.items()}
        measured = critical_batch(losses, global_batch_size=batch_size, tolerance=tolerance)
        critical = measured.critical_batch_size
        found["critical_batch_size"], found["next_batch_size"] = critical, measured.next_batch_size
        found["bound"] = "at_least" if measured.is_at_least else "at_most" if measured.is_at_most else ""
    return CheckpointResult(
        checkpoint=checkpoint,
        seed=int(description["job"]["seed"]),
        samples=int(description["samples_seen"]),
        optimizer_step=step,
        global_batch_size=batch_size,
        branches=tuple(branches.values()),
        noise_scales=tuple(
            result
            for estimator in ESTIMATORS
            if (result := read_noise_scale(records[1], estimator, critical_batch_size=critical))
        ),
        **found,
    )


def read_noise_scale(
    records: Sequence[Mapping[str, Any]], estimator: Estimator, *, critical_batch_size: int | None
) -> NoiseScaleResult | None:
    """Averages of the first group's readings, which is the optimizer's matrices; None without readings."""
    readings: list[GroupReading] = []
    for record in records:
        if record["kind"] == "readings":
            matching = [entry for entry in record["readings"] if entry["estimator"] == estimator]
            readings += [GroupReading.model_validate(entry) for entry in matching[:1]]
    smoothed = averaged(readings)
    if smoothed is None:
        return None
    judged = smoothed.judged()

    def theta(noise_scale: float | None) -> float | None:
        if critical_batch_size is None or noise_scale is None or not noise_scale > 0:
            return None
        return noise_tolerance(estimator=estimator, noise_scale=noise_scale, critical_batch_size=critical_batch_size)

    return NoiseScaleResult(
        estimator=estimator,
        group=smoothed.group,
        num_measurements=smoothed.signal_sq.count,
        noise_scale=judged.noise_scale,
        noise_scale_low=judged.low,
        noise_scale_high=judged.high,
        resolution=judged.resolution,
        unresolved=judged.unresolved,
        theta=theta(judged.noise_scale),
        theta_low=theta(judged.low),
        theta_high=theta(judged.high),
    )


def policy_document(results: Sequence[CheckpointResult]) -> dict[str, Any] | None:
    """The measured table as a policy; None if only prices were measured."""
    points = [(r.samples, r.critical_batch_size) for r in results if r.critical_batch_size is not None]
    return table_policy(points) if points else None


def typical_theta(results: Sequence[CheckpointResult], estimator: Estimator) -> float | None:
    """Geometric mean over checkpoints whose noise scale is resolved and whose critical batch has both sides."""
    found = [
        scale.theta
        for result in results
        for scale in result.noise_scales
        if scale.estimator == estimator and scale.theta and not scale.unresolved and not result.bound
    ]
    return statistics.geometric_mean(found) if found else None


def remarks(results: Sequence[CheckpointResult]) -> list[str]:
    """What a reader of the table must know, one sentence each."""
    said = []
    for result in results:
        where = f"At {result.samples} samples (seed {result.seed})"
        if result.bound == "at_least":
            said.append(
                f"{where} the largest batch tried, {result.critical_batch_size}, kept the loss: the critical batch is "
                "at least that, and theta at most the one shown. Try larger --multiples."
            )
        elif result.bound == "at_most":
            said.append(
                f"{where} no larger batch kept the loss: the critical batch is below {result.next_batch_size} and may "
                f"be below {result.global_batch_size}, theta above the one shown. Try a checkpoint of a smaller batch."
            )
        diverged = [str(branch.global_batch_size) for branch in result.branches if not math.isfinite(branch.loss)]
        if diverged:
            said.append(f"{where} training diverged at batch {', '.join(diverged)}.")
        found = {scale.estimator: scale for scale in result.noise_scales}
        for estimator in ESTIMATORS:
            scale = found.get(estimator)
            if scale is None:
                said.append(f"{where} nothing was read by {estimator}.")
            elif scale.unresolved and estimator == "split":
                said.append(
                    f"{where} the split noise scale is unresolved after {scale.num_measurements} measurements: its "
                    "signal cannot be told from noise. Take more --branch-samples."
                )
            elif scale.unresolved:
                said.append(
                    f"{where} the rank_variance noise scale is unresolved: it sits at its pure-noise ceiling and says "
                    "'at least about this batch'."
                )
    return said


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
